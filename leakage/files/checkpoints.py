"""Checkpoints of a run: how they are written, read and how often, and whether one fits."""

from __future__ import annotations

import contextlib
import glob
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import lightning
import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.loops.fit_loop import _FitLoop
from packaging.version import InvalidVersion, Version
from torch import Tensor

from leakage.files.tensors import brief

# What Lightning takes for granted.
_PARTS: dict[str, type] = {
    "leakage": dict,
    "state_dict": dict,
    "hyper_parameters": dict,
    "callbacks": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}
_VERSION = "pytorch-lightning_version"
# Bytes up to which a tensor may hold one value in many places, as `expand` does it.
_EXPANDED = 2**26
# More than any run makes.
_MOST_STEPS = 2**40


def run_folder(trainer: Trainer) -> Path:
    """The folder of the first logger's run (``save_dir/name/version``), or ``default_root_dir`` without a logger."""
    for logger in trainer.loggers[:1]:
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir, str(logger.name or ""), version if logger.version is not None else "")
    return Path(trainer.default_root_dir)


def part_of(path: str | os.PathLike[str], process: int) -> Path:
    """The file of one process' part of a checkpoint: the path itself of the first, ``last.ckpt.1`` of the second."""
    return Path(path) if process == 0 else _beside(path, f".{process}")


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files of all processes but the first."""
    begin = _beside(path, ".")
    found = begin.parent.glob(f"{glob.escape(begin.name)}*")
    return sorted(part for part in found if part.name[len(begin.name) :].isdigit())


def _beside(path: str | os.PathLike[str], ending: str) -> Path:
    """A file that belongs to a checkpoint.

    Lightning takes all digits behind ``ckpt_`` in the names of a folder for versions of SLURM's ``hpc_ckpt_1.ckpt``.
    """
    path = Path(path)
    return path.with_name(path.name.replace("ckpt_", "part_") + ending)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads no code from one; a plugin of Lightning's Trainer.

    The disk needs room for two checkpoints, since one is replaced only when the next is whole.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write beside the earlier checkpoint, then replace it.

        Raises:
            OSError: the file can't be written; an earlier one is left as it was.
        """
        partial = _beside(path, f".{os.getpid()}.partial")  # no other process writes to this one
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            # Not by Lightning's way, which holds a second copy in memory and a third in the folder for temporary files.
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch has words of its own for a disk that is full
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(f"Expected to write the checkpoint '{path}', but got: {error}") from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, always as with ``weights_only``: it holds tensors and plain values.

        Raises:
            OSError: there is no such file, or it may not be read.
            ValueError: a file of another kind, empty, truncated or with a byte that has changed, or one that would
                take much more memory than disk.
        """
        wanted = f"Expected a whole checkpoint of leakage at '{path}', but got"
        if not Path(path).is_file():
            raise FileNotFoundError(f"{wanted} no such file.")
        try:
            with Path(path).open("rb") as file:
                checkpoint = _read(file, map_location)
        except _UnsoundError as error:
            raise ValueError(f"{wanted} {error}.") from error
        except PermissionError as error:
            raise OSError(f"{wanted}: {error}") from error
        # What a broken file raises depends on where it is broken, and torch's words advise to run its code.
        except Exception as error:
            raise ValueError(f"{wanted} a file that is truncated or of another kind.") from error
        if not isinstance(checkpoint, dict) or "leakage" not in checkpoint:
            raise ValueError(f"{wanted} a file of another kind.")
        for name, kind in _PARTS.items():
            if not isinstance(checkpoint.get(name, kind()), kind):
                raise ValueError(f"{wanted} one with {brief(repr(checkpoint[name]))} as {name!r}.")
        version = checkpoint.setdefault(_VERSION, lightning.__version__)  # by which Lightning knows what to migrate
        try:
            Version(version)
        except (TypeError, InvalidVersion) as error:
            raise ValueError(f"{wanted} one with {brief(repr(version))} as {_VERSION!r}.") from error
        return checkpoint


class _UnsoundError(Exception):
    """What is wrong with the contents of a checkpoint."""


def _read(file: BinaryIO, map_location: Callable[..., Any] | None) -> Any:
    """Tensors and plain values of an archive as torch writes it, whose bytes are those that were written."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size = sum(record.file_size for record in records)
        # torch packs nothing; what is packed, or in two records at once, could unfold to any size.
        if any(record.compress_type != zipfile.ZIP_STORED for record in records) or size > file.seek(0, os.SEEK_END):
            raise _UnsoundError("records that are packed or overlap")
        if (broken := archive.testzip()) is not None:  # torch does not look at the checksums
            raise _UnsoundError(f"one whose record {brief(broken)!r} has changed since it was written")
    file.seek(0)
    checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    _check_unfolded(checkpoint, size)
    return checkpoint


def _check_unfolded(value: Any, size: int) -> None:
    """Raise an error for what takes a file few bytes and a program many: shared parts again and again, expansion."""
    left, found = [value], 0
    while left:
        value = left.pop()
        found += 1
        if found > size:  # an item of its own takes at least a byte
            raise _UnsoundError("values that contain one another without end")
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type == "meta":
                raise _UnsoundError(f"a tensor of layout {value.layout} on {value.device}")
            needed = value.numel() * value.element_size()
            if needed > max(value.untyped_storage().nbytes(), _EXPANDED):
                raise _UnsoundError(f"a tensor {brief(tuple(value.shape))} that stands for {needed} bytes")


