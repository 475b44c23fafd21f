"""Checkpoints of a run: how they are written, read and how often, and whether one fits."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, cast

import lightning
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.utilities.exceptions import SIGTERMException
from packaging.version import InvalidVersion, Version
from torch import Tensor

from leakage.errors import check_positive
from leakage.tensor_files import brief

# What Lightning takes for granted.
_PARTS: dict[str, type] = {
    "leakage": dict,
    "state_dict": dict,
    "hyper_parameters": dict,
    "callbacks": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}
_VERSION = "pytorch-lightning_version"
# Bytes up to which a tensor may hold one value in many places, as `expand` does it.
_EXPANDED = 2**26
# More than any run makes.
_MOST_STEPS = 2**40


class TimedCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` when some time has passed, when the run ends, and when it has to end.

    It writes after a training step: the first one when the time is over; the last one, also where the Trainer's limits
    end the run; and the next one after a signal has asked the process to end, SIGTERM as a scheduler sends it some
    seconds before it kills, or SIGINT (Ctrl-C). Then the run ends, by a ``SystemExit`` with the code 143 or by a
    ``KeyboardInterrupt``, and goes on from this very step when it is resumed. A second Ctrl-C does not wait for the end
    of the step; then, as when the process is killed, the last checkpoint stands. A signal after the last step ends the
    program when the results are written. What Lightning does when SLURM is about to requeue the job, which is a
    checkpoint and the requeue, waits for the end of the step, too. A signal for which the program has a
    handler of its own is left to that. In one process it also writes when an error ends the run between two steps, as
    one of a logger does.

    A checkpoint that can't be written, on a full disk say, does not end the run: it warns, and tries again when as much
    time has passed. The earlier one is left as it was, where the Trainer has the plugin :class:`WholeCheckpointIO`.

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
            path = self._path(trainer)
            for partial in path.parent.glob(f"{glob.escape(path.name)}*.partial"):
                with contextlib.suppress(OSError):
                    partial.unlink()
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in signal.Signals if isinstance(signal.getsignal(number), _HandlersCompose)]
            self._requeue = {number for number in numbers if number != signal.SIGTERM}  # Lightning's, for SLURM
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


def run_folder(trainer: Trainer) -> Path:
    """The folder of the first logger's run (``save_dir/name/version``), or ``default_root_dir`` without a logger."""
    for logger in trainer.loggers[:1]:
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir, str(logger.name or ""), version if logger.version is not None else "")
    return Path(trainer.default_root_dir)


def part_of(path: str | os.PathLike[str], process: int) -> Path:
    """The file of one process' part of a checkpoint: the path itself of the first, ``last.ckpt.1`` of the second."""
    return Path(path) if process == 0 else _beside(path, f".{process}")


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """The files of all processes but the first."""
    begin = _beside(path, ".")
    found = begin.parent.glob(f"{glob.escape(begin.name)}*")
    return sorted(part for part in found if part.name[len(begin.name) :].isdigit())


