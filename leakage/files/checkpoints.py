"""Checkpoints of a run: writing, reading, and checking that a checkpoint fits the run."""

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

from leakage.files.tensors import shorten
from leakage.files.whole import beside, whole_file


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the first logger's run (``save_dir/name/version``), else ``default_root_dir``."""
    for logger in trainer.loggers[:1]:
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir, str(logger.name or ""), version if logger.version is not None else "")
    return Path(trainer.default_root_dir)


def part_of(path: str | os.PathLike[str], process: int) -> Path:
    """Return the file of a process's part of a checkpoint: ``path`` for the first, ``last.ckpt.1`` for the second."""
    return Path(path) if process == 0 else beside(path, f".{process}")


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoint files of all processes except the first."""
    begin = beside(path, ".")
    found = begin.parent.glob(f"{glob.escape(begin.name)}*")
    return sorted(part for part in found if part.name[len(begin.name) :].isdigit())


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes checkpoints atomically and never runs code when reading one.

    The disk needs room for two checkpoints, since one is replaced only when the next is complete.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a new file, then replace the earlier checkpoint with it.

        Raises:
            OSError: the file can't be written. An earlier checkpoint is left unchanged.
        """
        # Lightning's own method holds a second copy in memory and a third in the folder for temporary files.
        with whole_file(path) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # raised by torch when the disk is full
                raise OSError(str(error)) from error
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, always with ``weights_only``: it holds tensors and plain values.

        Raises:
            OSError: the file does not exist or can't be read.
            ValueError: the file is empty, truncated or of another kind.
        """
        wanted = f"Expected a whole checkpoint of leakage at '{path}', but got"
        if not Path(path).is_file():
            raise FileNotFoundError(f"{wanted} no such file.")
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except PermissionError as error:
            raise OSError(f"{wanted}: {error}") from error
        # The type of error depends on where the file is broken, and torch's message suggests running its code.
        except Exception as error:
            raise ValueError(f"{wanted} a file that is truncated or of another kind.") from error
        if not isinstance(checkpoint, dict) or "leakage" not in checkpoint:
            raise ValueError(f"{wanted} a file of another kind.")
        return checkpoint


def check_checkpoint(checkpoint: Mapping[str, Any], module: str, options: Mapping[str, Any], precision: object) -> None:
    """Raise a ``ValueError`` unless the checkpoint was made by this module with these options and this precision."""
    saved, stored = checkpoint.get("leakage", {}), checkpoint.get("hyper_parameters", {})
    if saved.get("module") != module:
        raise ValueError(f"Expected a checkpoint of {module}, but got one of {saved.get('module', 'another module')}.")
    differing = [name for name, value in options.items() if stored.get(name) != value]
    if differing:
        listed = ", ".join(f"{name}={shorten(repr(stored.get(name)))} (now {options[name]!r})" for name in differing)
        raise ValueError(f"Expected the configuration of the checkpoint, but got another: it has {listed}.")
    if saved.get("precision") != precision:
        raise ValueError(f"Expected the checkpoint's precision {saved.get('precision')!r}, but got {precision!r}.")
    if "optimizer_states" not in checkpoint:
        raise ValueError("Expected a checkpoint to resume from, but got one with weights only.")


@contextlib.contextmanager
def restoring(what: str) -> Iterator[None]:
    """Turn every error in the block into a ``ValueError`` that names the part of the checkpoint that is wrong.

    The code in the block may assume that all entries exist and have the right types and shapes.

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
            f"Expected {what} of a checkpoint as leakage writes it, but got {type(error).__name__}: {shorten(error)}."
        ) from error


def check_like(what: str, found: Any, like: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` unless the tensors of a checkpoint have the names, types and shapes of ``like``.

    Example:
        >>> check_like("the lanes", {"loss": torch.zeros(3)}, {"loss": torch.zeros(2)})
        Traceback (most recent call last):
        ValueError: Expected the lanes of a checkpoint with 'loss' (2,) torch.float32, but got (3,) torch.float32.
    """
    if not isinstance(found, Mapping) or found.keys() != like.keys():
        names = shorten(sorted(map(str, found))) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"Expected {what} of a checkpoint with {sorted(like)}, but got {names}.")
    for name, tensor in like.items():
        other = found[name]
        expected = f"{tuple(tensor.shape)} {tensor.dtype}"
        got = f"{shorten(tuple(other.shape))} {other.dtype}" if isinstance(other, Tensor) else type(other).__name__
        if got != expected:
            raise ValueError(f"Expected {what} of a checkpoint with {name!r} {expected}, but got {got}.")
