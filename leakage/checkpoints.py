"""Checkpoints of a running attack: how they are written, read and how often, and whether one fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

# Of Lightning's ModelCheckpoint: one file, `last.ckpt`, replaced every 200 passes of the optimizer.
CHECKPOINT: dict[str, Any] = {
    "filename": "last",
    "every_n_train_steps": 200,
    "save_on_train_epoch_end": False,
    "enable_version_counter": False,
}


class AttackCheckpointIO(TorchCheckpointIO):
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
        """Read a checkpoint of an attack, always as with ``weights_only``: it holds tensors and plain values.

        Raises:
            OSError: there is no such file, or it can't be read.
            ValueError: a file of another kind, empty or truncated.
        """
        wanted = f"Expected a whole checkpoint of an attack at '{path}', but got"
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


def check_checkpoint(checkpoint: Mapping[str, Any], attack: str, options: Mapping[str, Any], precision: object) -> None:
    """Raise a ``ValueError`` unless the checkpoint is of this attack, with these options, in this precision.

    Args:
        checkpoint: as Lightning hands it to ``on_load_checkpoint``.
        attack: the name of the attack's class.
        options: its hyper-parameters.
        precision: the Trainer's.
    """
    saved = checkpoint.get("leakage")
    if saved is None or saved["attack"] != attack:
        raise ValueError(
            f"Expected a checkpoint of {attack}, but got one of {saved['attack'] if saved else 'another module'}."
        )
    stored = checkpoint["hyper_parameters"]
    differing = {name: (stored.get(name), value) for name, value in options.items() if stored.get(name) != value}
    if differing:
        listed = ", ".join(f"{name}={old!r} (now {new!r})" for name, (old, new) in differing.items())
        raise ValueError(f"Expected the configuration of the checkpoint, but got another: it has {listed}.")
    if saved["precision"] != precision:
        raise ValueError(f"Expected the checkpoint's precision {saved['precision']!r}, but got {precision!r}.")