def _beside(path: str | os.PathLike[str], ending: str) -> Path:
    """A file that belongs to a checkpoint.

    Lightning takes all digits behind ``ckpt_`` in the names of a folder for versions of SLURM's ``hpc_ckpt_1.ckpt``.
    """
    path = Path(path)
    return path.with_name(path.name.replace("ckpt_", "part_") + ending)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads no code from one; a plugin of Lightning's Trainer.

    The disk needs room for two checkpoints, since one is replaced only when the next is whole.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write beside the earlier checkpoint, then replace it.

        Raises:
            OSError: the file can't be written; an earlier one is left as it was.
        """
        partial = _beside(path, f".{os.getpid()}.partial")  # no other process writes to this one
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            # Not by Lightning's way, which holds a second copy in memory and a third in the folder for temporary files.
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch has words of its own for a disk that is full
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(f"Expected to write the checkpoint '{path}', but got: {error}") from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, always as with ``weights_only``: it holds tensors and plain values.

        Raises:
            OSError: there is no such file, or it may not be read.
            ValueError: a file of another kind, empty, truncated or with a byte that has changed, or one that would
                take much more memory than disk.
        """
        wanted = f"Expected a whole checkpoint of leakage at '{path}', but got"
        if not Path(path).is_file():
            raise FileNotFoundError(f"{wanted} no such file.")
        try:
            with Path(path).open("rb") as file:
                checkpoint = _read(file, map_location)
        except _UnsoundError as error:
            raise ValueError(f"{wanted} {error}.") from error
        except PermissionError as error:
            raise OSError(f"{wanted}: {error}") from error
        # What a broken file raises depends on where it is broken, and torch's words advise to run its code.
        except Exception as error:
            raise ValueError(f"{wanted} a file that is truncated or of another kind.") from error
        if not isinstance(checkpoint, dict) or "leakage" not in checkpoint:
            raise ValueError(f"{wanted} a file of another kind.")
        for name, kind in _PARTS.items():
            if not isinstance(checkpoint.get(name, kind()), kind):
                raise ValueError(f"{wanted} one with {brief(repr(checkpoint[name]))} as {name!r}.")
        version = checkpoint.setdefault(_VERSION, lightning.__version__)  # by which Lightning knows what to migrate
        try:
            Version(version)
        except (TypeError, InvalidVersion) as error:
            raise ValueError(f"{wanted} one with {brief(repr(version))} as {_VERSION!r}.") from error
        return checkpoint


class _UnsoundError(Exception):
    """What is wrong with the contents of a checkpoint."""


def _read(file: BinaryIO, map_location: Callable[..., Any] | None) -> Any:
    """Tensors and plain values of an archive as torch writes it, whose bytes are those that were written."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size = sum(record.file_size for record in records)
        # torch packs nothing; what is packed, or in two records at once, could unfold to any size.
        if any(record.compress_type != zipfile.ZIP_STORED for record in records) or size > file.seek(0, os.SEEK_END):
            raise _UnsoundError("records that are packed or overlap")
        if (broken := archive.testzip()) is not None:  # torch does not look at the checksums
            raise _UnsoundError(f"one whose record {brief(broken)!r} has changed since it was written")
    file.seek(0)
    checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    _check_unfolded(checkpoint, size)
    return checkpoint


def _check_unfolded(value: Any, size: int) -> None:
    """Raise an error for what takes a file few bytes and a program many: shared parts again and again, expansion."""
    left, found = [value], 0
    while left:
        value = left.pop()
        found += 1
        if found > size:  # an item of its own takes at least a byte
            raise _UnsoundError("values that contain one another without end")
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type == "meta":
                raise _UnsoundError(f"a tensor of layout {value.layout} on {value.device}")
            needed = value.numel() * value.element_size()
            if needed > max(value.untyped_storage().nbytes(), _EXPANDED):
                raise _UnsoundError(f"a tensor {brief(tuple(value.shape))} that stands for {needed} bytes")


def check_checkpoint(checkpoint: Mapping[str, Any], module: str, options: Mapping[str, Any], precision: object) -> None:
    """Raise a ``ValueError`` unless the checkpoint is of this module, with these options, in this precision.

    Args:
        checkpoint: as Lightning hands it to ``on_load_checkpoint``.
        module: the name of the class.
        options: its hyper-parameters.
        precision: the Trainer's.
    """
    saved, stored = checkpoint.get("leakage"), checkpoint.get("hyper_parameters")
    if not isinstance(saved, Mapping) or saved.get("module") != module:
        found = brief(repr(saved.get("module"))).strip("'") if isinstance(saved, Mapping) else "another module"
        raise ValueError(f"Expected a checkpoint of {module}, but got one of {found}.")
    if not isinstance(stored, Mapping):
        raise ValueError(f"Expected a checkpoint with the configuration of {module}, but got {brief(repr(stored))}.")
    differing = {name: (stored.get(name), value) for name, value in options.items() if not _same(stored, name, value)}
    if differing:
        listed = ", ".join(f"{name}={brief(repr(old))} (now {new!r})" for name, (old, new) in differing.items())
        raise ValueError(f"Expected the configuration of the checkpoint, but got another: it has {listed}.")
    if saved.get("precision") != precision:
        raise ValueError(
            f"Expected the checkpoint's precision {brief(repr(saved.get('precision')))}, but got {precision!r}."
        )
    _check_lightning(checkpoint)


def _check_lightning(checkpoint: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` unless what Lightning restores, which it takes for granted, is as Lightning writes it."""
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        if name not in checkpoint:
            raise ValueError(f"Expected a checkpoint to go on from, with {name!r}, but got one without.")
    count = [len(checkpoint[name]) for name in ("optimizer_states", "lr_schedulers")]
    if count != [1, 0]:
        raise ValueError(f"Expected a checkpoint of one optimizer and no scheduler, but got {count[0]} and {count[1]}.")
    for name, state in checkpoint["callbacks"].items():
        if not isinstance(state, Mapping):
            raise ValueError(f"Expected a checkpoint with the state of {brief(name)}, but got {brief(repr(state))}.")
    if "loops" in checkpoint:
        found, like = checkpoint["loops"].get("fit_loop"), _FitLoop(cast(Trainer, None)).state_dict()
        # Lightning passes over what is missing here, for the sake of older checkpoints.
        like = {name: value for name, value in like.items() if not isinstance(found, Mapping) or name in found}
        _check_progress("loops/fit_loop", found, like)


