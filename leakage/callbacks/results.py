"""What callbacks that write results have in common: where to, and what happens when the disk refuses."""

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
    """A callback that writes files to a folder, from the process of rank zero alone.

    The folder is tried at ``setup``, before anything is computed. A write that fails later, on a
    full disk say, does not end the run: it warns, the results stay in memory, every later write
    tries again, and if files are still missing at the end, ``fit`` raises after everything else
    is done, so that a script notices. The attack and its results can still be used then.

    Args:
        output: the folder. By default that of the first logger's run (``save_dir/name/version``,
            beside Lightning's checkpoints), or the trainer's ``default_root_dir`` without a logger.

    Raises:
        OSError: at ``setup`` if the folder can't be written, at the end of ``fit`` if files are missing.
    """

    # What it writes, as patterns within the folder.
    files: ClassVar[tuple[str, ...]] = ()

    def __init__(self, output: str | os.PathLike[str] | None = None) -> None:
        self.output = output
        self._folder: Path | None = None
        self._failures: dict[Path, OSError] = {}

    @property
    def folder(self) -> Path:
        """Where the files go, known after ``setup``.

        Raises:
            RuntimeError: before ``setup``.
        """
        if self._folder is None:
            raise RuntimeError("Expected `folder` to be asked for after `setup`, but got no trainer yet.")
        return self._folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, try to write there, and remove what a run that was killed left half written."""
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
        """Tell what could not be written.

        Raises:
            OSError: there is something.
        """
        if self._failures:
            missing = "; ".join(str(error) for error in self._failures.values())
            raise OSError(
                f"Expected {type(self).__name__} to write all results, but got {len(self._failures)} files "
                f"missing ({missing}). The run itself is complete: the attack still holds its results."
            )

    def _write(self, path: Path, write: Callable[[Path], Any]) -> bool:
        """Call ``write(path)`` and tell whether it succeeded; remember and warn where it did not."""
        try:
            write(path)
        except OSError as error:
            self._failures[path] = error
            rank_zero_warn(f"{error}. The run goes on and tries again later.")
            return False
        self._failures.pop(path, None)
        return True


class VictimResultsCallback(ResultsCallback):
    """Writes what came of the victims of an attack at each validation and when the run ends, however it ends."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the truth."""
        if trainer.is_global_zero and isinstance(batch, GroundTruth):
            self._note(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is done."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write_results(trainer, cast("GradientInversion", pl_module), over=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything, what could not be written before and what is not finished included."""
        if trainer.is_global_zero:
            self._write_results(trainer, cast("GradientInversion", pl_module), over=True)
        super().on_fit_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is."""
        # An exception before `setup` leaves neither a folder nor results.
        if self._folder is not None and trainer.is_global_zero:
            self._write_results(trainer, cast("GradientInversion", pl_module), over=True)

    @abstractmethod
    def _note(self, batch: GroundTruth) -> None:
        """Keep the truth of the victims that are wanted."""

    @abstractmethod
    def _write_results(self, trainer: Trainer, attack: GradientInversion, *, over: bool) -> None:
        """Write what is done and, if the run is ``over``, what is not finished; in the first process."""

    def _look_up_truth(self, trainer: Trainer, is_enough: Callable[[], bool] = lambda: False) -> None:
        """Note the truth of victims, all or until it is enough, where no validation has shown it yet."""
        # The loaders of several processes show each its own victims.
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
            rank_zero_warn(f"The truth is left out of {self.files[0]} since it could not be read: {error}")
