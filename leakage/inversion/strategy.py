"""Strategy for several processes, on one machine or many, each of which attacks its own victims."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from leakage.files.checkpoints import part_of, parts_of


class VictimParallel(DDPStrategy):
    """The Trainer's strategy ``"victim_parallel"``: victims are divided among processes, nothing is averaged.

    Processes are started as with ``DDPStrategy`` (by the Trainer, torchrun, SLURM, ...), on CPUs or GPUs. They
    synchronise only to determine when all victims are done. A checkpoint has one file for each process (``last.ckpt``,
    ``last.ckpt.1``, ...). A run can be resumed from these files with any number of processes.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy="victim_parallel")  # doctest: +SKIP
    """

    def configure_ddp(self) -> None:
        """Do nothing: processes do not share gradients."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write this process' part beside the first one's: the loggers of the others may name other folders."""
        filepath = self.broadcast(os.fspath(filepath))
        self.checkpoint_io.save_checkpoint(checkpoint, part_of(filepath, self.global_rank), storage_options)

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove all parts of a checkpoint."""
        if self.is_global_zero:
            for path in [Path(filepath), *parts_of(filepath)]:
                self.checkpoint_io.remove_checkpoint(path)


# Registered by name, because the command line cannot take an instance here.
StrategyRegistry.register("victim_parallel", VictimParallel, description=VictimParallel.__doc__, override=True)
