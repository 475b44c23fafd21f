"""Checkpoints of a run: how they are written, read and how often, and whether one fits."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from leakage.files.tensors import brief
from leakage.files.whole import beside, whole_file


def run_folder(trainer: Trainer) -> Path:
    """The folder of the first logger's run (``save_dir/name/version``), or ``default_root_dir`` without a logger."""
    for logger in trainer.loggers[:1]:
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir, str(logger.name or ""), version if logger.version is not None else "")
    return Path(trainer.default_root_dir)


def part_of(path: str | os.PathLike[str], process: int) -> Path:
    """The file of one process' part of a checkpoint: the path itself of the first, ``last.ckpt.1`` of the second."""
    return Path(path) if process == 0 else beside(path, f".{process}")


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files of all processes but the first."""
    begin = beside(path, ".")
    found = begin.parent.glob(f"{glob.escape(begin.name)}*")
    return sorted(part for part in found if part.name[len(begin.name) :].isdigit())


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
        # Not by Lightning's way, which holds a second copy in memory and a third in the folder for temporary files.
        with whole_file(path) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch has words of its own for a disk that is full
                raise OSError(str(error)) from error
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, always as with ``weights_only``: it holds tensors and plain values.

        Raises:
            OSError: there is no such file, or it may not be read.
            ValueError: a file of another kind, empty or truncated.
        """
        wanted = f"Expected a whole checkpoint of leakage at '{path}', but got"
        if not Path(path).is_file():
            raise FileNotFoundError(f"{wanted} no such file.")
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except PermissionError as error:
            raise OSError(f"{wanted}: {error}") from error
        # What a broken file raises depends on where it is broken, and torch's words advise to run its code.
        except Exception as error:
            raise ValueError(f"{wanted} a file that is truncated or of another kind.") from error
        if not isinstance(checkpoint, dict) or "leakage" not in checkpoint:
            raise ValueError(f"{wanted} a file of another kind.")
        return checkpoint


def check_checkpoint(checkpoint: Mapping[str, Any], module: str, options: Mapping[str, Any], precision: object) -> None:
    """Raise a ``ValueError`` unless the checkpoint is of this module, with these options, in this precision."""
    saved, stored = checkpoint.get("leakage", {}), checkpoint.get("hyper_parameters", {})
    if saved.get("module") != module:
        raise ValueError(f"Expected a checkpoint of {module}, but got one of {saved.get('module', 'another module')}.")
    differing = [name for name, value in options.items() if stored.get(name) != value]
    if differing:
        listed = ", ".join(f"{name}={brief(repr(stored.get(name)))} (now {options[name]!r})" for name in differing)
        raise ValueError(f"Expected the configuration of the checkpoint, but got another: it has {listed}.")
    if saved.get("precision") != precision:
        raise ValueError(f"Expected the checkpoint's precision {saved.get('precision')!r}, but got {precision!r}.")
    if "optimizer_states" not in checkpoint:
        raise ValueError("Expected a checkpoint to go on from, but got one of weights only.")


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
    """Raise a ``ValueError`` unless a checkpoint's tensors have the names, types and shapes of others.

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
