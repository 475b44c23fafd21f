"""One bar over a whole run: the victims of an attack, or whatever else a run counts."""

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

# Of `get_metrics` in Lightning.
_Metrics = dict[str, int | str | float | dict[str, float]]
# Seconds between two updates: a training step takes a few milliseconds, a line on the screen one.
_PAUSE = 0.1
# The same where the bar goes to a file or a pipe, in which no update replaces the one before.
_PAUSE_IN_A_FILE = 30.0


class RunProgressBar(TQDMProgressBar):
    """One bar over a run of a single epoch, which counts what the module counts rather than batches.

    A subclass says what is counted, and in ``get_metrics`` what is told behind the bar; its arguments are those of
    :class:`AttackProgressBar`.
    """

    unit: str

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, *, name: str = "") -> None:
        super().__init__(refresh_rate, process_position)
        self.name = name
        self._told = -math.inf

    @abstractmethod
    def count(self, pl_module: LightningModule) -> tuple[int, int]:
        """How many are done, also before this run was resumed, and of how many."""

    @property
    def train_description(self) -> str:
        """What stands before the bar."""
        return self.name or self.unit.capitalize()

    def init_train_tqdm(self) -> Tqdm:
        """The bar over the run, which starts where the run stands: after a resume that is not zero."""
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
        """Keep the bar as it is: all that it counts belongs to one epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell how far it is, every ``refresh_rate`` steps."""
        due = self.is_enabled and (batch_idx + 1) % self.refresh_rate == 0
        # The bar goes where Lightning's do, to standard output.
        pause = _PAUSE if sys.stdout.isatty() else _PAUSE_IN_A_FILE
        if due and time.monotonic() - self._told >= pause:
            self.tell(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell how far it is, with the scores of the validation just before."""
        self.tell(trainer, pl_module)

    def tell(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell now how far it is, if there is a bar."""
        bar = self._train_progress_bar
        if bar is None or bar.disable:
            return
        bar.n, _ = self.count(pl_module)
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.refresh()
        self._told = time.monotonic()


class AttackProgressBar(RunProgressBar):
    """Victims done of all victims, the success so far, the optimizer's passes and the victims still running.

    ``success`` is the mean success of the finished victims that validation has scored. As long as there
    are none (before the first validation, or without ground truth) the bar tells instead how many
    finished victims ``converged`` by the attack's own objective.

    The bar stays on the screen when the run is over. The bars of validation epochs during ``fit`` are
    off, since they would only flicker.

    Args:
        refresh_rate: training steps between two updates, which are also at least 0.1 s apart; 0 turns
            the bar off. In a file or a pipe they are at least 30 s apart.
        process_position: lines to leave free above the bar.
        name: what stands before the bar, by default what it counts.
    """

    unit = "victims"

    def count(self, pl_module: LightningModule) -> tuple[int, int]:
        """Victims done, and all of them."""
        attack = cast("GradientInversion", pl_module)
        return attack.num_done, attack.expected_victims

    def init_sanity_tqdm(self) -> Tqdm:
        """Off."""
        return Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        """Off during ``fit``, the usual one in ``trainer.validate``."""
        return Tqdm(disable=True) if self.trainer.state.fn == "fit" else super().init_validation_tqdm()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> _Metrics:
        """What is told behind the bar."""
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
        """Tell the new scores."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.tell(trainer, pl_module)
