"""Finds the number of iterations of a condensation, and of tests during it, that fit into a time budget."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leakage.callbacks import SyntheticEvaluation
from leakage.condensation import Condensation
from leakage.datamodules import LabelledImages
from leakage.errors import check_positive

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from records import trainer_defaults

# Share of the remaining time that is planned for iterations, since their times vary.
_USED = 0.95
# The largest share of a budget for tests during the run, and the most tests, including the last one.
_WATCHING, _LOOKS = 0.25, 4


@dataclass(frozen=True)
class Schedule:
    """How long to condense, and when to test the images on held-out training images.

    Attributes:
        budget: the time budget in minutes, or None if the protocol or the user sets the iterations.
        iterations: number of iterations, or None if the protocol or the user sets it.
        moments: iterations after which the images are tested, besides the last.
        watches: whether there are such tests.
    """

    budget: float | None
    iterations: int | None
    moments: tuple[int, ...]
    watches: bool = True


class Stopwatch(Callback):
    """Records when training began and when each iteration ended, in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the time before the first batch."""
        if not self.times:
            self.times.append(time.monotonic())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the time if an iteration is complete."""
        assert isinstance(pl_module, Condensation)
        if pl_module.step % pl_module.outer == 0:
            self.times.append(time.monotonic())


def read_schedule(folder: Path, budget: float | None) -> Schedule | None:
    """Read the schedule that an earlier run of a method made for its budget, or None if there is none.

    Raises:
        ValueError: the schedule was made for another budget, or the file is damaged.
    """
    path = folder / "budget.json"
    if not path.is_file():
        return None
    try:
        found = Schedule(**json.loads(path.read_text(encoding="utf-8")))
        moments = tuple(int(moment) for moment in found.moments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected '{path}' to hold a schedule, but got another file ({error}). Remove it.") from error
    if found.budget != budget:
        raise ValueError(
            f"Expected the `budget` of the run in '{folder}', {found.budget}, but got {budget}. Choose another "
            "`output`, or do not resume."
        )
    return Schedule(found.budget, found.iterations, moments, found.watches)


def fit_schedule(
    make: Callable[[int], Condensation],
    data: LabelledImages,
    budget: float,
    watch: SyntheticEvaluation | None,
    moments: Sequence[int] | None,
    tested: float,
    trainer: dict[str, Any],
) -> tuple[Schedule, str]:
    """Time a few iterations and a test, and compute how many fit into the budget.

    Args:
        make: returns a condensation with the given number of iterations.
        data: the data set to condense.
        budget: time for a set in minutes.
        watch: the test during the run, with no moments except the end; None for no tests.
        moments: iterations of the tests; by default evenly spaced, and few enough to take at most a quarter of the
            budget.
        tested: the time of the final tests of a set, as a multiple of the time of one test during the run.
        trainer: options of the Trainer.

    Returns:
        The schedule, and a description of it with the expected times.

    Raises:
        ValueError: the budget is not positive, or too small for one iteration.
    """
    check_positive(budget=budget)
    seconds = 60 * budget
    pool, passes = make(1).protocol.pool, make(1).protocol.pool_passes
    probe = make(_states_of_a_network() if pool else 2)
    stopwatch = Stopwatch()
    options = trainer_defaults() | {"log_every_n_steps": 1} | trainer | {"enable_progress_bar": False}
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        callbacks: list[Callback] = [stopwatch, *([watch] if watch is not None else [])]
        options |= {"default_root_dir": folder, "enable_checkpointing": False}
        Trainer(logger=False, callbacks=callbacks, **options).fit(probe, datamodule=data)
    whole = time.monotonic() - began
    start, *ends = stopwatch.times
    test = probe.seconds["evaluation"]
    before = max(0.0, whole - (ends[-1] - start) - test)
    if pool:
        # A state of a network is made at its first visit; later visits take only the time of the synthetic images.
        count, early = pool * len(ends), (ends[-1] - start) / len(ends)
        made = probe.seconds["real"] + probe.seconds["network"]
        late = max(0.0, ends[-1] - start - made) / len(ends)
        if passes:
            late += (early - late) / passes
    else:
        count, early, late = 1, ends[0] - start, ends[1] - ends[0]
    looks = len(set(moments)) + 1 if moments is not None else _LOOKS
    if watch is None or not test:
        looks = 0
    elif moments is None:
        looks = min(looks, int(_WATCHING * seconds / test))
    needed = whole + before + early / _USED
    while moments is None and looks and needed + looks * test > seconds:
        looks -= 1
    if needed + looks * test > seconds:
        least = math.ceil((needed + looks * test) / 6) / 10
        raise ValueError(
            f"Expected a `budget` of at least {least} minutes, for the preparation and one network, but got {budget:g}."
        )
    left = _USED * (seconds - whole - before - looks * test)
    iterations = int(left / early) if left < count * early else int(count + (left - count * early) / late)
    if moments is None:
        moments = sorted({round(iterations * look / looks) for look in range(1, looks)} - {0, iterations})
    schedule = Schedule(budget, iterations, tuple(moments), watches=looks > 0)
    first = min(count, iterations)
    expected = (before + first * early + (iterations - first) * late + looks * test) / 60
    words = (
        f"{iterations} iterations, {first} of {early:.2g} s and the rest of {late:.2g} s, and {looks} "
        f"test{'s' * (looks != 1)} of {test:.2g} s on held-out images. Expected time: {expected:.2g} minutes per set, "
        f"and {tested * test / 60:.2g} for its tests afterwards. Timing took {math.floor(whole):d} s"
    )
    return schedule, words


def _states_of_a_network() -> int:
    from leakage.condensation.pool import MOMENTS

    return len(MOMENTS)
