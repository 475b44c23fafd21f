"""Checkpoints by the clock, and when a signal ends the run."""

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
    """Writes ``last.ckpt`` when some time has passed, when the run ends, and when it has to end.

    It writes after a training step: the first one when the time is over; the last one, also where the Trainer's limits
    end the run; and the next one after a signal has asked the process to end, SIGTERM as a scheduler sends it some
    seconds before it kills, or SIGINT (Ctrl-C). Then the run ends, by a ``SystemExit`` with the code 143 or by a
    ``KeyboardInterrupt``, and goes on from this very step when it is resumed. A second Ctrl-C does not wait for the end
    of the step; then the last checkpoint stands. A signal after the last step ends the program when the results are
    written. Lightning's checkpoint and requeue in a SLURM job wait for the end of the step, too. A signal for which the
    program has a handler of its own is left to that. In one process it also writes when an error ends the run between
    two steps, as one of a logger does.

    A checkpoint that can't be written, on a full disk say, does not end the run: it warns, and tries again when as much
    time has passed. The earlier one is left as it was, where the Trainer has the plugin
    :class:`~leakage.files.checkpoints.WholeCheckpointIO`.

    For modules that step their optimizer themselves, Lightning's ``ModelCheckpoint`` heeds no ``train_time_interval``.

    Args:
        folder: where to, by default ``checkpoints`` in that of the first logger's run, or in the trainer's
            ``default_root_dir`` without a logger.
        seconds: between two checkpoints.

    Raises:
        ValueError: ``seconds`` that are not positive.
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
        """Look which signals the program leaves to us; Lightning sets handlers of its own after this."""
        defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        self._signals = [number for number, default in defaults.items() if signal.getsignal(number) is default]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, heed signals, and remove what a run that was killed while it wrote has left."""
        self._last, self._between_steps, self._signal = time.monotonic(), False, 0
        if trainer.is_global_zero:
            remove_partials(self._path(trainer).parent, "last.ckpt")
        if threading.current_thread() is threading.main_thread():
            self._requeue = {number for number in {*signal.Signals} - {signal.SIGTERM} if _is_lightning_s(number)}
            self._handlers = {number: signal.signal(number, self._heed) for number in {*self._signals, *self._requeue}}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Within a step there is nothing to write."""
        self._between_steps = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, if it is time; end the run, if a signal has asked for it."""
        self._between_steps = True
        last = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        due = last or time.monotonic() - self._last >= self.seconds
        wanted = max(due / 2, float(self._signal))
        if trainer.world_size > 1:
            # They end together, at the same step: the highest number is that of a signal, if there is one.
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
        """All is done, and other callbacks have written theirs; what comes after it heeds signals that came late."""
        self._leave()
        if self._signal == signal.SIGTERM:
            raise SIGTERMException(128 + signal.SIGTERM)
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what the last step has left, if the error is not one of a step."""
        if self._between_steps and trainer.world_size == 1:
            try:
                self._write(trainer)
            except Exception as error:  # the other one is the one to tell
                warnings.warn(f"No checkpoint was written when the run broke off: {error}", stacklevel=1)
        self._leave()

    def _path(self, trainer: Trainer) -> Path:
        return (run_folder(trainer) / "checkpoints" if self.folder is None else Path(self.folder)) / "last.ckpt"

    def _write(self, trainer: Trainer) -> None:
        path = self._path(trainer)
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            warnings.warn(f"{error}. The run goes on, and tries again later.", stacklevel=1)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes wait
        self._last, self._between_steps = time.monotonic(), False

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal not in (signal.SIGTERM, signal.SIGINT):
            self._signal = number

    def _leave(self) -> None:
        self._between_steps = False
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._heed:  # after an interrupt, Lightning's is there
                signal.signal(number, handler)
        self._handlers = {}


def _is_lightning_s(number: signal.Signals) -> bool:
    """Whether Lightning handles a signal; apart from SIGTERM that is the one by which SLURM announces a requeue."""
    module: str | None = getattr(signal.getsignal(number), "__module__", None)  # of a function, or of an object's class
    return module is not None and module.split(".")[0] in ("lightning", "pytorch_lightning")
