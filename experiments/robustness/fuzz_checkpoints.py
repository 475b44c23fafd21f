"""Checkpoints: mutated bytes and crafted contents, read alone and to resume an attack."""

from __future__ import annotations

import copy
import io
import struct
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from fuzz_common import ODD_VALUES, BrokenError, Outcome, attempt, mutated_bytes
from fuzz_tensor_files import same, with_code
from hypothesis import strategies as st
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from leakage.attacks import IDLGAttack
from leakage.callbacks import Gallery, VictimTable
from leakage.callbacks.timed_checkpoint import TimedCheckpoint
from leakage.datamodules import Source, Victims
from leakage.files.checkpoints import WholeCheckpointIO

_STEPS = 6
_Edit = tuple[str, tuple[Any, ...], Any]


def _tiny() -> TensorDataset:
    """The bundled sample at 8 x 8 pixels."""
    images, labels = zip(*Source("sample").open(), strict=True)
    return TensorDataset(F.interpolate(torch.stack(images), size=(8, 8), mode="area"), torch.tensor(labels))


def resumed(folder: Path, checkpoint: Path | None, steps: int = _STEPS + 2) -> IDLGAttack:
    """Run an attack on two victims up to so many steps, from a checkpoint where there is one."""
    attack = IDLGAttack(max_evaluations=50, restarts=1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[WholeCheckpointIO()],
        default_root_dir=folder,
        callbacks=[
            VictimTable(folder),
            Gallery(folder, moments=[0, 3]),
            TimedCheckpoint(folder / "checkpoints"),
        ],
    )
    ckpt_path = None if checkpoint is None else str(checkpoint)
    trainer.fit(attack, datamodule=Victims(_tiny(), victims=2), ckpt_path=ckpt_path)
    return attack


@lru_cache(maxsize=1)
def sound(folder: Path) -> bytes:
    """The bytes of a checkpoint in the midst of an attack."""
    resumed(folder / "sound", None, _STEPS)
    return (folder / "sound" / "checkpoints" / "last.ckpt").read_bytes()


def contents(data: bytes) -> dict[str, Any]:
    """What a sound checkpoint holds."""
    held: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return held


def written(held: object) -> bytes:
    """A file that torch writes."""
    file = io.BytesIO()
    torch.save(held, file)
    return file.getvalue()


# Bytes, read alone.


def inputs(folder: Path, marker: Path) -> st.SearchStrategy[bytes]:
    """Mutations of a small checkpoint: bytes, records of its archive, code in place of values."""
    small = written({"leakage": {"iteration": 3}, "state_dict": {"images": torch.arange(40.0)}})
    code = with_code(marker)
    shared: list[Any] = [0] * 10
    for _ in range(12):
        shared = [shared] * 10
    endless: list[Any] = []
    endless.append(endless)
    crafted = [
        {"leakage": shared},
        {"leakage": endless},
        {"leakage": torch.zeros(1).expand(10**12)},
        {"leakage": torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (10**12,), check_invariants=True)},
        {"leakage": torch.zeros(3, device="meta")},
        {"leakage": Path("x")},
        {"leakage": {}, "state_dict": 3, "pytorch-lightning_version": "new"},
        ["leakage"],
        torch.zeros(3),
        None,
    ]
    old = io.BytesIO()
    torch.save({"leakage": {}}, old, _use_new_zipfile_serialization=False)
    return st.one_of(
        mutated_bytes(small),
        mutated_bytes(sound(folder)),
        _archives(small, code),
        st.sampled_from([b"", small, code, code + small, small + code, old.getvalue(), *map(written, crafted)]),
    )


