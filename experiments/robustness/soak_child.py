"""Run a comparison in a separate process, cause failures in it, and record how it ended."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.pytorch.loggers import Logger

from leakage.attacks import IDLGAttack
from leakage.cli import quiet
from leakage.datamodules import Victims
from leakage.inversion.strategy import VictimParallel

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from comparing import compare

# Iterations between two validations, when the results so far are written.
VALIDATED_EVERY = 50
# Seconds after which a run counts as hanging, and between two checks.
_PATIENCE, _LOOK = 1800.0, 0.0005
# Maximum bytes of a file on a "full disk" without a file system of its own.
_FULL = 16_384

# A function that sets up a failure in the process; it returns additional arguments of `compare`.
Trouble = Callable[["Job", "Progress"], dict[str, Any] | None]


@dataclass(frozen=True)
class Job:
    """The comparison to run: iDLG on the same victims in every scenario.

    Attributes:
        output: the folder of the comparison.
        dataset: one of :data:`leakage.datamodules.DATASETS`, or a folder of images.
        root: folder of the named data set.
        victims: number of victims.
        lanes: number of victims at once; fixed, since rounding depends on it.
        seed: seed of victims, networks and starts.
        checkpoint_seconds: time between two checkpoints.
        max_evaluations: limit of evaluations of the attack, for each start.
    """

    output: Path
    dataset: str
    root: Path | None
    victims: int
    lanes: int
    seed: int
    checkpoint_seconds: float
    max_evaluations: int | None = None


class Progress:
    """Progress that the parent can see: the first iteration of this process, and the completed iterations."""

    def __init__(self) -> None:
        # Without locks, since a lock held by a killed process would never be released.
        self.first = multiprocessing.RawValue("q", -1)
        self.completed = multiprocessing.RawValue("q", -1)


@dataclass
class Ending:
    """How a child ended.

    Attributes:
        code: exit code; minus the number of the signal that killed the process.
        first: number of completed iterations when it began, -1 if it did not get that far.
        completed: number of completed iterations when it ended.
        seconds: time from the first signal to the end, if there was a signal.
        said: its output on the terminal.
    """

    code: int
    first: int
    completed: int
    seconds: float | None
    said: str


def run(
    job: Job,
    trouble: Trouble | None = None,
    *,
    signals: Sequence[int] = (),
    at: int | None = None,
    after: float = 0.0,
    pause: float = 0.0,
) -> Ending:
    """Start or resume the comparison in a separate process, and wait for its end.

    Args:
        job: the comparison.
        trouble: a failure that is set up in the process before it begins.
        signals: signals to send, if the process lives that long.
        at: number of completed iterations at the first signal; None for during start-up.
        after: delay of the first signal in seconds; without ``at``, from the start, but not after the first step.
        pause: seconds between two signals.
    """
    progress = Progress()
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:  # not on the full disk
        process = multiprocessing.get_context("fork").Process(target=_child, args=(job, progress, trouble, log))
        process.start()
        seconds = None
        if signals:
            while process.is_alive() and at is not None and progress.completed.value < at:
                time.sleep(_LOOK)
            until = time.monotonic() + after
            while time.monotonic() < until and (at is not None or progress.first.value < 0):
                time.sleep(_LOOK)
            seconds = -time.monotonic()
            for number in signals:
                process.is_alive() and os.kill(cast(int, process.pid), number)
                time.sleep(pause)
        process.join(_PATIENCE)
        if seconds is not None:
            seconds += time.monotonic()
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"Expected the run in '{job.output}' to end within {_PATIENCE:.0f} s, but it did not.")
        log.seek(0)
        said = log.read().decode(errors="replace")
    return Ending(process.exitcode, progress.first.value, progress.completed.value, seconds, said)


def _child(job: Job, progress: Progress, trouble: Trouble | None, log: IO[bytes]) -> None:
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    # Handle Ctrl-C as in a terminal, even if the parent runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    step = IDLGAttack.training_step

    def watched(self: IDLGAttack, batch: Any, batch_idx: int) -> None:
        if progress.first.value < 0:
            progress.first.value = self.iteration
        step(self, batch, batch_idx)
        progress.completed.value = self.iteration

    IDLGAttack.training_step = watched  # type: ignore[method-assign]
    attack(job, (trouble(job, progress) if trouble is not None else None) or {})


def attack(job: Job, options: dict[str, Any]) -> None:
    """Run the attack as a user would; ``options`` are additional arguments of ``compare``."""
    torch.set_num_threads(1)
    quiet()
    victims = Victims(job.dataset, root=job.root, victims=job.victims, lanes=job.lanes, seed=job.seed)
    compare(
        {"idlg": IDLGAttack(seed=job.seed, max_evaluations=job.max_evaluations)},
        victims,
        job.output,
        dataset=victims.name,
        resume=True,
        checkpoint_seconds=job.checkpoint_seconds,
        accelerator="cpu",
        enable_progress_bar=False,
        val_check_interval=VALIDATED_EVERY,
        **options,
    )


# Failures. Each is set up in the child and occurs after a number of completed iterations.


def each_step(act: Callable[[IDLGAttack], None]) -> None:
    """Call ``act`` before every training step."""
    step = IDLGAttack.training_step

    def troubled(self: IDLGAttack, batch: Any, batch_idx: int) -> None:
        act(self)
        step(self, batch, batch_idx)

    IDLGAttack.training_step = troubled  # type: ignore[method-assign]


def killed_while_writing(at: int, share: float) -> Trouble:
    """Send SIGKILL when this share of a checkpoint's bytes is written."""

    def trouble(job: Job, progress: Progress) -> None:
        save = torch.save

        def torn(content: Any, file: Any, *given: Any, **options: Any) -> None:
            if progress.completed.value < at:
                save(content, file, *given, **options)
                return
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: int(share * whole.tell())])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = torn  # type: ignore[assignment]

    return trouble


