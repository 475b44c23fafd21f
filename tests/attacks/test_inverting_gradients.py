from __future__ import annotations

from typing import Any

import pytest

from leakage.attacks import InvertingGradientsAttack


def test_the_published_protocol_has_the_papers_values() -> None:
    for attack in (InvertingGradientsAttack(), InvertingGradientsAttack(protocol="published")):
        assert repr(attack.objective) == "CosineDistance() + 0.01 * TotalVariation(kind='anisotropic')"
        assert repr(attack.images) == "Pixels(start='noise', std=1.0, box=(0, 1))"
        solver: Any = attack.solver
        assert (solver.lr, solver.steps, solver.schedule, solver.noise) == (0.1, 4800, "steps", 0.0)


def test_values_are_replaced_one_by_one() -> None:
    attack = InvertingGradientsAttack(total_variation=0.0, lr=0.05, steps=7, start_std=0.5)
    solver: Any = attack.solver
    assert (repr(attack.objective), solver.lr, solver.steps) == ("CosineDistance()", 0.05, 7)
    assert repr(attack.images) == "Pixels(start='noise', std=0.5, box=(0, 1))"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "fast"}, r"Expected `protocol` to be one of \['published'\], but got 'fast'"),
        ({"total_variation": -1.0}, "Expected `total_variation` of at least 0, but got -1.0"),
        ({"start_std": 0.0}, "Expected `start_std` to be positive and finite, but got 0.0"),
        ({"steps": 0}, "Expected `steps` to be a whole number of at least 1, but got 0"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InvertingGradientsAttack(**options)
