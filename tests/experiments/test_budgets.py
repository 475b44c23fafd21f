"""As many iterations as fit into some minutes."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import budgets  # in experiments/condensation, which conftest.py has put on the path
import pytest
from budgets import Schedule, fit_schedule, read_schedule

from leakage.callbacks import SyntheticEvaluation
from leakage.condensation import GradientMatchingCondensation
from leakage.datamodules import LabelledImages
from leakage.models import ConvNet

TRAINER = {"accelerator": "cpu"}


def make(iterations: int) -> GradientMatchingCondensation:
    return GradientMatchingCondensation(network=ConvNet(width=4), iterations=iterations)


def timed(
    monkeypatch: pytest.MonkeyPatch, *, iteration: float, test: float, first: float = 0.0, before: float = 0.0
) -> None:
    """A run that takes as long as it is said."""
    clock = [0.0]
    monkeypatch.setattr(budgets, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Run:
        def __init__(self, *, callbacks: list[Any], **options: Any) -> None:
            self.callbacks = callbacks

        def fit(self, condensation: GradientMatchingCondensation, datamodule: LabelledImages) -> None:
            clock[0] += before
            self.callbacks[0].on_train_batch_start(None, condensation, None, 0)
            for visit in range(condensation.protocol.iterations):
                clock[0] += iteration + (first if visit == 0 else 0)
                condensation.step += condensation.outer
                self.callbacks[0].on_train_batch_end(None, condensation, None, None, 0)
            clock[0] += test
            condensation.seconds["evaluation"] = test

    monkeypatch.setattr(budgets, "Trainer", Run)


def fitted(budget: float, moments: Any = None, watch: bool = True) -> tuple[Schedule, str]:
    watching = SyntheticEvaluation((), networks=1) if watch else None
    return fit_schedule(make, LabelledImages("sample"), budget, watching, moments, 30, TRAINER)


def test_all_fits_into_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, iteration=10, test=20, first=30, before=5)
    schedule, words = fitted(20)
    # Timing took 5 + 40 + 10 + 20 s; then 5 s come before, 30 s more in the first iteration, and 4 tests.
    iterations = int((0.95 * (1200 - 75 - 5 - 80) - 30) / 10)
    assert schedule == Schedule(20, iterations, (24, 48, 71), True)
    assert f"{iterations} iterations, 1 of 40 s and the rest of 10 s, and 4 tests of 20 s on held-out images" in words
    assert "Expected time: 18 minutes per set, and 10 for its tests afterwards. Timing took 75 s" in words


def test_networks_that_are_kept_are_made_in_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks with three states each: six iterations of 10 s, of which others take 2."""
    monkeypatch.setitem(sys.modules, "leakage.condensation.pool", SimpleNamespace(MOMENTS=(0, 2, 5)))
    timed(monkeypatch, iteration=10, test=0)
    real = make

    def with_pool(passes: int | None, iterations: int) -> GradientMatchingCondensation:
        made = real(iterations)
        made.protocol = SimpleNamespace(pool=2, pool_passes=passes, iterations=iterations)  # type: ignore[assignment]
        made.seconds |= {"real": 14.0, "network": 10.0, "synthetic": 6.0}
        return made

    for minutes, passes, iterations in (
        (10, None, int(6 + (0.95 * 570 - 60) / 2)),
        (1, None, int(0.95 * 30 / 10)),
        (10, 4, int(6 + (0.95 * 570 - 60) / 4)),  # a quarter of the later ones are of new networks, 8 s more
    ):
        schedule, _ = fit_schedule(
            partial(with_pool, passes), LabelledImages("sample"), minutes, None, None, 0, TRAINER
        )
        assert schedule.iterations == iterations


def test_tests_take_a_quarter_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, iteration=1, test=60)
    schedule, _ = fitted(10)
    assert schedule.moments == (int(0.95 * (600 - 62 - 120)) // 2,)
    schedule, _ = fitted(3)
    assert (schedule.moments, schedule.watches) == ((), False)
    assert schedule.iterations == int(0.95 * (180 - 62))
    schedule, _ = fitted(10, moments=(5, 0, 5))
    assert schedule == Schedule(10, int(0.95 * (600 - 62 - 180)), (5, 0, 5), True)


def test_no_tests_where_nothing_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, iteration=10, test=0)
    assert fitted(10, watch=False)[0] == Schedule(10, int(0.95 * 580 / 10), (), False)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.5, "Expected a `budget` of at least 1.9 minutes, for the preparation and one network, but got 0.5"),
        (1.7, "Expected a `budget` of at least 1.9 minutes"),
        (0, "Expected `budget` to be positive and finite, but got 0"),
        (float("inf"), "Expected `budget` to be positive and finite, but got inf"),
    ],
)
def test_too_small(monkeypatch: pytest.MonkeyPatch, budget: float, message: str) -> None:
    timed(monkeypatch, iteration=30, test=20)
    with pytest.raises(ValueError, match=message):
        fitted(budget)
    assert fitted(1.9)[0] == Schedule(1.9, 1, (), False)
    with pytest.raises(ValueError, match=r"Expected a `budget` of at least 2\.6 minutes"):
        fitted(1.9, moments=(5,))


def test_a_real_run() -> None:
    watch = SyntheticEvaluation((), networks=1, epochs=2)
    data = LabelledImages("sample", batch_size=4)
    schedule, words = fit_schedule(make, data, 5, watch, None, 30, TRAINER)
    assert schedule.iterations is not None
    assert schedule.iterations > 1
    assert "minutes per set" in words


def test_read_again(tmp_path: Path) -> None:
    assert read_schedule(tmp_path, 5.0) is None
    path = tmp_path / "budget.json"
    path.write_text(json.dumps({"budget": 5.0, "iterations": 7, "moments": [2, 4], "watches": True}))
    assert read_schedule(tmp_path, 5.0) == Schedule(5.0, 7, (2, 4), True)
    for budget in (6.0, None):
        with pytest.raises(ValueError, match=f"Expected the `budget` of the run in '.*', 5.0, but got {budget}"):
            read_schedule(tmp_path, budget)
    for broken in ("{", "[]", '{"budget": 5.0}', '{"budget": 5.0, "iterations": 7, "moments": ["x"]}'):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"Expected '.*budget.json' to hold a schedule, but got another file"):
            read_schedule(tmp_path, 5.0)
