"""A callback that tests the synthetic images during a condensation."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from leakage.callbacks.condensation import CondensationCallback, as_condensation
from leakage.callbacks.progress import RunProgressBar
from leakage.condensation.augmentation import SiameseAugmentation
from leakage.condensation.condensation import Condensation
from leakage.condensation.evaluation import Evaluation, evaluate
from leakage.condensation.networks import check_network
from leakage.condensation.training import evaluation_options
from leakage.datamodules.labelled import LabelledImages
from leakage.errors import check_count
from leakage.files.text import write_csv
from leakage.plots import plot_accuracy, save_figure

# The columns of the curve: iteration, mean, and the ends of its interval.
_CURVE = ("iteration", "accuracy_mean", "accuracy_low", "accuracy_high")


@dataclass(frozen=True)
class AccuracyRow:
    """The result of one evaluation during a run.

    Attributes:
        iteration: number of completed iterations.
        step: number of completed training steps; an iteration has one or several.
        accuracies: accuracy of each network, from 0 to 1.
        seconds: time spent on the condensation so far, without evaluations.
        evaluation_seconds: time spent on evaluations so far, including this one.
    """

    iteration: int
    step: int
    accuracies: tuple[float, ...]
    seconds: float
    evaluation_seconds: float

    @property
    def evaluation(self) -> Evaluation:
        """The accuracies with their mean, standard deviation and interval."""
        return Evaluation(torch.tensor(self.accuracies, dtype=torch.float64))

    @property
    def accuracy_mean(self) -> float:
        """Mean over the networks, from 0 to 1."""
        return self.evaluation.mean

    def columns(self) -> dict[str, float]:
        """Return the row of ``accuracy.csv``, by column."""
        found = self.evaluation
        low, high = found.interval
        return {
            "iteration": self.iteration,
            "step": self.step,
            "accuracy_mean": found.mean,
            "accuracy_std": found.std,
            "accuracy_low": low,
            "accuracy_high": high,
            "networks": found.networks,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
        }


class SyntheticEvaluation(CondensationCallback):
    """Train new networks on a copy of the synthetic images at chosen iterations and at the end, and test them.

    Each test is :func:`leakage.condensation.evaluate` on the whole test set. Its time counts
    as ``condensation.seconds["evaluation"]``. It does not affect the run: without this callback
    the images are the same bit for bit. A run that is interrupted or fails is not tested at its end.

    It rewrites these files in ``output`` after each test:

    - ``accuracy.csv`` with a row for each test: ``iteration``; ``step``, the number of completed training steps;
      ``accuracy_mean``, ``accuracy_std``, and ``accuracy_low`` and ``accuracy_high``, the ends of the 95 % interval of
      the mean, from 0 to 1; ``networks``; ``seconds`` of condensing and ``evaluation_seconds``, both since the start;
    - ``accuracy.png``, the curve over iterations.

    The loggers get ``eval/accuracy``, ``eval/accuracy_low``, ``eval/accuracy_high``, ``eval/accuracy_std``,
    ``eval/networks`` and ``time/evaluation``, with the number of completed training steps as the step.

    Checkpoints contain the rows: a resumed run neither repeats nor loses a row, and ends with the same
    accuracies. If the training of a network diverges, there is a warning and no row; if that happens in the last
    test, :attr:`last` raises at the end of the run.

    Attributes:
        rows: the result of each test, in order.
        evaluating: whether a test is in progress.

    Args:
        at: numbers of completed iterations at which to test; 0 is the start. The end of the run is always included.
        output: the folder, see :class:`~leakage.callbacks.ResultsCallback`.
        networks: number of networks trained for one test.
        epochs: number of training epochs of each network, see :func:`~leakage.condensation.evaluate`.
        network: architecture of these networks; by default that of the condensation.
        augmentation: augmentation of the synthetic images in training, see :func:`~leakage.condensation.evaluate`.
        seed: seed of all random numbers, the same for each test.
        precision: precision of the training.
        stacked: whether to train all networks at once; by default where that is faster.

    Raises:
        ValueError: an option is out of range; in ``fit``, the module is not a
            :class:`~leakage.condensation.Condensation`, or the network does not fit the data.
        OSError: the folder can't be written, or files are missing at the end.
    """

    files = ("accuracy.csv", "accuracy.png")

    def __init__(
        self,
        at: Sequence[int] = (0, 10, 20, 50, 100, 200, 500, 1000),
        *,
        output: str | os.PathLike[str] | None = None,
        networks: int = 10,
        epochs: int | None = None,
        network: nn.Module | None = None,
        augmentation: SiameseAugmentation | str | None = "dc",
        seed: int = 0,
        precision: str = "32-true",
        stacked: bool | None = None,
    ) -> None:
        super().__init__(output, at, "at")
        check_count(networks=networks)
        # Refuse options out of range now, not at the first test.
        training: dict[str, Any] = {"augmentation": augmentation, "seed": seed, "precision": precision}
        evaluation_options("", epochs, **training)
        if network is not None and not isinstance(network, nn.Module):
            raise ValueError(f"Expected `network` to be a torch.nn.Module, but got {type(network).__name__}.")
        self.network = network
        self.evaluating = False
        self.rows: list[AccuracyRow] = []
        self._options: dict[str, Any] = {
            "networks": networks, "epochs": epochs, "stacked": stacked, **training,
        }  # fmt: skip
        self._failed_at, self._failure = -1, ""

    @property
    def last(self) -> Evaluation:
        """The result of the latest test; after a complete ``fit``, that of the final images.

        Raises:
            FloatingPointError: the test failed because the training of a network diverged. The results of earlier
                tests are in :attr:`rows`.
            RuntimeError: there has been no test yet.
        """
        if self._failure:
            raise FloatingPointError(self._failure)
        if not self.rows:
            raise RuntimeError("Expected at least one completed test, but got none yet.")
        return self.rows[-1].evaluation

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as plain numbers."""
        return {"rows": [asdict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows from a checkpoint."""
        self.rows = [AccuracyRow(**row) for row in state_dict["rows"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module, that the network fits the data, and that the output folder can be written to."""
        super().setup(trainer, pl_module, stage)
        # The rows of a checkpoint are loaded after this.
        self.rows, self._failed_at, self._failure, self.evaluating = [], -1, "", False
        # With other data, the module, which is set up next, raises the error.
        data = getattr(trainer, "datamodule", None)
        if self.network is not None and isinstance(data, LabelledImages):
            check_network(self.network, data)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Try again to write files that could not be written before."""
        if self._begun and self._failures:
            self._write_all(as_condensation(self, pl_module))

    def look(self, trainer: Trainer, condensation: Condensation, *, last: bool) -> None:
        """Test the current images, unless they have been tested already."""
        tested = [self._failed_at, *(row.step for row in self.rows[-1:])]
        if condensation.step not in tested:
            self.evaluating = True
            self._tell(trainer, condensation)
            try:
                self._test(trainer, condensation)
            finally:
                self.evaluating = False
            self._tell(trainer, condensation)
            self._write_all(condensation)
        elif last and (self._failures or not (self.folder / "accuracy.csv").exists()):
            self._write_all(condensation)

    def _test(self, trainer: Trainer, condensation: Condensation) -> None:
        """Add and log a row, unless training a network fails."""
        try:
            with condensation.clock("evaluation"):
                evaluation = evaluate(
                    condensation.synthetic_set(),
                    cast(LabelledImages, trainer.datamodule),  # type: ignore[attr-defined]
                    network=condensation.network if self.network is None else self.network,
                    device=trainer.strategy.root_device,
                    progress=False,
                    **self._options,
                )
        except FloatingPointError as error:
            self._failure = f"The images after {condensation.iteration} iterations could not be tested: {error}"
            self._failed_at = condensation.step
            rank_zero_warn(self._failure)
            return
        self._failure = ""
        spent = condensation.seconds
        row = AccuracyRow(
            iteration=condensation.iteration,
            step=condensation.step,
            accuracies=tuple(evaluation.accuracies.tolist()),
            seconds=math.fsum(seconds for part, seconds in spent.items() if part != "evaluation"),
            evaluation_seconds=spent["evaluation"],
        )
        self.rows.append(row)
        found = row.columns()
        metrics = {"eval/accuracy": found["accuracy_mean"], "time/evaluation": found["evaluation_seconds"]}
        for name in ("accuracy_low", "accuracy_high", "accuracy_std", "networks"):
            metrics[f"eval/{name}"] = float(found[name])
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=row.step)

    def _tell(self, trainer: Trainer, condensation: Condensation) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, RunProgressBar):
            bar.update(trainer, condensation)

    def _write_all(self, condensation: Condensation) -> None:
        if not self.rows:
            return
        self._remove_earlier()
        rows = [row.columns() for row in self.rows]
        values = [list(row.values()) for row in rows]
        self._write(self.folder / "accuracy.csv", lambda path: write_csv(path, list(rows[0]), values))
        curve = torch.tensor([[row[column] for column in _CURVE] for row in rows], dtype=torch.float64)
        per_class = int(condensation.hparams["images_per_class"])
        figure = plot_accuracy(
            {"synthetic images": curve},
            title=f"{condensation.synthetic_set().dataset}: {per_class} image{'s' * (per_class > 1)} per class",
        )
        self._write(self.folder / "accuracy.png", lambda path: save_figure(figure, path))


def read_accuracies(path: str | os.PathLike[str]) -> Tensor:
    """Read the curve in an ``accuracy.csv`` for :func:`~leakage.plots.plot_accuracy`.

    Returns:
        ``(P, 4)``: iteration, mean accuracy, and the ends of its interval, from 0 to 1.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another kind.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    try:
        columns = [rows[0].index(column) for column in _CURVE]
        return torch.tensor([[float(row[column]) for column in columns] for row in rows[1:]], dtype=torch.float64)
    except (IndexError, ValueError) as error:
        raise ValueError(f"Expected an `accuracy.csv` of SyntheticEvaluation, but got '{path}': {error}") from error
