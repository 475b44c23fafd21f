"""Pixels in a box."""

from __future__ import annotations

from typing import Any

import pytest

from leakage.attacks import GradientInversion
from leakage.dummies import Pixels
from leakage.solvers import LBFGS, Adam
from tests.kit import mean_error


@pytest.mark.parametrize("solver", [LBFGS(max_evaluations=200), Adam(lr=0.05, steps=200)], ids=["LBFGS", "Adam"])
def test_a_box_is_kept_and_does_not_keep_images_from_being_found(kit: Any, solver: Any) -> None:
    found = {}
    for box in (None, (0.0, 1.0)):
        attack = GradientInversion(images=Pixels(box=box), solver=solver)
        found[box] = kit.fit(attack, kit.victims(victims=3))
    inside = found[(0.0, 1.0)].finished.images
    assert 0 <= inside.min() < inside.max() <= 1
    assert bool((found[None].finished.images.min() < 0) | (found[None].finished.images.max() > 1)), "it takes a box"
    assert mean_error(found[(0.0, 1.0)]) < 5e-3


@pytest.mark.parametrize("box", [1, ("0", "1"), (0, 1, 2), [0]])
def test_a_box_is_two_numbers(box: Any) -> None:
    with pytest.raises(ValueError, match="Expected `box` as two numbers, but got "):
        Pixels(box=box)


@pytest.mark.parametrize("box", [(1, 0), (0, 0), (0, float("nan"))])
def test_a_box_has_room(box: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected `box` as the smallest and largest value of a pixel, but got \("):
        Pixels(box=box)
