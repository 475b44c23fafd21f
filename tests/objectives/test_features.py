"""The distance of features from those that the last layer gives away."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from leakage import SharedGradient, Victim
from leakage.attacks import GradientInversion
from leakage.defenses import GaussianNoise
from leakage.dummies import InferredLabels, JointLabels
from leakage.models import ConvNet
from leakage.objectives import FeatureDistance, SquaredDistance
from leakage.objectives.terms import Point
from leakage.solvers import LBFGS, GaussNewton
from tests.kit import SmallVictims, fit, mean_error

LABELS = torch.tensor([[3, 8], [5, 5]])


def convnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(1, 12, 10, width=8, depth=2, norm="none").eval()


def setting(**options: Any) -> tuple[Victim, torch.Tensor, SharedGradient]:
    victim = Victim(convnet(), image_shape=(1, 12, 12), num_images=2, **options)
    images = torch.rand(2, 2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    return victim, images, victim.share(images, LABELS, reveal_labels=True)


def at(victim: Victim, images: torch.Tensor) -> Point:
    """The point of one victim, with the activations that the term asks for."""
    targets = nn.functional.one_hot(LABELS[0], 10).float()
    (name,) = FeatureDistance().watched(victim)
    gradients, activations = victim.evaluate(victim.state, images, targets, [name])
    return Point(images, targets, gradients, gradients, activations, victim.state)


def test_is_zero_at_the_true_images_alone() -> None:
    victim, images, shared = setting()
    term = FeatureDistance()
    kept = term.begin(shared, victim)
    assert {name: tensor.shape[1:] for name, tensor in kept.items()} == {
        name: tensor.shape[1:] for name, tensor in term.state(victim, torch.float32).items()
    }
    assert kept["scale"].tolist() == [1, 1]
    own = {name: tensor[0] for name, tensor in kept.items()}
    assert float(term.value(at(victim, images[0]), own)) < 1e-8
    assert float(term.value(at(victim, images[0].flip(0)), own)) > 1e-4
    point = at(victim, 1 - images[0])
    torch.testing.assert_close(term.residuals(point, own).square().sum(), term.value(point, own))
    (seen,) = point.activations.values()
    relative = (seen.inputs - own["features"]).norm(dim=1) / own["features"].norm(dim=1)
    torch.testing.assert_close(term.value(point, own), relative.square().mean())


def test_features_that_do_not_explain_the_gradient_are_left_out() -> None:
    victim, _, shared = setting()
    wrong = dataclasses.replace(shared, labels=LABELS + torch.tensor([[0], [1]]))
    kept = FeatureDistance().begin(wrong, victim)
    assert kept["scale"].tolist() == [1, 0]
    assert bool(kept["features"].isfinite().all())
    defended, _, shared = setting(defenses=[GaussianNoise(0.1, relative=True)])
    assert FeatureDistance().begin(shared, defended)["scale"].tolist() == [0, 0]


def test_images_of_a_batch_come_apart() -> None:
    """Which the same search without their features does not manage; the lanes are counted automatically."""

    def error(objective: Any) -> float:
        attack = GradientInversion(objective=objective, labels=InferredLabels(), solver=LBFGS(max_evaluations=60))
        return mean_error(fit(attack, SmallVictims(victims=2, images=2, model=convnet(), labels="single-class")))

    assert error(SquaredDistance() + FeatureDistance()) < 0.7 * error(SquaredDistance())


@pytest.mark.parametrize("kind", [LBFGS, GaussNewton])
def test_every_solver_takes_it(kind: Any) -> None:
    start, end = (
        fit(
            GradientInversion(objective=SquaredDistance() + FeatureDistance(), solver=kind(max_evaluations=most)),
            SmallVictims(victims=2),
        ).finished.loss
        for most in (1, 6)
    )
    assert bool((end < 0.5 * start).all()), (start, end)


def test_victims_without_features() -> None:
    steps = Victim(convnet(), image_shape=(1, 12, 12), num_images=2, local_steps=2, learning_rate=0.1)
    term = FeatureDistance(required=False)
    term.check(steps)
    single = Victim(convnet(), image_shape=(1, 12, 12))
    for victim in (steps, single):
        assert (term.watched(victim), term.state(victim, torch.float32)) == ((), {})
    assert FeatureDistance().watched(single) == ["classifier"]
    image = torch.rand(2, 1, 12, 12)
    point = Point(image, torch.zeros(2, 10), {}, {}, {}, {})
    assert float(term.value(point, {})) == 0
    with pytest.raises(ValueError, match="Expected victims of one local step"):
        FeatureDistance().check(steps)
    many = Victim(convnet(), image_shape=(1, 12, 12), num_images=10)
    with pytest.raises(ValueError, match="Expected at most 9 images"):
        FeatureDistance().check(many)


def test_labels_must_be_known_before_the_search() -> None:
    attack = GradientInversion(objective=SquaredDistance() + FeatureDistance(), labels=JointLabels())
    with pytest.raises(ValueError, match="Expected labels that are known before the search for FeatureDistance"):
        fit(attack, SmallVictims(victims=1))
    with pytest.raises(ValueError, match="Expected `required` to be True or False, but got 1"):
        FeatureDistance(required=1)  # type: ignore[arg-type]