@st.composite
def _archives(draw: st.DrawFn, whole: bytes, code: bytes) -> bytes:
    """The archive with a record replaced, packed, removed, added or enlarged in its directory; checksums are right."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    name = draw(st.sampled_from(sorted(records)))
    kind = draw(st.sampled_from(["code", "bytes", "packed", "remove", "add", "claim"]))
    if kind == "remove":
        del records[name]
    elif kind == "code":
        records[next(name for name in records if name.endswith("data.pkl"))] = code
    elif kind in ("bytes", "packed"):
        records[name] = b"\0" * 10**7 if kind == "packed" else draw(mutated_bytes(records[name] or b"\0"))
    elif kind == "add":
        records[draw(st.sampled_from(["archive/../../x", "/etc/passwd", "archive/data/9", name.upper()]))] = code
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED) as archive:
        for key, value in records.items():
            archive.writestr(key, value)
    data = file.getvalue()
    if kind == "claim":  # sizes of a record in the directory
        place = data.rfind(b"PK\x01\x02")
        size = struct.pack("<I", draw(st.sampled_from([0, 1, 2**20, 2**31, 2**32 - 1])))
        data = data[: place + 20] + size * 2 + data[place + 28 :]
    return data


def check_reading(data: bytes, folder: Path, marker: Path) -> Outcome:
    """Read ``data``; the bytes of a checkpoint that is read have not changed where they matter."""
    path = folder / "input.ckpt"
    path.write_bytes(data)
    return attempt(lambda: WholeCheckpointIO().load_checkpoint(path), named=str(path), marker=marker)


def check_damage(data: bytes, folder: Path, marker: Path) -> Outcome:
    """As :func:`check_reading`, of mutated bytes of a sound checkpoint: what is read is what was written."""
    outcome = check_reading(data, folder, marker)
    if not outcome.refusal and not same(outcome.value, contents(sound(folder))):
        raise BrokenError("Expected what was written or a refusal, but got something else.")
    return outcome


def damaged(folder: Path) -> st.SearchStrategy[bytes]:
    """Mutated bytes of a sound checkpoint."""
    return mutated_bytes(sound(folder))


# Contents, to resume from.


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within nested dictionaries and lists."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _places(item, (*path, index))


def crafted(folder: Path, *parts: str) -> st.SearchStrategy[list[_Edit]]:
    """A few edits of the contents of a sound checkpoint, within these of its parts (by default all)."""
    held = contents(sound(folder))
    places = [place for place in _places(held) if not parts or place[0] in parts]
    kinds = st.sampled_from(["value", "value", "tensor", "tensor", "delete", "rename", "add"])
    tensors = [place for place in places if isinstance(_at(held, place), Tensor)]
    edit = kinds.flatmap(
        lambda kind: st.tuples(
            st.just(kind),
            st.sampled_from(tensors if kind == "tensor" and tensors else places),
            st.integers(0, 11) if kind == "tensor" else ODD_VALUES,
        )
    )
    return st.lists(edit, min_size=1, max_size=2)


def _at(held: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        held = held[key]
    return held


def edited(held: dict[str, Any], edits: list[_Edit]) -> dict[str, Any]:
    """A copy of the contents, with these edits."""
    held = copy.deepcopy(held)
    for kind, place, what in edits:
        try:
            parent, key = _at(held, place[:-1]), place[-1]
            value = parent[key]
            if kind == "delete":
                del parent[key]
            elif kind == "rename":
                parent[str(key) + "_"] = parent.pop(key)
            elif kind == "add":
                value["unknown"] = what
            else:
                parent[key] = _another(value, what) if kind == "tensor" and isinstance(value, Tensor) else what
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError):
            continue  # an earlier edit has taken this place away, or a value of its type can't have it
    return held


def _another(tensor: Tensor, which: int) -> Any:
    real = tensor.is_floating_point()
    others: list[Any] = [
        tensor[None],
        tensor.flatten(),
        torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(2),
        tensor[:0] if tensor.ndim else tensor.new_empty(0),
        tensor.double() if real else tensor.int(),
        tensor.to(torch.complex64),
        tensor.bool(),
        torch.full_like(tensor, float("nan") if real else -1),
        torch.full_like(tensor, float("inf") if real else 2**62),
        torch.full_like(tensor, -1e38 if real else 10**6),
        tensor.tolist(),
        None,
    ]
    return others[which]


def check_resuming(edits: list[_Edit], folder: Path, marker: Path) -> Outcome:
    """Go on from the edited checkpoint for two steps."""
    path = folder / "input.ckpt"
    path.write_bytes(written(edited(contents(sound(folder)), edits)))
    return attempt(lambda: resumed(folder / "resumed", path), marker=marker)
