"""Send pictures, tables and files to the loggers that accept them; a W&B logger that works without its server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

# The maximum length of the name of an artifact.
_LONGEST_NAME = 128


class OfflineSafeWandbLogger(WandbLogger):
    """A ``WandbLogger`` that continues offline where the standard one ends the run.

    The standard logger raises at the start of ``fit`` if there is neither an account nor a terminal,
    and, after a minute and a half, if the server can't be reached. If the server becomes unreachable
    later, the process waits for it at the end without limit. This logger
    writes the run to ``save_dir`` instead (``wandb sync`` uploads it) and stops waiting after a time limit. If W&B
    is offline by choice (``offline=True``, ``WANDB_MODE=offline``), the two loggers behave the same.

    Args:
        start_timeout: seconds to wait for the server at the start; W&B's own default is 90.
        finish_timeout: seconds to wait for uploads at the end. Data that is not uploaded stays on disk.
        **kwargs: arguments of ``WandbLogger``.

    Raises:
        ModuleNotFoundError: ``wandb`` is not installed.
    """

    def __init__(self, *, start_timeout: float = 20.0, finish_timeout: float = 60.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        import wandb

        limits = wandb.Settings(init_timeout=start_timeout, finish_timeout=finish_timeout)
        self._wandb_init.setdefault("settings", limits)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, created on first use."""
        import wandb

        try:
            return super().experiment
        except (wandb.errors.CommError, wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            rank_zero_warn(
                f"W&B can't be used online ({str(error).splitlines()[0]}). The run is logged offline; "
                "`wandb sync` uploads it later. Set WANDB_MODE=offline to skip the attempt."
            )
            self._wandb_init["mode"] = "offline"
            return super().experiment


def log_image(
    trainer: Trainer, key: str, pixels: NDArray[np.uint8], *, caption: str = "", step: int | None = None
) -> None:
    """Send a picture ``(height, width, 3)`` of values from 0 to 255 to every logger that accepts pictures.

    The default step is the trainer's ``global_step``, which counts optimizer steps. The curves of a module's
    ``self.log`` are over training steps, each of which may contain several optimizer steps.
    """
    step = trainer.global_step if step is None else step
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [pixels], step=step, caption=[caption])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, pixels, step, dataformats="HWC")


def log_table(trainer: Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Send a table to W&B, the only logger that accepts one; arrays in it are shown as pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            data = [[wandb.Image(value) if isinstance(value, np.ndarray) else value for value in row] for row in rows]
            logger.log_table(key, columns=list(columns), data=data, step=trainer.global_step)


def log_artifact(
    trainer: Trainer, name: str, paths: Sequence[Path], *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Send files, each under its own name, to W&B, the only logger that accepts them.

    They form a version of one artifact of type ``dataset``. Characters that W&B does not allow in a name become ``_``.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            allowed = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_LONGEST_NAME]
            artifact = wandb.Artifact(allowed, type="dataset", metadata=dict(metadata or {}))
            for path in paths:
                artifact.add_file(str(path), name=path.name)
            logger.experiment.log_artifact(artifact)
