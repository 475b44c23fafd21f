"""A callback that writes checkpoints at intervals of time and when a signal ends the run."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from leakage.errors import check_positive
from leakage.files.checkpoints import run_folder
from leakage.files.whole import remove_partials


class TimedCheckpoint(Checkpoint):
    """Write ``last.ckpt`` at intervals of time, at the end of the run, and when a signal asks the process to end.

    The checkpoint is written after a training step: the first step after each interval; the last step, also if the
    Trainer's limits end the run; and the next step after a signal to end the process. Such a signal is SIGTERM, which a
    scheduler sends some seconds before it kills a job, or SIGINT (Ctrl-C). The run then ends with a ``SystemExit`` of
    code 143 or with a ``KeyboardInterrupt``; resuming continues from this very step. A second Ctrl-C does not wait for
    the end of the step, and the previous checkpoint remains. A signal after the last step ends the program once the
    results are written. Lightning's checkpoint and requeue in a SLURM job also wait for the end of the step. If the
    program has its own handler for a signal, that handler is used. In a single process, the callback also writes if
    an error ends the run between two steps, for example an error of a logger.

    If a checkpoint can't be written, for example because the disk is full, the run does not end: there is a warning,
    and the callback tries again after the next interval. The earlier checkpoint is left unchanged if the Trainer has
    the plugin :class:`~leakage.files.checkpoints.WholeCheckpointIO`.

    Lightning's ``ModelCheckpoint`` ignores ``train_time_interval`` for modules that step their optimizer themselves.

    Args:
        folder: folder of the checkpoint. By default ``checkpoints`` in that of the first logger's run, or in the
            trainer's ``default_root_dir`` without a logger.
        seconds: time between two checkpoints, in seconds.

    Raises:
        ValueError: ``seconds`` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, seconds: float = 60.0) -> None:
        check_positive(seconds=seconds)
        self.folder = folder
        self.seconds = seconds
        self._last = math.inf
        self._between_steps = False
        self._signal = 0
        self._signals: list[signal.Signals] = []
        self._requeue: set[signal.Signals] = set()
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the signals for which the program has no handler of its own; Lightning sets its handlers after this."""
        defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        self._signals = [number for number, default in defaults.items() if signal.getsignal(number) is default]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, install signal handlers, and remove partial files that a killed run left behind."""
        self._last, self._between_steps, self._signal = time.monotonic(), False, 0
        if trainer.is_global_zero:
            remove_partials(self._path(trainer).parent, "last.ckpt")
        if threading.current_thread() is threading.main_thread():
            self._requeue = {number for number in {*signal.Signals} - {signal.SIGTERM} if _is_lightning_s(number)}
            self._handlers = {number: signal.signal(number, self._heed) for number in {*self._signals, *self._requeue}}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that a step is in progress, so that no checkpoint is written."""
        self._between_steps = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if one is due, and end the run if a signal asked for it."""
        self._between_steps = True
        last = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        due = last or time.monotonic() - self._last >= self.seconds
        wanted = max(due / 2, float(self._signal))
        if trainer.world_size > 1:
            # All processes end at the same step: the maximum is the number of a signal, if one of them got a signal.
            own = torch.tensor(wanted, device=trainer.strategy.root_device)
            wanted = float(trainer.strategy.reduce(own, reduce_op="max"))
        if wanted:
            self._write(trainer)
        if wanted == signal.SIGTERM:
            raise SIGTERMException(128 + signal.SIGTERM)
        if wanted == signal.SIGINT:
            raise KeyboardInterrupt
        if wanted in self._requeue:
            self._signal = 0
            self._handlers[signal.Signals(int(wanted))](int(wanted), None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the signal handlers and act on a late signal, now that all results are written."""
        self._leave()
        if self._signal == signal.SIGTERM:
            raise SIGTERMException(128 + signal.SIGTERM)
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the state after the last step, unless the error was raised within a step."""
        if self._between_steps and trainer.world_size == 1:
            try:
                self._write(trainer)
            except Exception as error:  # the original error is the one to raise
                warnings.warn(f"No checkpoint was written when the run was interrupted: {error}", stacklevel=1)
        self._leave()

    def _path(self, trainer: Trainer) -> Path:
        return (run_folder(trainer) / "checkpoints" if self.folder is None else Path(self.folder)) / "last.ckpt"

    def _write(self, trainer: Trainer) -> None:
        path = self._path(trainer)
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            warnings.warn(f"{error}. The run continues and will try again later.", stacklevel=1)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # the other processes wait there
        self._last, self._between_steps = time.monotonic(), False

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal not in (signal.SIGTERM, signal.SIGINT):
            self._signal = number

    def _leave(self) -> None:
        self._between_steps = False
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._heed:  # after an interrupt, the handler is Lightning's
                signal.signal(number, handler)
        self._handlers = {}


def _is_lightning_s(number: signal.Signals) -> bool:
    """Return whether Lightning handles a signal; apart from SIGTERM, that is SLURM's notice of a requeue."""
    module: str | None = getattr(signal.getsignal(number), "__module__", None)  # of a function or a class
    return module is not None and module.split(".")[0] in ("lightning", "pytorch_lightning")