def check_checkpoint(checkpoint: Mapping[str, Any], module: str, options: Mapping[str, Any], precision: object) -> None:
    """Raise a ``ValueError`` unless the checkpoint is of this module, with these options, in this precision.

    Args:
        checkpoint: as Lightning hands it to ``on_load_checkpoint``.
        module: the name of the class.
        options: its hyper-parameters.
        precision: the Trainer's.
    """
    saved, stored = checkpoint.get("leakage"), checkpoint.get("hyper_parameters")
    if not isinstance(saved, Mapping) or saved.get("module") != module:
        found = brief(repr(saved.get("module"))).strip("'") if isinstance(saved, Mapping) else "another module"
        raise ValueError(f"Expected a checkpoint of {module}, but got one of {found}.")
    if not isinstance(stored, Mapping):
        raise ValueError(f"Expected a checkpoint with the configuration of {module}, but got {brief(repr(stored))}.")
    differing = {name: (stored.get(name), value) for name, value in options.items() if not _same(stored, name, value)}
    if differing:
        listed = ", ".join(f"{name}={brief(repr(old))} (now {new!r})" for name, (old, new) in differing.items())
        raise ValueError(f"Expected the configuration of the checkpoint, but got another: it has {listed}.")
    if saved.get("precision") != precision:
        raise ValueError(
            f"Expected the checkpoint's precision {brief(repr(saved.get('precision')))}, but got {precision!r}."
        )
    _check_lightning(checkpoint)


def _check_lightning(checkpoint: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` unless what Lightning restores, which it takes for granted, is as Lightning writes it."""
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        if name not in checkpoint:
            raise ValueError(f"Expected a checkpoint to go on from, with {name!r}, but got one without.")
    count = [len(checkpoint[name]) for name in ("optimizer_states", "lr_schedulers")]
    if count != [1, 0]:
        raise ValueError(f"Expected a checkpoint of one optimizer and no scheduler, but got {count[0]} and {count[1]}.")
    for name, state in checkpoint["callbacks"].items():
        if not isinstance(state, Mapping):
            raise ValueError(f"Expected a checkpoint with the state of {brief(name)}, but got {brief(repr(state))}.")
    if "loops" in checkpoint:
        found, like = checkpoint["loops"].get("fit_loop"), _FitLoop(cast(Trainer, None)).state_dict()
        # Lightning passes over what is missing here, for the sake of older checkpoints.
        like = {name: value for name, value in like.items() if not isinstance(found, Mapping) or name in found}
        _check_progress("loops/fit_loop", found, like)


def _check_progress(place: str, found: Any, like: Any) -> None:
    if isinstance(like, Mapping):
        if not isinstance(found, Mapping) or found.keys() != like.keys():
            names = brief(sorted(map(str, found))) if isinstance(found, Mapping) else brief(repr(found))
            raise ValueError(f"Expected {place!r} of a checkpoint with {sorted(like)}, but got {names}.")
        for name, value in like.items():
            _check_progress(f"{place}/{name}", found[name], value)
    elif type(found) is not type(like) or not 0 <= found < _MOST_STEPS:
        expected = "True or False" if isinstance(like, bool) else "a number of steps"
        raise ValueError(f"Expected {place!r} of a checkpoint as {expected}, but got {brief(repr(found))}.")


def _same(stored: Mapping[str, Any], name: str, value: object) -> bool:
    old = stored.get(name)
    return not isinstance(old, Tensor) and bool(old == value)


@contextlib.contextmanager
def restoring(what: str) -> Iterator[None]:
    """Turn every error within into a ``ValueError`` that tells which part of a checkpoint does not hold what it should.

    A checkpoint is read by code that takes its entries, their types and shapes for granted.

    Example:
        >>> with restoring("the lanes"):
        ...     {}["best_loss"]
        Traceback (most recent call last):
        ValueError: Expected the lanes of a checkpoint as leakage writes it, but got KeyError: 'best_loss'.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or (isinstance(error, ValueError) and str(error).startswith("Expected ")):
            raise
        raise ValueError(
            f"Expected {what} of a checkpoint as leakage writes it, but got {type(error).__name__}: {brief(error)}."
        ) from error


def check_like(what: str, found: Any, like: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` unless tensors have the names, types and shapes of others.

    Args:
        what: what they are called in the message.
        found: of the checkpoint.
        like: as the run would make them.

    Example:
        >>> check_like("the lanes", {"loss": torch.zeros(3)}, {"loss": torch.zeros(2)})
        Traceback (most recent call last):
        ValueError: Expected the lanes of a checkpoint with 'loss' (2,) torch.float32, but got (3,) torch.float32.
    """
    if not isinstance(found, Mapping) or found.keys() != like.keys():
        names = brief(sorted(map(str, found))) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"Expected {what} of a checkpoint with {sorted(like)}, but got {names}.")
    for name, tensor in like.items():
        other = found[name]
        expected = f"{tuple(tensor.shape)} {tensor.dtype}"
        got = f"{brief(tuple(other.shape))} {other.dtype}" if isinstance(other, Tensor) else type(other).__name__
        if got != expected:
            raise ValueError(f"Expected {what} of a checkpoint with {name!r} {expected}, but got {got}.")
