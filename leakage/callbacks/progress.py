"""Progress bars over a whole run, for attacks and other runs of a single epoch."""

from __future__ import annotations

import math
import sys
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar

if TYPE_CHECKING:
    from leakage.inversion.gradient_inversion import GradientInversion

# The return type of Lightning's `get_metrics`.
_Metrics = dict[str, int | str | float | dict[str, float]]
# Seconds between two updates: a training step takes a few milliseconds, and writing a line to the screen one.
_PAUSE = 0.1
# Seconds between two updates in a file or a pipe, where no update replaces the one before.
_PAUSE_IN_A_FILE = 30.0


class RunProgressBar(TQDMProgressBar):
    """Base class of progress bars over a run of a single epoch, which count other things than batches.

    A subclass implements what is counted and, in ``get_metrics``, the figures after the bar. The arguments are those of
    :class:`AttackProgressBar`.
    """

    unit: str

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, *, name: str = "") -> None:
        super().__init__(refresh_rate, process_position)
        self.name = name
        self._updated = -math.inf

    @abstractmethod
    def count(self, pl_module: LightningModule) -> tuple[int, int]:
        """Return how many are done, including those before a resume, and the total."""

    @property
    def train_description(self) -> str:
        """The text in front of the bar."""
        return self.name or self.unit.capitalize()

    def init_train_tqdm(self) -> Tqdm:
        """Create the bar, which starts at the current count: after a resume, that is not zero."""
        done, total = self.count(self.trainer.lightning_module)
        return Tqdm(
            desc=self.train_description,
            unit=f" {self.unit}",
            initial=done,
            total=total,
            position=2 * self.process_position,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the bar unchanged: the whole run is one epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar every ``refresh_rate`` steps."""
        due = self.is_enabled and (batch_idx + 1) % self.refresh_rate == 0
        # Like Lightning's bars, this one goes to standard output.
        pause = _PAUSE if sys.stdout.isatty() else _PAUSE_IN_A_FILE
        if due and time.monotonic() - self._updated >= pause:
            self.update(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the bar with the scores of the latest validation."""
        self.update(trainer, pl_module)

    def update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the bar now, if there is one."""
        bar = self._train_progress_bar
        if bar is None or bar.disable:
            return
        bar.n, _ = self.count(pl_module)
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.refresh()
        self._updated = time.monotonic()


class AttackProgressBar(RunProgressBar):
    """Progress bar with victims done, success so far, passes of the optimizer and victims still running.

    ``success`` is the mean success of the finished victims that validation has scored. If there
    are none (before the first validation, or without ground truth), the bar shows how many
    finished victims have ``converged`` by the attack's own objective instead.

    The bar stays on the screen when the run is over. The bars of validation epochs during ``fit`` are
    turned off, since they would only flicker.

    Args:
        refresh_rate: training steps between two updates, which are also at least 0.1 s apart; 0 turns
            off the bar. In a file or a pipe, updates are at least 30 s apart.
        process_position: number of lines to leave free above the bar.
        name: text in front of the bar, by default what it counts.
    """

    unit = "victims"

    def count(self, pl_module: LightningModule) -> tuple[int, int]:
        """Return the number of victims done and the total."""
        attack = cast("GradientInversion", pl_module)
        return attack.num_done, attack.expected_victims

    def init_sanity_tqdm(self) -> Tqdm:
        """Off."""
        return Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        """Create the validation bar: off during ``fit``, the usual one in ``trainer.validate``."""
        return Tqdm(disable=True) if self.trainer.state.fn == "fit" else super().init_validation_tqdm()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> _Metrics:
        """Return the figures shown after the bar."""
        attack = cast("GradientInversion", pl_module)
        success = [score.success for score in attack.scores.values() if score.final]
        metrics: _Metrics = {}
        if success:
            metrics["success"] = f"{100 * sum(success) / len(success):.1f} %"
        elif attack.num_done:
            metrics["converged"] = f"{100 * attack.num_converged / attack.num_done:.1f} %"
        metrics["iterations"] = attack.iteration
        metrics["running"] = attack.num_running
        return metrics

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update the bar with the new scores."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.update(trainer, pl_module)
