"""A callback that writes a row per victim and the reconstructions while a run goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor, tensor

from leakage.callbacks.loggers import log_table
from leakage.callbacks.results import VictimResultsCallback
from leakage.datamodules.base import GroundTruth
from leakage.files.text import write_csv
from leakage.inversion.reconstruction import Reconstruction
from leakage.plots import to_pixels
from leakage.solvers import STATUS

if TYPE_CHECKING:
    from leakage.inversion.gradient_inversion import GradientInversion

COLUMNS = (
    "victim", "labels_true", "labels_recovered", "label_accuracy", "mse", "psnr", "ssim", "success",
    "loss", "iterations", "evaluations", "restarts", "status", "learning_rate",
)  # fmt: skip

# Files are written when this many more victims are done, and this share of those done before: `victims.csv` is
# rewritten each time, so this keeps the total amount of writing proportional to the number of victims.
_PER_FILE, _GROWTH = 256, 8
# Each picture takes about 1 kB in W&B's table, whose viewer is slow with thousands of them.
_ROWS_WITH_IMAGES = 100


class VictimTable(VictimResultsCallback):
    """Write the result of each victim while the run goes on and when it ends, for whatever reason it ends.

    Files in ``output``:

    - ``victims.csv``, one row per finished victim, in the order in which they finished: ``victim`` (its
      number), ``labels_true`` and ``labels_recovered`` (in ascending order, separated by spaces),
      ``label_accuracy`` (0 to 1), ``mse``, ``psnr`` (dB), ``ssim`` (means over the
      victim's images), ``success`` (share of its images under the threshold), ``loss`` (the attack's
      own objective), ``iterations``, ``evaluations``, ``restarts``, ``status`` and ``learning_rate`` (that
      of the client's local steps as the attack found it; empty if the attacker knows it). Without ground
      truth, the columns that need it are empty. The status of a victim is ``converged`` (its objective is
      below the solver's tolerance), ``stalled`` (its objective falls no further), ``diverged`` (its objective is
      not finite), ``exhausted`` (the solver's evaluations are used up) or ``uninformative`` (the gradient
      carries no information, for example because it is all zeros, so no search was run).
    - ``reconstructions/part_0000.safetensors`` and so on, each a :class:`~leakage.inversion.Reconstruction` of at
      least 256 victims except the last, in the same order.

    After an interrupt, or if the Trainer's limits ended the run, ``victims.csv`` ends with the victims
    that were still running (status ``running``), and ``reconstructions/unfinished.safetensors`` holds their
    best iterates so far.

    The files are written whenever the number of finished victims has grown by 256 and by an eighth; after every
    validation (which computes the scores); and when the run ends. At the end, W&B gets the rows as a table under the
    key ``victims``, the first 100 of them with the true and the reconstructed images. With several processes, the
    first one writes: at the end the results of all, after an interrupt only its own (the rest is in the checkpoint).

    Each file is written atomically: a run that is killed and resumed neither repeats nor loses a row. A run
    that is not resumed replaces the files of an earlier run in the same folder, after a warning.

    Args:
        output: the folder, see :class:`~leakage.callbacks.ResultsCallback`.

    Raises:
        OSError: the folder can't be written, or files are missing at the end.
    """

    files = ("victims.csv", "reconstructions/*.safetensors")

    def __init__(self, output: str | os.PathLike[str] | None = None) -> None:
        super().__init__(output)
        # The victims in complete files, and the number of these files.
        self._saved: set[int] = set()
        self._files = 0
        # The number of victims done when a file was last completed, or could not be written.
        self._tried = 0
        self._earlier: list[Path] = []
        self._labels: dict[int, list[int]] = {}
        self._truth: dict[int, Tensor] = {}
        self._logged = 0

    def state_dict(self) -> dict[str, Any]:
        """Return which victims are in complete files, so that the next file gets all others."""
        return {"saved": sorted(self._saved), "files": self._files}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._saved, self._files = set(state_dict["saved"]), state_dict["files"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn about earlier results that this run will replace."""
        self._logged = 0
        if not trainer.is_global_zero:
            return
        if trainer.ckpt_path is None:
            self._labels, self._truth = {}, {}
        if trainer.ckpt_path is None or not self._are_there():
            self._saved, self._files = set(), 0  # the attack holds all finished victims
        self._tried = len(self._saved)
        # Files written after the checkpoint was made would otherwise be duplicated.
        kept = {self._part(file) for file in range(self._files)}
        self._earlier = sorted({*self.folder.glob("reconstructions/part_*.safetensors")} - kept)
        if self._earlier and trainer.ckpt_path is None:
            rank_zero_warn(
                f"'{self.folder}' holds the results of an earlier run, which this one will replace when its "
                "first victims are done. Resume the earlier one with `ckpt_path`, or choose another `output`."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the finished victims if they fill a file."""
        attack = cast("GradientInversion", pl_module)
        if trainer.is_global_zero and attack.num_done - self._tried >= max(_PER_FILE, self._tried // _GROWTH):
            self._tried = attack.num_done
            self._save(trainer, attack, complete=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything, including files that could not be written before, and log the table."""
        if trainer.is_global_zero:
            self._write(self._unfinished, lambda path: path.unlink(missing_ok=True))
        super().on_fit_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Score, write and log the finished victims."""
        if self._folder is not None:
            try:
                cast("GradientInversion", pl_module).score_finished()
            except (OSError, RuntimeError, ValueError) as error:
                rank_zero_warn(f"The victims done before the run was interrupted could not be scored: {error}")
        super().on_exception(trainer, pl_module, exception)

    def _write_results(self, trainer: Trainer, attack: GradientInversion, *, over: bool) -> None:
        self._save(trainer, attack)
        if over:
            # The Trainer's own limits (max_steps, max_time) end a run before all victims are done.
            self._save_unfinished(trainer, attack)
            self._log(trainer, attack)

    def _note(self, batch: GroundTruth) -> None:
        for victim, images, labels in zip(batch.ids.tolist(), batch.images, batch.labels.tolist(), strict=True):
            self._labels[victim] = labels
            if len(self._truth) < _ROWS_WITH_IMAGES and victim not in self._truth:
                self._truth[victim] = images.detach().cpu()

    def _know_truth_of(self, trainer: Trainer, victims: Reconstruction) -> None:
        # Read all at once: for the next victims the loader would start from the beginning again.
        if not self._labels.keys() >= {*victims.ids.tolist()}:
            self._look_up_truth(trainer)

    def _save(self, trainer: Trainer, attack: GradientInversion, *, complete: bool = False) -> None:
        """Write the finished victims; with ``complete``, later victims go to the next file."""
        if not attack.num_done:
            return
        finished = attack.finished
        self._know_truth_of(trainer, finished)
        new = [index for index, victim in enumerate(finished.ids.tolist()) if victim not in self._saved]
        part = self._part(self._files)
        for path in self._earlier:
            if not new or path != part:  # the current part stays until its replacement is written
                self._write(path, lambda path: path.unlink(missing_ok=True))
        self._earlier = []
        if new:
            written = self._write(part, finished.select(tensor(new)).save)
            # After a failed write, the victims go to the same file next time.
            if written and complete:
                self._saved.update(finished.ids.tolist())
                self._files += 1
        self._write(self.folder / "victims.csv", lambda path: write_csv(path, COLUMNS, self._rows(attack, finished)))

    def _save_unfinished(self, trainer: Trainer, attack: GradientInversion) -> None:
        """Write the best iterates so far of the victims that are still running."""
        running = attack.current()
        running = running.select(running.iterations > 0)
        if not len(running):
            return
        self._know_truth_of(trainer, running)
        self._write(self._unfinished, running.save)
        rows = self._rows(attack, attack.finished) + self._rows(attack, running)
        self._write(self.folder / "victims.csv", lambda path: write_csv(path, COLUMNS, rows))

    def _part(self, file: int) -> Path:
        return self.folder / "reconstructions" / f"part_{file:04d}.safetensors"

    def _are_there(self) -> bool:
        """Return whether the complete files are intact and hold the victims that the checkpoint lists."""
        try:
            ids = [Reconstruction.load(self._part(file)).ids.tolist() for file in range(self._files)]
        except (OSError, ValueError):
            return False
        return sorted(victim for part in ids for victim in part) == sorted(self._saved)

    @property
    def _unfinished(self) -> Path:
        return self.folder / "reconstructions" / "unfinished.safetensors"

    def _rows(self, attack: GradientInversion, found: Reconstruction) -> list[list[Any]]:
        rows = []
        for index, victim in enumerate(found.ids.tolist()):
            score, status = attack.scores.get(victim), STATUS[int(found.status[index])]
            scored: list[float | None] = [None] * 5
            if score is not None and (score.final or status == "running"):
                scored = [score.label_accuracy, score.mse, score.psnr, score.ssim, score.success]
            labels = [_show(self._labels.get(victim)), _show(found.labels[index].tolist())]
            counts = [int(count[index]) for count in (found.iterations, found.evaluations, found.restarts)]
            rate = None if found.learning_rate is None else float(found.learning_rate[index])
            rows.append([victim, *labels, *scored, float(found.loss[index]), *counts, status, rate])
        return rows

    def _log(self, trainer: Trainer, attack: GradientInversion) -> None:
        if not trainer.loggers or self._logged == attack.num_done:
            return
        finished = attack.finished
        rows = self._rows(attack, finished)
        for index, row in enumerate(rows):
            truth = self._truth.get(row[0])
            pictures = [None if truth is None else _strip(truth), _strip(finished.images[index])]
            row += pictures if index < _ROWS_WITH_IMAGES else [None, None]
        log_table(trainer, "victims", [*COLUMNS, "truth", "reconstruction"], rows)
        self._logged = attack.num_done


def _show(labels: list[int] | None) -> str | None:
    return None if labels is None else " ".join(str(label) for label in sorted(labels))


def _strip(images: Tensor) -> NDArray[np.uint8]:
    """Place a victim's images ``(N, C, H, W)`` side by side."""
    return np.concatenate([to_pixels(image) for image in images], axis=1)
