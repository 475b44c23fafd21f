from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from leakage.files.checkpoints import (
    WholeCheckpointIO,
    check_checkpoint,
    check_like,
    part_of,
    parts_of,
    restoring,
    run_folder,
)

CHECKPOINT = {"leakage": {"iteration": 3}, "state_dict": {"images": torch.arange(4.0)}}


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "new" / "last.ckpt")
    read = WholeCheckpointIO().load_checkpoint(tmp_path / "new" / "last.ckpt")
    assert read["leakage"] == CHECKPOINT["leakage"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left, says torch")])
def test_a_full_disk_is_told_with_the_path_and_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, path)

    def full(checkpoint: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match=r"Expected to write '.*last.ckpt', but got: .*No space left"):
        WholeCheckpointIO().save_checkpoint({"leakage": {"iteration": 4}}, path)
    assert WholeCheckpointIO().load_checkpoint(path)["leakage"] == CHECKPOINT["leakage"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_refuses_a_truncated_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:  # torch raises other errors for some
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"Expected a whole checkpoint of leakage at '.*last.ckpt', but got a file that is trunc"
        ):
            WholeCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("held", [{"state_dict": {}}, [1], torch.zeros(3), None])
def test_refuses_a_foreign_one(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"of leakage at '.*last.ckpt', but got a file of another kind\."):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").write_text("notes")
    with pytest.raises(ValueError, match="truncated or of another kind"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_refuses_what_is_not_there_or_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a whole checkpoint .*last.ckpt', but got no such file"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "last.ckpt").touch()
    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(OSError, match=r"Expected a whole checkpoint .*last.ckpt', but got: .*Permission denied"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_runs_no_code_from_one(tmp_path: Path) -> None:
    torch.save({"leakage": Path("x")}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="truncated or of another kind"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)


def test_parts_are_those_of_the_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "step=2[0].ckpt"  # with what a pattern would take for its own
    expected = [part_of(path, process) for process in (1, 2, 11)]
    assert part_of(str(path), 0) == path
    assert [part.name for part in expected] == [f"step=2[0].ckpt.{process}" for process in (1, 2, 11)]
    assert parts_of(path) == []
    for part in [path, *expected]:
        part.touch()
    others = ["step=20.ckpt.1", "step=20.ckpt", "step=2[0].ckpt.1.77.partial", "step=2[0].ckpt.old", "step=2[0].1"]
    for name in others:
        (tmp_path / name).touch()
    assert set(parts_of(str(path))) == set(expected)


def test_slurm_s_checkpoints_keep_their_versions(tmp_path: Path) -> None:
    path = tmp_path / "hpc_ckpt_1.ckpt"
    for one in (path, part_of(path, 1), part_of(path, 2)):
        WholeCheckpointIO().save_checkpoint({}, one)
    assert parts_of(path) == [tmp_path / "hpc_part_1.ckpt.1", tmp_path / "hpc_part_1.ckpt.2"]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    assert trainer._checkpoint_connector._hpc_resume_path == str(path)


def test_parts_of_a_path_that_another_begins_with(tmp_path: Path) -> None:
    for name in ("last", "last.1", "last.ckpt", "last.ckpt.1"):
        (tmp_path / name).touch()
    assert parts_of(tmp_path / "last") == [tmp_path / "last.1"]


SOUND: dict[str, Any] = {
    "leakage": {"module": "A", "precision": "32-true"}, "hyper_parameters": {"seed": 0}, "optimizer_states": [{}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leakage": {"module": "B"}}, "Expected a checkpoint of A, but got one of B"),
        ({"leakage": {}}, "Expected a checkpoint of A, but got one of another module"),
        ({"hyper_parameters": {"seed": 1}}, r"Expected the configuration .* but got another: it has seed=1 \(now 0\)"),
        ({"hyper_parameters": {}}, r"it has seed=None \(now 0\)"),
        (
            {"leakage": SOUND["leakage"] | {"precision": "64-true"}},
            "Expected the checkpoint's precision '64-true', but got '32-true'",
        ),
    ],
)
def test_another_module_configuration_or_precision(change: dict[str, Any], message: str) -> None:
    check_checkpoint(SOUND, "A", {"seed": 0}, "32-true")
    with pytest.raises(ValueError, match=message):
        check_checkpoint(SOUND | change, "A", {"seed": 0}, "32-true")


def test_weights_only() -> None:
    held = {name: part for name, part in SOUND.items() if name != "optimizer_states"}
    with pytest.raises(ValueError, match="Expected a checkpoint to resume from, but got one with weights only"):
        check_checkpoint(held, "A", {}, "32-true")


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


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"accelerator": "cpu", "default_root_dir": tmp_path}
    assert run_folder(Trainer(logger=False, **plain)) == tmp_path
    loggers = [CSVLogger(tmp_path, name="a", version=3), CSVLogger(tmp_path, name="b", version="best")]
    assert run_folder(Trainer(logger=loggers, **plain)) == tmp_path / "a" / "version_3"
    assert run_folder(Trainer(logger=loggers[1:], **plain)) == tmp_path / "b" / "best"
