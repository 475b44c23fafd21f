"""A picture of how reconstructions come about."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, tensor

from leakage.callbacks.loggers import log_image
from leakage.callbacks.results import ResultsCallback, ground_truth
from leakage.datamodules.base import GroundTruth
from leakage.errors import check_count
from leakage.metrics import score
from leakage.plots import figure_pixels, plot_gallery, save_figure

if TYPE_CHECKING:
    from leakage.inversion.gradient_inversion import GradientInversion
    from leakage.inversion.reconstruction import Reconstruction

# Beyond this a picture can no longer be read on a screen.
_MOST_ROWS = 24


class Gallery(ResultsCallback):
    """Draws the truth, the reconstruction at several moments and the final one of the first victims.

    Writes ``gallery.png`` to ``output`` and gives the picture to the loggers that take pictures, with
    the key ``gallery``, at a validation if one of its victims was finished since the last, and when the
    run ends, however it ends. Under the final image stand its PSNR (dB, images in [0, 1]) and the
    recovered label. Without ground truth the truth and the PSNR are left out. A victim of several
    images takes a row for each, paired one-to-one with the truth as for its scores, and there are at
    most 24 rows.

    The pictures at the moments are the victim's best iterate so far by the attack's own objective.
    They are looked at only between training steps; where a step has gone past the moment, the
    iteration that is shown stands under the image, and a moment that was skipped stays empty.

    Args:
        output: the folder, see :class:`~leakage.callbacks.ResultsCallback`.
        victims: how many, from the first on.
        moments: numbers of the victim's own iterations.

    Raises:
        ValueError: a number of victims below 1, or moments that are not whole numbers of at least 0.
        OSError: the folder can't be written, or the picture is missing at the end.
    """

    files = ("gallery.png",)

    def __init__(
        self,
        output: str | os.PathLike[str] | None = None,
        victims: int = 8,
        moments: Sequence[int] = (0, 10, 20, 50, 100, 200, 500),
    ) -> None:
        super().__init__(output)
        check_count(victims=victims)
        if not isinstance(moments, Sequence):
            raise ValueError(f"Expected `moments` as a list of whole numbers, but got {moments!r}.")
        for moment in moments:
            check_count(0, moments=moment)
        self.victims = victims
        self.moments = sorted(set(moments))
        # Victim to moment to the iteration and the images (N, C, H, W) shown there.
        self._snapshots: dict[int, dict[int, tuple[int, Tensor]]] = {}
        self._truth: dict[int, tuple[Tensor, Tensor]] = {}
        # The optimizer's pass before which no victim can reach its next moment.
        self._next_look: float = 0
        self._drawn: object = None

    def state_dict(self) -> dict[str, Any]:
        """The snapshots, so that the picture is whole after a resume."""
        return {"snapshots": self._snapshots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was made."""
        self._snapshots = state_dict["snapshots"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run from the beginning shows its own victims only."""
        self._drawn, self._next_look = None, 0
        if trainer.ckpt_path is None:
            self._snapshots, self._truth = {}, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the snapshots that are due."""
        attack = cast("GradientInversion", pl_module)
        # A batch that holds something has brought victims not seen before.
        wanted = len(batch) > 0 and len(self._snapshots) < self.victims
        if trainer.is_global_zero and (wanted or attack.iteration >= self._next_look):
            self._look(attack)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the truth of the victims that are shown."""
        if trainer.is_global_zero and isinstance(batch, GroundTruth):
            self._note(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if a victim that is shown was finished."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, cast("GradientInversion", pl_module), unfinished=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, also the victims that are not finished."""
        self._draw(trainer, cast("GradientInversion", pl_module), unfinished=True)
        super().on_fit_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        # An exception before `setup` leaves neither a folder nor results.
        if self._folder is not None:
            self._draw(trainer, cast("GradientInversion", pl_module), unfinished=True)

    def _look(self, attack: GradientInversion) -> None:
        current = attack.current()
        self._next_look = math.inf
        for index, (victim, iterations) in enumerate(
            zip(current.ids.tolist(), current.iterations.tolist(), strict=True)
        ):
            if victim not in self._snapshots:
                if len(self._snapshots) >= self.victims:
                    continue
                self._snapshots[victim] = {}
            passed = [moment for moment in self.moments if moment <= iterations]
            if passed and all(moment < passed[-1] for moment in self._snapshots[victim]):
                self._snapshots[victim][passed[-1]] = (
                    iterations,
                    current.images[index].detach().cpu().clone(),
                )
            if len(passed) < len(self.moments):
                # A pass takes a victim at most one iteration on.
                ahead = attack.iteration + self.moments[len(passed)] - iterations
                self._next_look = min(self._next_look, ahead)

    def _note(self, batch: GroundTruth) -> None:
        for index, victim in enumerate(batch.ids.tolist()):
            if victim in self._snapshots and victim not in self._truth:
                self._truth[victim] = (batch.images[index].detach().cpu(), batch.labels[index].detach().cpu())

    def _results(self, attack: GradientInversion, *, unfinished: bool) -> dict[int, Reconstruction]:
        """What is shown of each victim, in the order they were first seen."""
        results: dict[int, Reconstruction] = {}
        for part in (attack.finished, attack.current()) if unfinished else (attack.finished,):
            for index, victim in enumerate(part.ids.tolist()):
                # A victim can be done within one step, and is then never seen running.
                if victim not in self._snapshots and len(self._snapshots) < self.victims:
                    self._snapshots[victim] = {}
                if victim in self._snapshots and victim not in results:
                    results[victim] = part.select(tensor([index]))
        return {victim: results[victim] for victim in self._snapshots if victim in results}

    def _draw(self, trainer: Trainer, attack: GradientInversion, *, unfinished: bool) -> None:
        if not trainer.is_global_zero:
            return
        results = self._results(attack, unfinished=unfinished)
        shown = [(victim, int(result.iterations[0])) for victim, result in results.items()]
        path = self.folder / "gallery.png"
        if not results or (shown == self._drawn and path not in self._failures):
            return
        if not self._truth.keys() >= results.keys():
            self._look_up_truth(trainer)
        moments = [moment for moment in self.moments if any(moment in self._snapshots[victim] for victim in results)]
        has_truth = any(victim in self._truth for victim in results)
        images: list[list[Tensor | None]] = []
        captions: list[list[str]] = []
        rows: list[str] = []
        for victim, result in results.items():
            for row_images, row_captions in self._rows_of(victim, result, moments, has_truth=has_truth):
                images.append(row_images)
                captions.append(row_captions)
                rows.append(f"victim {victim}\n{int(result.iterations[0])} iterations")
        figure = plot_gallery(
            images[:_MOST_ROWS],
            columns=["truth"] * has_truth + [f"{moment}" if moment else "start" for moment in moments] + ["final"],
            rows=rows[:_MOST_ROWS],
            captions=captions[:_MOST_ROWS],
            title=f"{type(attack).__name__}: reconstruction over iterations",
        )
        self._write(path, lambda path: save_figure(figure, path))
        if shown != self._drawn:
            log_image(trainer, "gallery", figure_pixels(figure), caption=f"{attack.num_done} victims done")
        self._drawn = shown

    def _rows_of(
        self, victim: int, result: Reconstruction, moments: list[int], *, has_truth: bool
    ) -> list[tuple[list[Tensor | None], list[str]]]:
        """Images and captions of each of a victim's images."""
        snapshots = self._snapshots[victim]
        images, labels = result.images.detach().cpu(), result.labels.cpu()
        truth = self._truth.get(victim)
        # Without truth, in the order of the reconstruction.
        order = list(range(images.shape[1]))
        if truth is not None:
            scores = score(images, labels, truth[0][None].to(images.dtype), truth[1][None])
            order = scores.order[0].tolist()
        rows = []
        for n, partner in enumerate(order):
            shown = [snapshots.get(moment) for moment in moments]
            row: list[Tensor | None] = [None if shot is None else shot[1][partner] for shot in shown]
            caption = [
                f"at {shot[0]}" if shot is not None and shot[0] != moment else ""
                for moment, shot in zip(moments, shown, strict=True)
            ]
            row.append(images[0, partner])
            label = f"label {int(labels[0, partner])}"
            caption.append(label if truth is None else f"{float(scores.psnr[0, n]):.1f} dB, {label}")
            if has_truth:
                row.insert(0, None if truth is None else truth[0][n])
                caption.insert(0, "" if truth is None else f"label {int(truth[1][n])}")
            rows.append((row, caption))
        return rows

    def _look_up_truth(self, trainer: Trainer) -> None:
        """The truth of victims that no validation has shown yet, as when the run is interrupted."""
        try:
            for batch in ground_truth(trainer):
                self._note(batch)
                if self._truth.keys() >= self._snapshots.keys():
                    return
        except (OSError, RuntimeError, ValueError) as error:
            rank_zero_warn(f"The truth is left out of the gallery since it could not be read: {error}")
