"""Base classes of callbacks that write results: the output folder, and how errors of the disk are handled."""

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.files.checkpoints import run_folder
from leakage.files.whole import check_output, remove_partials

if TYPE_CHECKING:
    from leakage.inversion.gradient_inversion import GradientInversion


class ResultsCallback(Callback):
    """Base class of callbacks that write files to a folder, from the process of rank zero only.

    The callback checks at ``setup``, before any computation, that it can write to the folder. If a write fails later,
    for example because the disk is full, the run does not end: there is a warning, the results stay in memory, and
    every later write tries again. If files are still missing at the end, ``fit`` raises after everything else
    is done, so that a script notices. The attack and its results can still be used then.

    Args:
        output: the folder. By default, that of the first logger's run (``save_dir/name/version``,
            beside Lightning's checkpoints), or the trainer's ``default_root_dir`` without a logger.

    Raises:
        OSError: at ``setup``, the folder can't be written to; at the end of ``fit``, files are missing.
    """

    # The files that the callback writes, as patterns within the folder.
    files: ClassVar[tuple[str, ...]] = ()

    def __init__(self, output: str | os.PathLike[str] | None = None) -> None:
        self.output = output
        self._folder: Path | None = None
        self._failures: dict[Path, OSError] = {}

    @property
    def folder(self) -> Path:
        """The folder for the files, available after ``setup``.

        Raises:
            RuntimeError: ``setup`` has not been called yet.
        """
        if self._folder is None:
            raise RuntimeError("Expected `folder` to be used after `setup`, but got no trainer yet.")
        return self._folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, check that it can be written to, and remove partial files that a killed run left behind."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        self._folder = Path(self.output) if self.output is not None else run_folder(trainer)
        self._failures = {}
        try:
            check_output(self._folder)
        except OSError as error:
            raise OSError(f"{error} Give {type(self).__name__} another `output`.") from error
        remove_partials(self._folder, *self.files)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try again to write missing files, and report those that can't be written.

        Raises:
            OSError: files are still missing.
        """
        if self._failures:
            missing = "; ".join(str(error) for error in self._failures.values())
            raise OSError(
                f"Expected {type(self).__name__} to write all results, but got {len(self._failures)} files "
                f"missing ({missing}). The run itself is complete: the attack still holds its results."
            )

    def _write(self, path: Path, write: Callable[[Path], Any]) -> bool:
        """Call ``write(path)`` and return whether it succeeded; on failure, warn and remember the error."""
        try:
            write(path)
        except OSError as error:
            self._failures[path] = error
            rank_zero_warn(f"{error}. The run continues and will try again later.")
            return False
        self._failures.pop(path, None)
        return True


class VictimResultsCallback(ResultsCallback):
    """Base class of callbacks that write the results of victims at each validation and whenever the run ends."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the truth of the batch."""
        if trainer.is_global_zero and isinstance(batch, GroundTruth):
            self._note(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of finished victims."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write_results(trainer, cast("GradientInversion", pl_module), over=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything, including unfinished victims and files that could not be written before."""
        if trainer.is_global_zero:
            self._write_results(trainer, cast("GradientInversion", pl_module), over=True)
        super().on_fit_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the results so far."""
        # Before `setup` there is neither a folder nor a result.
        if self._folder is not None and trainer.is_global_zero:
            self._write_results(trainer, cast("GradientInversion", pl_module), over=True)

    @abstractmethod
    def _note(self, batch: GroundTruth) -> None:
        """Keep the truth of the wanted victims."""

    @abstractmethod
    def _write_results(self, trainer: Trainer, attack: GradientInversion, *, over: bool) -> None:
        """Write finished victims and, if the run is ``over``, unfinished ones; called in the first process only."""

    def _look_up_truth(self, trainer: Trainer, is_enough: Callable[[], bool] = lambda: False) -> None:
        """Read the truth of victims that no validation has shown yet, of all of them or until ``is_enough()``."""
        # With several processes, each loader yields only the victims of its process.
        several = trainer.world_size > 1 and isinstance(getattr(trainer, "datamodule", None), VictimDataModule)
        try:
            loaders = trainer.datamodule.val_dataloader() if several else trainer.val_dataloaders  # type: ignore[attr-defined]
            loaders = loaders if isinstance(loaders, list | tuple) else [] if loaders is None else [loaders]
            for batch in itertools.chain.from_iterable(loaders):
                if isinstance(batch, GroundTruth):
                    self._note(batch)
                if is_enough():
                    return
        except (OSError, RuntimeError, ValueError) as error:
            rank_zero_warn(f"The truth is missing from {self.files[0]} because it could not be read: {error}")
