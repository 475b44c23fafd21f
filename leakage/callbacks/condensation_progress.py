"""The progress bar of a condensation, and a summary of where its time went."""

from __future__ import annotations

import sys

from lightning import LightningModule, Trainer

from leakage.callbacks.condensation import as_condensation
from leakage.callbacks.condensation_evaluation import SyntheticEvaluation
from leakage.callbacks.progress import RunProgressBar
from leakage.condensation.condensation import Condensation

# The names of the parts of `condensation.seconds` in the last line.
_PARTS = {
    "real": "real images",
    "synthetic": "synthetic images",
    "network": "networks",
    "evaluation": "evaluation",
}


class CondensationProgressBar(RunProgressBar):
    """Progress bar with the iterations done, the matching loss, real images per second and the last accuracy.

    ``step`` counts the steps within an iteration that has several. ``accuracy`` is shown if a
    :class:`~leakage.callbacks.SyntheticEvaluation` has run. When the run is over, for whatever reason, a
    line under the bar shows what the time was spent on, including the time before a resume.

    Args:
        refresh_rate: training steps between two updates, which are also at least 0.1 s apart; 0 turns
            off the bar and the line. In a file or a pipe, updates are at least 30 s apart.
        process_position: number of lines to leave free above the bar.
        name: text in front of the bar, by default ``Iterations``.

    Raises:
        ValueError: in ``fit``, the module is not a :class:`~leakage.condensation.Condensation`.
    """

    unit = "iterations"

    def count(self, pl_module: LightningModule) -> tuple[int, int]:
        """Return the number of iterations done and the total."""
        condensation = as_condensation(self, pl_module)
        return condensation.iteration, condensation.protocol.iterations

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the figures shown after the bar."""
        condensation = as_condensation(self, pl_module)
        metrics: dict[str, int | str | float | dict[str, float]] = {}
        within = condensation.step % condensation.outer
        if within:
            metrics["step"] = f"{within}/{condensation.outer}"
        if condensation.step:
            metrics["loss"] = f"{condensation.last_loss:.4g}"
            metrics["images/s"] = f"{condensation.images_per_second:.0f}"
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SyntheticEvaluation):
                if callback.rows:
                    metrics["accuracy"] = f"{100 * callback.rows[-1].accuracy_mean:.1f} %"
                if callback.evaluating:
                    metrics["now"] = "evaluating"
        return metrics

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module is a condensation."""
        as_condensation(self, pl_module)
        super().setup(trainer, pl_module, stage)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the time was spent on."""
        self._tell_time(as_condensation(self, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print what the time was spent on, if training had begun."""
        if self._train_progress_bar is not None and isinstance(pl_module, Condensation):
            self.train_progress_bar.close()
            self._tell_time(pl_module)

    def _tell_time(self, condensation: Condensation) -> None:
        total = sum(condensation.seconds.values())
        if self.is_enabled and total:
            parts = ", ".join(
                f"{_PARTS[part]} {seconds:.1f} s ({100 * seconds / total:.0f} %)"
                for part, seconds in condensation.seconds.items()
            )
            sys.stdout.write(f"Time: {parts}; {condensation.images_per_second:.0f} real images per second\n")