def killed_before_replacing(at: int, name: str) -> Trouble:
    """Send SIGKILL when a file is complete but not yet renamed; its final name begins with ``name``."""

    def trouble(job: Job, progress: Progress) -> None:
        replace = Path.replace

        def killing(self: Path, target: Any) -> Path:
            if progress.completed.value >= at and Path(target).name.startswith(name):
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = killing  # type: ignore[assignment, method-assign]

    return trouble


def signalled_while_writing(number: int) -> Trouble:
    """Send a signal while a checkpoint is written."""

    def trouble(job: Job, progress: Progress) -> None:
        save = torch.save

        def hit(content: Any, file: Any, *given: Any, **options: Any) -> None:
            os.kill(os.getpid(), number)
            save(content, file, *given, **options)

        torch.save = hit  # type: ignore[assignment]

    return trouble


def full_disk(at: int, filler: Path | None) -> Trouble:
    """Fill the disk with a file, or, without one, limit the length of files."""

    def trouble(job: Job, progress: Progress) -> None:
        def fill(attack: IDLGAttack) -> None:
            if attack.iteration != at:
                return
            if filler is None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                return
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

        each_step(fill)

    return trouble


class RaisingLogger(Logger):
    """A logger that fails in one of its methods from a certain call on."""

    def __init__(self, method: str, calls: int) -> None:
        super().__init__()
        self.method, self.calls = method, calls

    def _call(self, method: str) -> None:
        if method == self.method:
            self.calls -= 1
            if self.calls < 0:
                raise ConnectionError(f"the logger fails in {method}")

    @property
    def name(self) -> str:
        """Return the name of the run."""
        return "raising"

    @property
    def version(self) -> int:
        """Return the version of the run."""
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Fail if this is the chosen method."""
        self._call("log_metrics")

    def log_hyperparams(self, params: Any, *given: Any, **options: Any) -> None:
        """Fail if this is the chosen method."""
        self._call("log_hyperparams")

    def finalize(self, status: str) -> None:
        """Fail if this is the chosen method."""
        self._call("finalize")


def raising_logger(method: str, calls: int = 0) -> Trouble:
    """Add a logger that fails in a method after this many successful calls."""
    return lambda job, progress: {"logger": RaisingLogger(method, calls), "log_every_n_steps": 1}


def unreachable_wandb(seconds: float) -> Trouble:
    """Use W&B online with an unreachable server."""

    def trouble(job: Job, progress: Progress) -> Any:
        from leakage.callbacks import OfflineSafeWandbLogger

        # Nothing listens at this port.
        os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
        folder = job.output.parent / f"{job.output.name}_wandb"
        folder.mkdir()
        return {
            "logger": OfflineSafeWandbLogger(start_timeout=seconds, finish_timeout=seconds, save_dir=folder),
            "log_every_n_steps": 1,
        }

    return trouble


def main() -> None:
    """Run two processes, which the Trainer starts by running this file again; the job is given as JSON."""
    given = json.loads(sys.argv[1])
    paths = {name: Path(given[name]) if given[name] is not None else None for name in ("output", "root")}
    attack(Job(**(given | paths)), {"devices": 2, "strategy": VictimParallel()})


if __name__ == "__main__":
    main()
