"""Several processes, on one machine or many: each attacks victims of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from leakage.files.checkpoints import part_of, parts_of


class VictimParallel(DDPStrategy):
    """The Trainer's strategy ``"victim_parallel"``: processes share the victims out among them, nothing is averaged.

    Processes are started as by ``DDPStrategy`` (by the Trainer itself, torchrun, SLURM, ...), on CPUs and GPUs, and
    agree only on when all victims are done. A checkpoint has a file for each process, ``last.ckpt`` and
    ``last.ckpt.1`` and so on; a run can be resumed from them by any number of processes.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(accelerator="cpu", devices=2, strategy="victim_parallel")  # doctest: +SKIP
    """

    def configure_ddp(self) -> None:
        """Nothing: no process' gradients are another one's."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write this process' part, beside the first one's: the loggers of the others may name other folders."""
        filepath = self.broadcast(os.fspath(filepath))
        self.checkpoint_io.save_checkpoint(checkpoint, part_of(filepath, self.global_rank), storage_options)

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove all parts."""
        if self.is_global_zero:
            for path in [Path(filepath), *parts_of(filepath)]:
                self.checkpoint_io.remove_checkpoint(path)


# By a name, as the command line can't tell an instance from a name.
StrategyRegistry.register("victim_parallel", VictimParallel, description=VictimParallel.__doc__, override=True)
