"""The papers' settings, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from leakage.condensation import CondensationProtocol, GradientMatchingCondensation
from leakage.condensation.pool import MOMENTS
from leakage.condensation.protocols import LOOPS, condensation_protocol, schedule


def test_the_published_protocol_is_that_of_the_paper() -> None:
    assert condensation_protocol("published") == CondensationProtocol(
        iterations=1000,
        batch_size=256,
        network_reuse=1,
        learning_rate=0.1,
        momentum=0.5,
        decay=False,
        initialization="noise",
        real_images="random",
        pool=0,
    )
    assert LOOPS == {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


def test_the_fast_protocol_meets_few_networks_again_and_again() -> None:
    published, fast = condensation_protocol("published"), condensation_protocol("fast")
    assert published.pool == 0
    assert fast.pool > 0
    assert fast.iterations > 5 * fast.pool * len(MOMENTS)


def test_values_replace_those_of_the_protocol_and_none_keeps_them() -> None:
    published = condensation_protocol("published")
    values: dict[str, Any] = {"iterations": 3, "momentum": 0, "decay": True, "initialization": "real"}
    replaced = condensation_protocol("published", **values, learning_rate=None, batch_size=None)
    assert replaced == dataclasses.replace(published, **values)
    assert condensation_protocol("published") == published


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "slow"}, r"Expected `protocol` to be one of \['fast', 'published'\], but got 'slow'"),
    (
        {"initialization": "zeros"},
        r"Expected `initialization` to be one of \['kmeans', 'noise', 'real'\], but got 'zeros'",
    ),
    ({"real_images": "all"}, r"Expected `real_images` to be one of \['kmeans', 'random'\], but got 'all'"),
    ({"iterations": 0}, "Expected `iterations` to be a whole number of at least 1, but got 0"),
    ({"iterations": 1.5}, "Expected `iterations` to be a whole number of at least 1, but got 1.5"),
    ({"batch_size": 0}, "Expected `batch_size` to be a whole number of at least 1, but got 0"),
    ({"decay": "no"}, "Expected `decay` to be True or False, but got 'no'"),
    ({"network_reuse": 0}, "Expected `network_reuse` to be a whole number of at least 1, but got 0"),
    ({"learning_rate": 0.0}, "Expected `learning_rate` to be positive and finite, but got 0.0"),
    ({"learning_rate": float("inf")}, "Expected `learning_rate` to be positive and finite, but got inf"),
    ({"momentum": 1.0}, r"Expected `momentum` from 0 to below 1, but got 1\.0"),
    ({"momentum": -0.1}, r"Expected `momentum` from 0 to below 1, but got -0\.1"),
    ({"momentum": float("nan")}, "Expected `momentum` from 0 to below 1, but got nan"),
    ({"momentum": "0.5"}, "Expected `momentum` from 0 to below 1, but got '0.5'"),
    ({"momentum": True}, "Expected `momentum` from 0 to below 1, but got True"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_names_a_bad_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        condensation_protocol(**{"name": "published"} | options)


@pytest.mark.parametrize("images_per_class", LOOPS)
def test_the_schedule_is_the_papers_where_it_has_one(images_per_class: int) -> None:
    assert schedule(images_per_class, None) == LOOPS[images_per_class]
    assert schedule(images_per_class, (3, 7)) == (3, 7)


def test_any_number_of_images_has_a_schedule_if_it_is_given() -> None:
    assert schedule(7, [2, 5]) == (2, 5)
    with pytest.raises(
        ValueError, match=r"`loops` \(outer, inner\) with images_per_class=7, but got None.*\[1, 10, 20"
    ):
        schedule(7, None)


@pytest.mark.parametrize(
    ("loops", "message"),
    [
        ((0, 1), "Expected `loops` to be a whole number of at least 1, but got 0"),
        ((1, 0), "Expected `loops` to be a whole number of at least 1, but got 0"),
        ((1, 2.0), r"to be a whole number of at least 1, but got 2\.0"),
        ((1, 2, 3), r"Expected `loops` as two whole numbers \(outer, inner\), but got \(1, 2, 3\)"),
        (5, r"Expected `loops` as two whole numbers \(outer, inner\), but got 5"),
    ],
)
def test_names_bad_loops(loops: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(1, loops)


def test_the_rate_of_fast_grows_with_the_images_of_a_class() -> None:
    rates = [condensation_protocol("fast", count).learning_rate for count in (1, 10)]
    assert rates == pytest.approx([0.2, 2.0])
    assert condensation_protocol("fast", 10, learning_rate=0.3).learning_rate == 0.3
    assert condensation_protocol("published", 10).learning_rate == 0.1
    assert GradientMatchingCondensation(10, protocol="fast").protocol.learning_rate == pytest.approx(2.0)
