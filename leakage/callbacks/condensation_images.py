"""A callback that writes the synthetic images and pictures of them while a run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from leakage.callbacks.condensation import CondensationCallback, as_condensation, between_iterations
from leakage.callbacks.loggers import log_artifact, log_image
from leakage.condensation.condensation import Condensation
from leakage.condensation.synthetic_set import SyntheticSet
from leakage.plots import figure_pixels, save_figure


class SyntheticImages(CondensationCallback):
    """Write the synthetic images at chosen iterations and when the run ends, for whatever reason it ends.

    Files in ``output``:

    - ``synthetic.safetensors``, the current :class:`~leakage.condensation.SyntheticSet` of the module, and
      ``synthetic.png``, with a row of images per class;
    - ``synthetic/iteration_000050.png`` and so on, the same picture after that many iterations.

    After an error or an interrupt, the files hold the last good images.
    :meth:`SyntheticSet.save_images <leakage.condensation.SyntheticSet.save_images>` writes the images one by one as PNG
    files. Loggers that accept pictures get each picture under the key ``synthetic``, with the number of completed
    training steps as the step. At the end, W&B gets the set as an artifact
    ``synthetic-<data set>-<images per class>``.

    A run that is not resumed replaces the files of an earlier run in the same folder, after a warning.

    Args:
        output: the folder, see :class:`~leakage.callbacks.ResultsCallback`.
        moments: numbers of completed iterations at which to write; 0 is the start. The end of the run is always
            included.

    Raises:
        ValueError: ``moments`` are not whole numbers of at least 0; in ``fit``, the module is not a
            :class:`~leakage.condensation.Condensation`.
        OSError: the folder can't be written, or files are missing at the end.
    """

    files = ("synthetic/iteration_*.png", "synthetic.png", "synthetic.safetensors")

    def __init__(
        self,
        output: str | os.PathLike[str] | None = None,
        moments: Sequence[int] = (0, 10, 20, 50, 100, 200, 500, 1000),
    ) -> None:
        super().__init__(output, moments, "moments")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module is a condensation, find the output folder and check that it can be written to."""
        super().setup(trainer, pl_module, stage)
        # The state that was seen last, and the parts of it that are not written yet.
        self._latest: SyntheticSet | None = None
        self._pending: dict[Path, Callable[[Path], Any]] = {}
        self._logged: SyntheticSet | None = None  # as an artifact

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the current images."""
        # Before training starts, the images may not be those of the checkpoint.
        if not self._begun:
            return
        try:
            self.look(trainer, as_condensation(self, pl_module), last=True)
        except ValueError as error:
            rank_zero_warn(f"The images of the interrupted run were not written: {error}")

    def look(self, trainer: Trainer, condensation: Condensation, *, last: bool) -> None:
        """Write and log the current images."""
        now = condensation.synthetic_set()
        self._remove_earlier()
        if self._latest is None or not now.images.equal(self._latest.images):
            self._latest = now
            self._show(trainer, condensation, now)
        for path, write in list(self._pending.items()):
            if self._write(path, write):
                del self._pending[path]
        if last and self._logged is not self._latest and not self._failures:
            self._logged = self._latest
            count = int(condensation.hparams["images_per_class"])
            log_artifact(
                trainer,
                f"synthetic-{now.dataset}-{count}",
                [self.folder / name for name in ("synthetic.safetensors", "synthetic.png")],
                metadata={"dataset": now.dataset, "images_per_class": count, "iterations": condensation.iteration},
            )

    def _show(self, trainer: Trainer, condensation: Condensation, now: SyntheticSet) -> None:
        done = f"{condensation.iteration} iterations"
        figure = now.figure(title=f"{now.dataset}: {done}")
        self._pending[self.folder / "synthetic.safetensors"] = now.save
        paths = [self.folder / "synthetic.png"]
        if between_iterations(condensation):
            paths.append(self.folder / "synthetic" / f"iteration_{condensation.iteration:06d}.png")
        for path in paths:
            self._pending[path] = lambda path: save_figure(figure, path)
        log_image(trainer, "synthetic", figure_pixels(figure), caption=done, step=condensation.step)
