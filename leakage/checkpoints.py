"""Checkpoints of a run: how they are written, read and how often, and whether one fits."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from leakage.errors import check_positive

# Of Lightning's ModelCheckpoint: one file, `last.ckpt`, replaced every 200 passes of the optimizer.
CHECKPOINT: dict[str, Any] = {
    "filename": "last",
    "every_n_train_steps": 200,
    "save_on_train_epoch_end": False,
    "enable_version_counter": False,
}


class TimedCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` after a training step when some time has passed since the last, and at no other moment.

    For modules that step their optimizer themselves, Lightning's ``ModelCheckpoint`` heeds no ``train_time_interval``.

    Args:
        folder: where to, by default ``checkpoints`` in that of the first logger's run, or in the trainer's
            ``default_root_dir`` without a logger.
        seconds: between two checkpoints.

    Raises:
        ValueError: ``seconds`` that are not positive.
        OSError: in ``fit``, a checkpoint that can't be written; an earlier one is left as it was, where the Trainer has
            the plugin :class:`WholeCheckpointIO`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, seconds: float = 60.0) -> None:
        check_positive(seconds=seconds)
        self.folder = folder
        self.seconds = seconds
        self._last = math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, if it is time."""
        if trainer.strategy.broadcast(time.monotonic() - self._last >= self.seconds):
            folder = run_folder(trainer) / "checkpoints" if self.folder is None else Path(self.folder)
            trainer.save_checkpoint(folder / "last.ckpt")
            self._last = time.monotonic()


def run_folder(trainer: Trainer) -> Path:
    """The folder of the first logger's run (``save_dir/name/version``), or ``default_root_dir`` without a logger."""
    for logger in trainer.loggers[:1]:
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir, str(logger.name or ""), version if logger.version is not None else "")
    return Path(trainer.default_root_dir)


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
        partial = Path(f"{os.fspath(path)}.partial")
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
            partial.replace(path)
        except OSError as error:
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
            OSError: there is no such file, or it can't be read.
            ValueError: a file of another kind, empty or truncated.
        """
        wanted = f"Expected a whole checkpoint of leakage at '{path}', but got"
        if not Path(path).is_file():
            raise FileNotFoundError(f"{wanted} no such file.")
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except OSError as error:
            raise OSError(f"{wanted}: {error}") from error
        # What a broken file raises depends on where it is broken, and torch's words advise to run its code.
        except Exception as error:
            raise ValueError(f"{wanted} a file that is truncated or of another kind.") from error
        if not isinstance(checkpoint, dict) or "leakage" not in checkpoint:
            raise ValueError(f"{wanted} a file of another kind.")
        return checkpoint


def check_checkpoint(checkpoint: Mapping[str, Any], module: str, options: Mapping[str, Any], precision: object) -> None:
    """Raise a ``ValueError`` unless the checkpoint is of this module, with these options, in this precision.

    Args:
        checkpoint: as Lightning hands it to ``on_load_checkpoint``.
        module: the name of the class.
        options: its hyper-parameters.
        precision: the Trainer's.
    """
    saved = checkpoint.get("leakage")
    if saved is None or saved["module"] != module:
        raise ValueError(
            f"Expected a checkpoint of {module}, but got one of {saved['module'] if saved else 'another module'}."
        )
    stored = checkpoint["hyper_parameters"]
    differing = {name: (stored.get(name), value) for name, value in options.items() if stored.get(name) != value}
    if differing:
        listed = ", ".join(f"{name}={old!r} (now {new!r})" for name, (old, new) in differing.items())
        raise ValueError(f"Expected the configuration of the checkpoint, but got another: it has {listed}.")
    if saved["precision"] != precision:
        raise ValueError(f"Expected the checkpoint's precision {saved['precision']!r}, but got {precision!r}.")