def _check_progress(place: str, found: Any, like: Any) -> None:
    if isinstance(like, Mapping):
        if not isinstance(found, Mapping) or found.keys() != like.keys():
            names = brief(sorted(map(str, found))) if isinstance(found, Mapping) else brief(repr(found))
            raise ValueError(f"Expected {place!r} of a checkpoint with {sorted(like)}, but got {names}.")
        for name, value in like.items():
            _check_progress(f"{place}/{name}", found[name], value)
    elif type(found) is not type(like) or not 0 <= found < _MOST_STEPS:
        expected = "True or False" if isinstance(like, bool) else "a number of steps"
        raise ValueError(f"Expected {place!r} of a checkpoint as {expected}, but got {brief(repr(found))}.")


def _same(stored: Mapping[str, Any], name: str, value: object) -> bool:
    old = stored.get(name)
    return not isinstance(old, Tensor) and bool(old == value)


@contextlib.contextmanager
def restoring(what: str) -> Iterator[None]:
    """Turn every error within into a ``ValueError`` that tells which part of a checkpoint does not hold what it should.

    A checkpoint is read by code that takes its entries, their types and shapes for granted.

    Example:
        >>> with restoring("the lanes"):
        ...     {}["best_loss"]
        Traceback (most recent call last):
        ValueError: Expected the lanes of a checkpoint as leakage writes it, but got KeyError: 'best_loss'.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or (isinstance(error, ValueError) and str(error).startswith("Expected ")):
            raise
        raise ValueError(
            f"Expected {what} of a checkpoint as leakage writes it, but got {type(error).__name__}: {brief(error)}."
        ) from error


def check_like(what: str, found: Any, like: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` unless tensors have the names, types and shapes of others.

    Args:
        what: what they are called in the message.
        found: of the checkpoint.
        like: as the run would make them.

    Example:
        >>> check_like("the lanes", {"loss": torch.zeros(3)}, {"loss": torch.zeros(2)})
        Traceback (most recent call last):
        ValueError: Expected the lanes of a checkpoint with 'loss' (2,) torch.float32, but got (3,) torch.float32.
    """
    if not isinstance(found, Mapping) or found.keys() != like.keys():
        names = brief(sorted(map(str, found))) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"Expected {what} of a checkpoint with {sorted(like)}, but got {names}.")
    for name, tensor in like.items():
        other = found[name]
        expected = f"{tuple(tensor.shape)} {tensor.dtype}"
        got = f"{brief(tuple(other.shape))} {other.dtype}" if isinstance(other, Tensor) else type(other).__name__
        if got != expected:
            raise ValueError(f"Expected {what} of a checkpoint with {name!r} {expected}, but got {got}.")
