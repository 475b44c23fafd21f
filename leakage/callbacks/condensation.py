"""What the callbacks of a condensation have in common: the iterations, and the files of an earlier run."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from leakage.callbacks.results import ResultsCallback
from leakage.condensation.condensation import Condensation
from leakage.errors import check_count


class CondensationCallback(ResultsCallback, ABC):
    """A callback that looks at the synthetic images of a condensation at chosen iterations, and at the end.

    A subclass says in :meth:`look` what it does then. That happens after a training step has completed an
    iteration, before Lightning's checkpoints of that step; before the first step and after a resume, if the
    iteration is a chosen one; and when the run is over, wherever it ended.

    Args:
        output: the folder, see :class:`~leakage.callbacks.ResultsCallback`.
        moments: numbers of completed iterations; 0 is before the first.

    Raises:
        ValueError: moments that are not whole numbers of at least 0; in ``fit``, a module that is no
            :class:`~leakage.condensation.Condensation`.
        OSError: the folder can't be written, or files are missing at the end.
    """

    def __init__(self, output: str | os.PathLike[str] | None, moments: Sequence[int], name: str) -> None:
        super().__init__(output)
        if not isinstance(moments, Sequence):
            raise ValueError(f"Expected `{name}` as a list of whole numbers, but got {moments!r}.")
        for moment in moments:
            check_count(0, **{name: moment})
        self.moments = sorted(set(moments))
        self._earlier: list[Path] = []
        self._begun = False

    @abstractmethod
    def look(self, trainer: Trainer, condensation: Condensation, *, last: bool) -> None:
        """Do what this callback is for with the images as they are now.

        Args:
            trainer: at work.
            condensation: at the end of an iteration; if ``last``, wherever the run has ended.
            last: the run is over; may be true several times.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules, find the folder and try to write there."""
        as_condensation(self, pl_module)
        super().setup(trainer, pl_module, stage)
        self._earlier, self._begun = [], False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of results that this run will replace as soon as it has its first, and look."""
        if not trainer.is_global_zero:
            return
        patterns = self.files if trainer.ckpt_path is None else ()
        self._earlier = sorted(path for pattern in patterns for path in self.folder.glob(pattern))
        if self._earlier:
            rank_zero_warn(
                f"'{self.folder}' holds the results of an earlier run, which this one replaces ('"
                f"{self._earlier[0].relative_to(self.folder)}' is one). Resume the earlier one with `ckpt_path`, or "
                f"give {type(self).__name__} another `output`."
            )
        self._begun = True
        self._look_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if an iteration is complete."""
        if trainer.is_global_zero:
            self._look_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look a last time."""
        if trainer.is_global_zero:
            self.look(trainer, as_condensation(self, pl_module), last=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, as a resumed run that was complete has no training; tell what could not be written."""
        if trainer.is_global_zero:
            self.look(trainer, as_condensation(self, pl_module), last=True)
        super().on_fit_end(trainer, pl_module)

    def _look_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        condensation = as_condensation(self, pl_module)
        # After the last iteration as well, so that the checkpoint made then knows of it.
        chosen = condensation.iteration in self.moments or condensation.iteration >= condensation.protocol.iterations
        if between_iterations(condensation) and chosen:
            self.look(trainer, condensation, last=False)

    def _remove_earlier(self) -> None:
        """Remove the results of an earlier run, now that this one has some."""
        for path in self._earlier:
            self._write(path, lambda path: path.unlink(missing_ok=True))
        self._earlier = []


def as_condensation(callback: object, pl_module: LightningModule) -> Condensation:
    """The module of a callback that works with nothing else; a ``ValueError`` if it is another."""
    if not isinstance(pl_module, Condensation):
        raise ValueError(f"Expected {type(callback).__name__} with a condensation, but got {type(pl_module).__name__}.")
    return pl_module


def between_iterations(condensation: Condensation) -> bool:
    """Whether an iteration is complete and the next has not begun."""
    # The images move within a step, which counts only when it is done.
    return not condensation.within_step and condensation.step == condensation.iteration * condensation.outer
