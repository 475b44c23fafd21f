from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakage.files.checkpoints import WholeCheckpointIO, check_checkpoint, check_like, restoring


@settings(max_examples=80)
@given(data=st.data())
def test_a_checkpoint_is_read_or_refused(
    fuzz: SimpleNamespace, folder: Path, marker: Path, data: st.DataObject
) -> None:
    fuzz.checkpoints.check_reading(data.draw(fuzz.checkpoints.inputs(folder, marker)), folder, marker)


@settings(max_examples=100)
@given(data=st.data())
def test_what_is_read_is_what_was_written(
    fuzz: SimpleNamespace, folder: Path, marker: Path, data: st.DataObject
) -> None:
    fuzz.checkpoints.check_damage(data.draw(fuzz.checkpoints.damaged(folder)), folder, marker)


@settings(max_examples=10)
@given(data=st.data())
def test_an_attack_goes_on_only_with_its_own_configuration(
    fuzz: SimpleNamespace, folder: Path, marker: Path, data: st.DataObject
) -> None:
    edits = data.draw(fuzz.checkpoints.crafted(folder, "hyper_parameters"))
    fuzz.checkpoints.check_resuming(edits, folder, marker)


@settings(max_examples=100)
@given(data=st.data())
def test_another_configuration_is_refused(fuzz: SimpleNamespace, data: st.DataObject) -> None:
    sound = {
        "leakage": {"module": "A", "precision": "32-true"},
        "hyper_parameters": {"seed": 0},
        "state_dict": {},
        "optimizer_states": [{}],
        "lr_schedulers": [],
        "callbacks": {},
    }
    check_checkpoint(sound, "A", {"seed": 0}, "32-true")
    part, name = data.draw(
        st.sampled_from([("leakage", "module"), ("leakage", "precision"), ("hyper_parameters", "seed")])
    )
    odd = data.draw(fuzz.common.ODD_VALUES)
    whole = data.draw(st.booleans())
    if odd == 0:  # the seed that it has
        return
    crafted: dict[str, Any] = sound | {part: odd if whole else sound[part] | {name: odd}}  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"Expected .*, but got "):
        check_checkpoint(crafted, "A", {"seed": 0}, "32-true")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"leakage": {}, "state_dict": {"x": torch.arange(1000.0)}}, path)
    return path


def test_every_changed_bit_of_a_tensor_is_noticed(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[whole.find(torch.tensor([500.0, 501.0]).numpy().tobytes()) + 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"'.*last.ckpt', but got one whose record '.*data/0' has changed since"):
        WholeCheckpointIO().load_checkpoint(path)


def test_torch_raises_other_errors_for_some_lengths(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"Expected a whole checkpoint of leakage at '.*last.ckpt', but got a file"
        ):
            WholeCheckpointIO().load_checkpoint(path)


def test_packed_records_are_refused(path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    with pytest.raises(ValueError, match="but got records that are packed or overlap"):
        WholeCheckpointIO().load_checkpoint(path)


def doubled(times: int) -> list[Any]:
    value: list[Any] = [0]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (doubled(60), "values that contain one another without end"),
        (torch.zeros(1).expand(2**40), r"a tensor \(1099511627776,\) that stands for 4398046511104 bytes"),
        (torch.zeros(2, 2).to_sparse(), "a tensor of layout torch.sparse_coo on cpu"),
        (torch.zeros(2, device="meta"), "a tensor of layout torch.strided on meta"),
    ],
)
def test_few_bytes_that_stand_for_many(path: Path, value: object, message: str) -> None:
    torch.save({"leakage": value if isinstance(value, dict) else {"x": value}}, path)
    with pytest.raises(ValueError, match=message):
        WholeCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loops", [1]), ("state_dict", None), ("global_step", "3"), ("pytorch-lightning_version", "new")],
)
def test_parts_of_other_types(path: Path, name: str, value: object) -> None:
    torch.save({"leakage": {}, name: value}, path)
    with pytest.raises(ValueError, match=rf"last.ckpt', but got one with {re.escape(repr(value))} as '{name}'"):
        WholeCheckpointIO().load_checkpoint(path)


