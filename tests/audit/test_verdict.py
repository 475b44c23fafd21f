from __future__ import annotations

import math

import pytest
from scipy.stats import binom

from leakage.audit import Client
from leakage.audit.plan import Candidate, share_out
from leakage.audit.report import Figure, Measured
from leakage.audit.verdict import bounds, check_thresholds, decide, thresholds, victims_needed
from leakage.defenses import DPSGD
from leakage.metrics import wilson_interval


def measured(client: str, attack: str, **figures: Figure) -> Measured:
    return Measured(client, attack, True, 1, 10, 5.0, 1.0, figures, {}, [])


@pytest.mark.parametrize(
    ("low", "high", "reached", "decision"),
    [
        (0.06, 0.5, True, "exceeded"),
        (0.06, 0.5, False, "exceeded"),
        (0.05, 0.5, True, "inconclusive"),
        (0.0, 0.05, True, "within"),
        (0.0, 0.05, False, "inconclusive"),
        (0.0, 0.06, True, "inconclusive"),
        (math.nan, math.nan, True, "inconclusive"),
    ],
)
def test_decides_by_the_interval(low: float, high: float, reached: bool, decision: str) -> None:
    assert decide(0.05, Figure(0.5, low, high, 10), reached=reached) == decision
    # A mean, such as PSNR, has no more than its interval.
    assert decide(0.05, Figure(0.05, low, high, 10), reached=reached, share=False) == decision


@pytest.mark.parametrize("limit", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("victims", [1, 2, 3, 5, 8, 20, 100])
def test_a_limit_is_seldom_exceeded_by_chance(limit: float, victims: int) -> None:
    chance = 0.0
    for found in range(victims + 1):
        figure = Figure(found / victims, *wilson_interval(found / victims, victims), victims)
        if decide(limit, figure, reached=True) == "exceeded":
            chance += float(binom.pmf(found, victims, limit))
    assert chance <= 0.05


def test_every_limit_stands_beside_every_figure() -> None:
    clients = [Client(), Client(images=2)]
    bad, good = Figure(1.0, 0.7, 1.0, 10), Figure(0.0, 0.0, 0.04, 90)
    found = thresholds(
        {"success_rate": 0.05},
        clients,
        [
            measured("1 image", "labels", label_accuracy=bad),
            measured("1 image", "rgap", success_rate=bad),
            measured("1 image", "gauss_newton", success_rate=good),
        ],
        unreached=set(),
    )
    decisions = {(one.client, one.attack): one.decision for one in found}
    assert decisions == {
        ("1 image", "rgap"): "exceeded",
        ("1 image", "gauss_newton"): "within",
        ("2 images", ""): "inconclusive",
    }
    (late,) = thresholds(
        {"success_rate": 0.05}, clients[:1], [measured("1 image", "rgap", success_rate=good)], {"1 image"}
    )
    assert late.decision == "inconclusive"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"sucess": 0.1}, r"Expected `fail_above` to be one of \['identified'.* but got 'sucess'"),
        ({"success_rate": 1.5}, "Expected `fail_above` of success_rate as a share from 0 to 1, but got 1.5"),
        ({"psnr": math.inf}, "Expected `fail_above` of psnr as a finite number, but got inf"),
        ({"identified": True}, "Expected `fail_above` of identified as a share"),
    ],
)
def test_refuses_limits(limits: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_thresholds(limits)


def test_so_many_victims_are_needed() -> None:
    for limit in (0.3, 0.05, 0.01):
        needed = victims_needed(limit)
        assert wilson_interval(0.0, int(needed))[1] <= limit < wilson_interval(0.0, int(needed) - 1)[1]
    assert victims_needed(0.0) == math.inf


def test_bounds_are_of_declared_mechanisms_alone() -> None:
    assert bounds(Client(), 10, None) == []
    assert bounds(Client(defenses=[DPSGD(0.0, norm=1.0)]), 10, None) == []
    private = Client(images=2, defenses=[DPSGD(4.0, norm=1.0)])
    told, rebuilt = bounds(private, 99, Figure(0.0, 0.0, 0.01, 300))
    assert (told.metric, rebuilt.metric) == ("identified", "success_rate")
    assert 0.02 < told.value < 0.05
    assert 0.01 < rebuilt.value < told.value
    assert "ε = " in told.mechanism
    stronger = bounds(Client(images=2, defenses=[DPSGD(40.0, norm=1.0)]), 99, None)
    assert 0.02 < stronger[0].value < told.value
    # Four steps on both images have the bound of half the noise; with one image each, every image is used twice.
    steps = {"images": 2, "local_steps": 4, "learning_rate": 0.1, "defenses": [DPSGD(8.0, norm=1.0)]}
    assert bounds(Client(**steps), 99, None)[0].value == pytest.approx(told.value)
    halves = bounds(Client(local_batch_size=1, **steps), 99, None)[0]
    assert stronger[0].value < halves.value < told.value
    assert "2 steps with each image: ε = " in halves.mechanism


def test_little_attacks_get_what_they_ask_for_and_the_rest_is_shared_out() -> None:
    needs = [
        (Candidate("rgap", None), 0.01),
        (Candidate("gauss_newton", None, 20), 1.0),
        (Candidate("inverting_gradients", None, 4800, shortens=True), 0.1),
    ]
    shares = share_out(101.0, needs, [100, 100, 100])
    assert [share.seconds for share in shares] == [1.0, 50.0, 50.0]
    # As many steps as eight victims have time for, and no fewer than are worth it.
    assert [share.steps for share in shares] == [0, 0, 300]
    assert share_out(8001.0, needs, [100, 100, 100])[2].steps == pytest.approx(4800, abs=1)
    assert sum(share.expected_seconds for share in shares) <= 101.0
