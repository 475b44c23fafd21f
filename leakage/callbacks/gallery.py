"""A callback that draws how reconstructions develop."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lightning import LightningModule, Trainer
from torch import Tensor, tensor

from leakage.callbacks.loggers import log_image
from leakage.callbacks.results import VictimResultsCallback
from leakage.datamodules.base import GroundTruth
from leakage.errors import check_count
from leakage.metrics import score
from leakage.plots import figure_pixels, plot_gallery, save_figure

if TYPE_CHECKING:
    from leakage.inversion.gradient_inversion import GradientInversion
    from leakage.inversion.reconstruction import Reconstruction

# A taller picture would be unreadable on a screen.
_MOST_ROWS = 24


class Gallery(VictimResultsCallback):
    """Draw the truth, the reconstruction at several moments and the final reconstruction of the first victims.

    The callback writes ``gallery.png`` to ``output`` and sends the picture under the key ``gallery`` to the loggers
    that accept pictures: at a validation if one of its victims has finished since the last one, and when the
    run ends, for whatever reason. Below the final image are its PSNR (dB, for images in [0, 1]) and the
    recovered label. Without ground truth, the truth and the PSNR are left out. A victim with several
    images gets a row for each, matched one-to-one with the truth as for its scores. There are at
    most 24 rows.

    The images at the moments are the victim's best iterate so far by the attack's own objective.
    Snapshots are only taken between training steps. If a step has gone past the moment, the
    caption gives the iteration that is shown; a moment that was skipped leaves an empty cell.

    Args:
        output: the folder, see :class:`~leakage.callbacks.ResultsCallback`.
        victims: number of victims, counted from the first.
        moments: iterations of the victim at which to take a snapshot.

    Raises:
        ValueError: ``victims`` is below 1, or ``moments`` are not whole numbers of at least 0.
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
        # The earliest pass of the optimizer at which a victim can reach its next moment.
        self._next_look: float = 0
        self._drawn: object = None

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots, so that the picture is complete after a resume."""
        return {"snapshots": self._snapshots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the snapshots from a checkpoint."""
        self._snapshots = state_dict["snapshots"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier snapshots unless the run is resumed."""
        self._drawn, self._next_look = None, 0
        if trainer.ckpt_path is None:
            self._snapshots, self._truth = {}, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the snapshots that are due."""
        attack = cast("GradientInversion", pl_module)
        # A batch that is not empty contains victims not seen before.
        wanted = len(batch) > 0 and len(self._snapshots) < self.victims
        if trainer.is_global_zero and (wanted or attack.iteration >= self._next_look):
            self._look(attack)

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
                self._snapshots[victim][passed[-1]] = (iterations, current.images[index].detach().cpu().clone())
            if len(passed) < len(self.moments):
                # One pass advances a victim by at most one iteration.
                ahead = attack.iteration + self.moments[len(passed)] - iterations
                self._next_look = min(self._next_look, ahead)

    def _note(self, batch: GroundTruth) -> None:
        for index, victim in enumerate(batch.ids.tolist()):
            if victim in self._snapshots and victim not in self._truth:
                self._truth[victim] = (batch.images[index].detach().cpu(), batch.labels[index].detach().cpu())

    def _results(self, attack: GradientInversion, *, unfinished: bool) -> dict[int, Reconstruction]:
        """Return the result to show for each victim, in the order in which they were first seen."""
        results: dict[int, Reconstruction] = {}
        for part in (attack.finished, attack.current()) if unfinished else (attack.finished,):
            for index, victim in enumerate(part.ids.tolist()):
                # A victim that finishes within one step is never seen running.
                if victim not in self._snapshots and len(self._snapshots) < self.victims:
                    self._snapshots[victim] = {}
                if victim in self._snapshots and victim not in results:
                    results[victim] = part.select(tensor([index]))
        return {victim: results[victim] for victim in self._snapshots if victim in results}

    def _write_results(self, trainer: Trainer, attack: GradientInversion, *, over: bool) -> None:
        results = self._results(attack, unfinished=over)
        shown = [(victim, int(result.iterations[0])) for victim, result in results.items()]
        path = self.folder / "gallery.png"
        if not results or (shown == self._drawn and path not in self._failures):
            return
        if not self._truth.keys() >= results.keys():
            self._look_up_truth(trainer, lambda: self._truth.keys() >= results.keys())
        moments = [moment for moment in self.moments if any(moment in self._snapshots[victim] for victim in results)]
        has_truth = any(victim in self._truth for victim in results)
        rows = [
            (f"victim {victim}\n{int(result.iterations[0])} iterations", cells)
            for victim, result in results.items()
            for cells in self._rows_of(victim, result, moments, has_truth=has_truth)
        ][:_MOST_ROWS]
        figure = plot_gallery(
            [[image for image, _ in cells] for _, cells in rows],
            columns=["truth"] * has_truth + [f"{moment}" if moment else "start" for moment in moments] + ["final"],
            rows=[label for label, _ in rows],
            captions=[[caption for _, caption in cells] for _, cells in rows],
            title=f"{type(attack).__name__}: reconstruction over iterations",
        )
        self._write(path, lambda path: save_figure(figure, path))
        if shown != self._drawn:
            log_image(trainer, "gallery", figure_pixels(figure), caption=f"{attack.num_done} victims done")
        self._drawn = shown

    def _rows_of(
        self, victim: int, result: Reconstruction, moments: list[int], *, has_truth: bool
    ) -> list[list[tuple[Tensor | None, str]]]:
        """Return a row for each image of a victim: the images to show, each with its caption."""
        images, labels = result.images.detach().cpu(), result.labels.cpu()
        truth = self._truth.get(victim)
        # Without truth, keep the order of the reconstruction.
        order = list(range(images.shape[1]))
        if truth is not None:
            scores = score(images, labels, truth[0][None].to(images.dtype), truth[1][None])
            order = scores.order[0].tolist()
        rows = []
        for n, partner in enumerate(order):
            cells: list[tuple[Tensor | None, str]] = []
            if has_truth:
                cells.append((None, "") if truth is None else (truth[0][n], f"label {int(truth[1][n])}"))
            for moment in moments:
                at, shown = self._snapshots[victim].get(moment, (moment, None))
                cells.append((None if shown is None else shown[partner], f"at {at}" if at != moment else ""))
            label = f"label {int(labels[0, partner])}"
            caption = label if truth is None else f"{float(scores.psnr[0, n]):.1f} dB, {label}"
            rows.append([*cells, (images[0, partner], caption)])
        return rows