def test_no_other_process_writes_the_same_partial_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("leakage.files.checkpoints.torch.save", lambda checkpoint, file: written.append(file.name))
    for process in (7, 8):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        WholeCheckpointIO().save_checkpoint({}, path)
    assert written == [f"{path}.7.partial", f"{path}.8.partial"]


def test_restoring_leaves_the_words_of_the_library() -> None:
    with pytest.raises(ValueError, match=r"^Expected `x` of 3, but got 4$"), restoring("the lanes"):
        raise ValueError("Expected `x` of 3, but got 4")
    with (
        pytest.raises(ValueError, match=r"Expected the lanes of a checkpoint .* but got TypeError: no"),
        restoring("the lanes"),
    ):
        raise TypeError("no")


@pytest.mark.parametrize("found", [None, {}, {"a": 3}, {"a": torch.zeros(2, dtype=torch.long)}, {"a": torch.zeros(3)}])
def test_tensors_unlike_those_of_the_run(found: object) -> None:
    check_like("the lanes", {"a": torch.ones(2)}, {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"Expected the lanes of a checkpoint with .*'a'.*, but got "):
        check_like("the lanes", found, {"a": torch.zeros(2)})


COUNTS = {"ready": 6, "completed": 5, "started": 6, "processed": 6}


def progress() -> dict[str, Any]:
    return {"current": COUNTS, "total": COUNTS, "is_last_batch": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer_states": []}, "Expected a checkpoint of one optimizer and no scheduler, but got 0 and 0"),
        ({"lr_schedulers": [{}]}, "Expected a checkpoint of one optimizer and no scheduler, but got 1 and 1"),
        ({"callbacks": {"Gallery": 3}}, "Expected a checkpoint with the state of Gallery, but got 3"),
        ({"loops": {}}, "Expected 'loops/fit_loop' of a checkpoint with .*'epoch_progress'.*, but got None"),
        ({"loops": {"fit_loop": {"epoch_loop.batch_progress": {}}}}, r"with \['current', .*, but got \[\]"),
        (
            {"loops": {"fit_loop": {"epoch_loop.batch_progress": progress() | {"is_last_batch": 1}}}},
            "batch_progress/is_last_batch' of a checkpoint as True or False, but got 1",
        ),
        (
            {"loops": {"fit_loop": {"epoch_loop.batch_progress": progress() | {"total": {**COUNTS, "ready": -1}}}}},
            "batch_progress/total/ready' of a checkpoint as a number of steps, but got -1",
        ),
        (
            {"loops": {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": 10**40}}}},
            "_batches_that_stepped' of a checkpoint as a number of steps, but got 1000",
        ),
    ],
)  # fmt: skip
def test_what_lightning_takes_for_granted(change: dict[str, Any], message: str) -> None:
    sound: dict[str, Any] = {
        "leakage": {"module": "A", "precision": "32-true"}, "hyper_parameters": {},
        "state_dict": {}, "optimizer_states": [{}], "lr_schedulers": [], "callbacks": {},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress()}},
    }  # fmt: skip
    check_checkpoint(sound, "A", {}, "32-true")
    with pytest.raises(ValueError, match=message):
        check_checkpoint(sound | change, "A", {}, "32-true")


@pytest.mark.parametrize("name", ["state_dict", "optimizer_states", "lr_schedulers", "callbacks"])
def test_a_checkpoint_of_weights_only(name: str) -> None:
    held = {"leakage": {"module": "A", "precision": 32}, "hyper_parameters": {}}
    held |= {"state_dict": {}, "optimizer_states": [{}], "lr_schedulers": [], "callbacks": {}}
    del held[name]
    with pytest.raises(ValueError, match=f"Expected a checkpoint to go on from, with '{name}', but got one without"):
        check_checkpoint(held, "A", {}, 32)
