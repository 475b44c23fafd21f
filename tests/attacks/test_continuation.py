"""ContinuationAttack: exact without kinks, with its levels and finish where there are some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leakage.attacks import ContinuationAttack
from leakage.defenses import GaussianNoise
from leakage.models import ConvNet
from leakage.objectives import FeatureDistance
from leakage.solvers import GaussNewton


@pytest.mark.slow
def test_networks_without_kinks_give_images_to_float_precision(kit: Any) -> None:
    """At once: there is nothing to smooth."""
    torch.manual_seed(0)
    model = ConvNet(1, 12, 10, width=8, depth=2, norm="none", activation="tanh", pooling="average").eval()
    attack = kit.fit(ContinuationAttack(), kit.victims(victims=2, model=model, weights="shared"))
    assert all(score.mse < 1e-6 for score in attack.scores.values()), attack.scores
    assert max(attack.finished.evaluations) <= 40


def test_the_finish_lowers_the_distance_that_the_levels_end_with(kit: Any) -> None:
    """Not with a defense, which a search without a prior would fit too."""
    torch.manual_seed(0)
    model = ConvNet(1, 12, 10, width=8, depth=2, norm="none").eval()

    def short(finish: bool) -> ContinuationAttack:
        attack = ContinuationAttack(max_evaluations=4, start_steps=0, restarts=0)
        solver: Any = attack.solver
        solver.solver.max_products = 5
        solver.finish = GaussNewton(max_evaluations=4, max_products=5) if finish else None
        return attack

    losses, evaluations = {}, {}
    for finish in (True, False):
        attack = short(finish)
        kit.fit(attack, kit.victims(victims=2, model=model, weights="shared"))
        losses[finish], evaluations[finish] = attack.finished.loss, attack.finished.evaluations
    assert bool((losses[True] < losses[False]).all())
    assert bool((evaluations[False] == 4).all())
    assert bool((evaluations[True] > 4).all())
    defended = kit.victims(victims=1, model=model, weights="shared", defenses=[GaussianNoise(1e-4)])
    assert kit.fit(short(True), defended).finished.evaluations.tolist() == [4]


def test_kinks_that_cannot_be_smoothed_are_named_and_kept_or_refused(kit: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 150), nn.ReLU(), nn.Softshrink(0.01), nn.Linear(150, 10))
    victims = kit.victims(victims=1, model=model, weights="shared")
    with pytest.raises(ValueError, match=r"kinks can be smoothed, but got one with softshrink\. Pass unsmoothed="):
        kit.fit(ContinuationAttack(unsmoothed="refuse"), victims)
    attack = ContinuationAttack(max_evaluations=4, start_steps=2, restarts=0)
    attack.solver.finish = None  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"The kinks of softshrink can't be smoothed\. They stay as they are"):
        kit.fit(attack, victims)
    assert attack.finished.evaluations.tolist() == [6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_variation": (0.1, -1.0)}, "Expected `total_variation` of at least 0, but got -1.0"),
        ({"total_variation": ()}, "Expected `total_variation` with at least one weight, but got none"),
        ({"total_variation": -1.0}, "Expected `total_variation` of at least 0, but got -1.0"),
        ({"features": -1.0}, "Expected `features` of at least 0, but got -1.0"),
        ({"start_std": 0.0}, "Expected `std` to be positive and finite, but got 0.0"),
        ({"start_steps": -1}, "Expected `start_steps` to be a whole number of at least 0, but got -1"),
        ({"max_evaluations": 0}, "Expected `max_evaluations` to be a whole number of at least 1, but got 0"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuationAttack(**options)


def test_each_start_has_its_own_prior_and_the_nearest_is_kept(kit: Any) -> None:
    """The objectives at the end, without a prior, decide."""
    torch.manual_seed(0)
    model = ConvNet(1, 12, 10, width=8, depth=2, norm="none").eval()
    losses = []
    for weights in ((5.0,), (5.0, 0.02)):
        attack = ContinuationAttack(total_variation=weights, max_evaluations=4, start_steps=20)
        solver: Any = attack.solver
        solver.solver.max_products = 5
        solver.finish.max_evaluations = 1
        kit.fit(attack, kit.victims(victims=2, model=model, weights="shared"))
        assert attack.finished.restarts.tolist() == [len(weights) - 1] * 2
        losses.append(attack.finished.loss[attack.finished.ids.argsort()])
    assert bool((losses[1] < 0.5 * losses[0]).all()), losses


def test_images_match_their_features_unless_told_otherwise() -> None:
    terms = {weight: type(term) for weight, term in ContinuationAttack().objective.parts()}
    assert terms[0.1] is FeatureDistance
    assert repr(ContinuationAttack().solver.start).startswith("SignedAdam(lr=0.1, steps=600,")  # type: ignore[attr-defined]
    without = ContinuationAttack(features=0.0).objective
    assert repr(without) == "CosineDistance() + 0.2 * TotalVariation(kind='smooth')"
