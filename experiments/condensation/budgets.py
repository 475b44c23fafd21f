"""How many iterations of a condensation fit into some minutes, with tests along the way."""

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

# Of what is left for iterations, as they don't all take the same time.
_USED = 0.95
# The most of a budget that tests along the way may take, and how many there are at most, the last one included.
_WATCHING, _LOOKS = 0.25, 4


@dataclass(frozen=True)
class Schedule:
    """How long to condense, and when to test the images on held-out training images.

    Attributes:
        budget: minutes that it was made for, None where the protocol or the user says how many iterations.
        iterations: None for those of the protocol or of the user.
        moments: iterations after which the images are tested, besides the last.
        watches: whether there is any such test.
    """

    budget: float | None
    iterations: int | None
    moments: tuple[int, ...]
    watches: bool = True


class Stopwatch(Callback):
    """When training began, and when each iteration was over, in seconds of a clock that only goes on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time, if nothing has been done yet."""
        if not self.times:
            self.times.append(time.monotonic())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, if an iteration is complete."""
        assert isinstance(pl_module, Condensation)
        if pl_module.step % pl_module.outer == 0:
            self.times.append(time.monotonic())


def read_schedule(folder: Path, budget: float | None) -> Schedule | None:
    """The one that an earlier run of a method made for its budget, None if there is none.

    Raises:
        ValueError: it was made for another budget, or the file is damaged.
    """
    path = folder / "budget.json"
    if not path.is_file():
        return None
    try:
        found = Schedule(**json.loads(path.read_text(encoding="utf-8")))
        moments = tuple(int(moment) for moment in found.moments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected '{path}' to be whole, but got another file ({error}). Remove it.") from error
    if found.budget != budget:
        raise ValueError(
            f"Expected the `budget` of the run in '{folder}', {found.budget}, but got {budget}. Choose another "
            "`output`, or don't resume."
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
    """Time a few iterations and a test, and find out how many fit.

    Args:
        make: a condensation with so many iterations.
        data: that is condensed.
        budget: minutes.
        watch: the test along the way, with no moments but the end; None for none.
        moments: when it takes place; by default evenly spread, and so few that they take a quarter of the budget.
        tested: how many times as long as the one test along the way those of a set take when it is made.
        trainer: options of the Trainer.

    Returns:
        The schedule, and the expected time in words.

    Raises:
        ValueError: a budget that is not positive, or too small for one iteration.
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
        # Each state of each network is made at its first visit; later ones take the time of the synthetic images alone.
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
            f"Expected a `budget` of at least {least} minutes, for one network and what comes before, but got "
            f"{budget:g}."
        )
    left = _USED * (seconds - whole - before - looks * test)
    iterations = int(left / early) if left < count * early else int(count + (left - count * early) / late)
    if moments is None:
        moments = sorted({round(iterations * look / looks) for look in range(1, looks)} - {0, iterations})
    schedule = Schedule(budget, iterations, tuple(moments), watches=looks > 0)
    first = min(count, iterations)
    expected = (before + first * early + (iterations - first) * late + looks * test) / 60
    words = (
        f"{iterations} iterations, {first} of {early:.2g} s and then of {late:.2g} s, and {looks} "
        f"test{'s' * (looks != 1)} of {test:.2g} s on held-out images. Expected are {expected:.2g} minutes a set, and "
        f"{tested * test / 60:.2g} for its tests afterwards; {math.floor(whole):d} s went into finding out"
    )
    return schedule, words


def _states_of_a_network() -> int:
    from leakage.condensation.pool import MOMENTS

    return len(MOMENTS)
