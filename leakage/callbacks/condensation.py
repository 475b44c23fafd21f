"""Shared code of the callbacks of a condensation: when they run, and the files of an earlier run."""

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
    """Base class of callbacks that look at the synthetic images at chosen iterations and at the end of a run.

    A subclass implements :meth:`look`. It is called after the training step that completes a chosen
    iteration, before Lightning's checkpoints of that step; before the first step and after a resume, if the
    current iteration is a chosen one; and when the run is over, wherever it ended.

    Args:
        output: the folder, see :class:`~leakage.callbacks.ResultsCallback`.
        moments: the chosen iterations, as numbers of completed iterations; 0 is before the first.
        name: name of the argument ``moments`` in the subclass, for error messages.

    Raises:
        ValueError: ``moments`` are not whole numbers of at least 0; in ``fit``, the module is not a
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
        """Do the work of this callback with the current images.

        Args:
            trainer: the Trainer.
            condensation: the module, at the end of an iteration; if ``last``, wherever the run has ended.
            last: whether the run is over. May be true several times.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module is a condensation, find the output folder and check that it can be written to."""
        as_condensation(self, pl_module)
        super().setup(trainer, pl_module, stage)
        self._earlier, self._begun = [], False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn about earlier results that this run will replace, and look if the current iteration is a chosen one."""
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
        """Look if a chosen iteration is complete."""
        if trainer.is_global_zero:
            self._look_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look one last time."""
        if trainer.is_global_zero:
            self.look(trainer, as_condensation(self, pl_module), last=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more, since resuming a complete run does no training, and report files that were not written."""
        if trainer.is_global_zero:
            self.look(trainer, as_condensation(self, pl_module), last=True)
        super().on_fit_end(trainer, pl_module)

    def _look_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        condensation = as_condensation(self, pl_module)
        # Also after the last iteration, so that the checkpoint of that step includes it.
        chosen = condensation.iteration in self.moments or condensation.iteration >= condensation.protocol.iterations
        if between_iterations(condensation) and chosen:
            self.look(trainer, condensation, last=False)

    def _remove_earlier(self) -> None:
        """Remove the results of an earlier run once this run has results."""
        for path in self._earlier:
            self._write(path, lambda path: path.unlink(missing_ok=True))
        self._earlier = []


def as_condensation(callback: object, pl_module: LightningModule) -> Condensation:
    """Return the module as a condensation; raise a ``ValueError`` if it is another module."""
    if not isinstance(pl_module, Condensation):
        raise ValueError(f"Expected {type(callback).__name__} with a condensation, but got {type(pl_module).__name__}.")
    return pl_module


def between_iterations(condensation: Condensation) -> bool:
    """Return whether an iteration is complete and the next has not begun."""
    # The images change within a step, and the step is counted only when it is complete.
    return not condensation.within_step and condensation.step == condensation.iteration * condensation.outer
