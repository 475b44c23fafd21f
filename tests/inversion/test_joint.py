"""Objectives of lanes in joint passes, against each victim differentiated for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.dummies import Group, JointLabels, Pixels, RevealedLabels
from leakage.inversion import evaluator as evaluator_module
from leakage.inversion.evaluator import Evaluator
from leakage.models import ConvNet, ResNet20
from leakage.objectives import (
    L2,
    BatchNormStatistics,
    CosineDistance,
    Distance,
    RowCosineDistance,
    SquaredDistance,
    Term,
    TotalVariation,
)
from leakage.objectives.terms import Point

SHAPE, CLASSES, VICTIMS = (3, 8, 8), 5, 3


class Looking(Term):
    """Looks at everything."""

    def watched(self, victim: Any) -> list[str]:
        return ["features.0"]

    def value(self, point: Any, kept: Any) -> Tensor:
        gradient, wanted = point.gradients["classifier.weight"], point.shared["classifier.weight"]
        seen = point.activations["features.0"].outputs
        weight = point.state["features.0.weight"]
        return (
            (gradient * wanted).sum() * seen.square().mean()
            + weight.sum() * point.images.mean()
            + (point.targets * point.targets.roll(1, -1)).sum()
        )


class Tall(Distance):
    """A distance of a user's own."""

    def __call__(self, gradients: Any, shared: Any) -> Tensor:
        return torch.stack([(gradients[name] - shared[name]).pow(4).sum() for name in shared]).sum()


def statistics(model: nn.Module) -> nn.Module:
    """With those of a network that has seen images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval().double()


def share(model: nn.Module, own: bool, generator: torch.Generator) -> tuple[Victim, SharedGradient]:
    victim = Victim(statistics(model), image_shape=SHAPE, num_images=2)
    images = torch.rand(VICTIMS, 2, *SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (VICTIMS, 2), generator=generator)
    states = victim.fresh_states([*range(VICTIMS)]) if own else None
    return victim, victim.share(images, labels, states=states, reveal_labels=True)


OBJECTIVES = {
    "inverting gradients": CosineDistance() + 1e-2 * TotalVariation(),
    "grad inversion": SquaredDistance() + 1e-2 * TotalVariation() + 1e-3 * L2() + 0.1 * BatchNormStatistics(),
    "rows": 0.5 * RowCosineDistance(),
    "of one's own": Tall() + 2 * Looking(),
}


@pytest.mark.parametrize(("seeds", "own"), [(1, False), (3, True)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_they_are_those_of_each_for_itself(
    objective: str, seeds: int, own: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, shared = share(ResNet20(3, 8, CLASSES, width=4), own, generator)
    images = Pixels() if seeds == 1 else Group(Pixels(), seeds=seeds, weight=0.3)
    found = {}
    for joint in (True, False):
        if not joint:
            monkeypatch.setattr(evaluator_module, "has_joint_pass", lambda *_: False)
        evaluator = Evaluator(victim, OBJECTIVES[objective], images, JointLabels())
        evaluator.prepare(shared.gradients["classifier.bias"])
        draw = torch.Generator().manual_seed(1)
        unknowns = {
            name: torch.rand(VICTIMS, *shape, generator=draw, dtype=torch.float64)
            for name, shape in evaluator.shapes().items()
        }
        kept = evaluator.begin(shared)
        for name, tensor in kept.items():
            if name.endswith("scale"):
                kept[name] = tensor * torch.arange(1, VICTIMS + 1)
        found[joint] = evaluator(shared, kept, unknowns)
        evaluator.at_once = 2  # and in pieces
        torch.testing.assert_close(evaluator(shared, kept, unknowns), found[joint], rtol=1e-9, atol=1e-12)
    assert set(found[True][1]) == {"images", "labels"}
    for by in found[False][1].values():
        assert bool(by.flatten(1).abs().amax(1).gt(0).all())
    torch.testing.assert_close(found[True], found[False], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_networks_with_statistics_of_the_batch_are_differentiated_as_before(
    norm: str, generator: torch.Generator
) -> None:
    model = ConvNet(3, 8, CLASSES, width=4, norm=norm)
    victim = Victim(model.train(), image_shape=SHAPE, num_images=2)
    images = torch.rand(VICTIMS, 2, *SHAPE, generator=generator)
    shared = victim.share(images, torch.zeros(VICTIMS, 2, dtype=torch.long), reveal_labels=True)
    evaluator = Evaluator(victim, CosineDistance(), Pixels(), RevealedLabels())
    losses, gradients = evaluator(shared, evaluator.begin(shared), {"images": images})
    assert evaluator._joint is (norm == "instance")
    assert float(losses.max()) < 1e-10
    assert gradients["images"].shape == images.shape


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_smoothed_networks_are_those_of_each_for_itself(
    pooling: str, own: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each victim as sharp as its solver wants, and as large as its own activations are."""
    model = ConvNet(3, 8, CLASSES, width=4, depth=2, norm="none", pooling=pooling, activation="leaky_relu")
    victim, shared = share(model, own, generator)
    images = torch.rand(VICTIMS, 2, *SHAPE, generator=generator, dtype=torch.float64)
    steering = {
        "steering/sharpness": torch.tensor([1.0, 5.0, 30.0], dtype=torch.float64),
        "steering/fading": torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64),
    }
    found = {}
    for joint in (True, False):
        monkeypatch.setattr(evaluator_module, "has_joint_pass", lambda *_, joint=joint: joint)
        evaluator = Evaluator(victim, CosineDistance() + 0.1 * TotalVariation(), Pixels(), RevealedLabels())
        found[joint] = evaluator(shared, evaluator.begin(shared) | steering, {"images": images})
    torch.testing.assert_close(found[True], found[False], rtol=1e-9, atol=1e-12)
    plain = evaluator(shared, evaluator.begin(shared), {"images": images})
    assert bool((plain[0] - found[False][0]).abs().gt(1e-4).all())


@pytest.mark.parametrize("joint", [False, True])
def test_victims_without_smoothing_are_evaluated_beside_others(
    joint: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ConvNet(3, 8, CLASSES, width=4, depth=2, norm="none", pooling="max")
    victim, shared = share(model, True, generator)
    images = torch.rand(VICTIMS, 2, *SHAPE, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(evaluator_module, "has_joint_pass", lambda *_: joint)
    evaluator = Evaluator(victim, CosineDistance() + 0.1 * TotalVariation("smooth"), Pixels(), RevealedLabels())

    def evaluate(*sharpness: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        steering = {"steering/sharpness": torch.tensor(sharpness).double(), "steering/fading": torch.ones(VICTIMS)}
        kept = evaluator.begin(shared) | steering
        losses, gradients = evaluator(shared, kept, {"images": images})
        return losses, gradients["images"], evaluator.equations(shared, kept, images.flatten(1))

    mixed, smooth, sharp = evaluate(5.0, torch.inf, 30.0), evaluate(5.0, 5.0, 30.0), evaluate(*[torch.inf] * 3)
    plain, gradients = evaluator(shared, evaluator.begin(shared), {"images": images})
    torch.testing.assert_close(sharp[:2], (plain, gradients["images"]))
    torch.testing.assert_close(mixed[2].square().sum(1), mixed[0])
    for found, with_kinks, without in zip(mixed, sharp, smooth, strict=True):
        torch.testing.assert_close(found[1], with_kinks[1])
        torch.testing.assert_close(found[[0, 2]], without[[0, 2]])
        assert not torch.allclose(without[1], with_kinks[1], rtol=1e-3)


def points(scale: float, generator: torch.Generator, near: float) -> Any:
    shared = {"w": torch.randn(VICTIMS, 4, 3, generator=generator), "b": torch.randn(VICTIMS, 4, generator=generator)}
    gradients = {
        name: scale * (tensor + near * torch.randn(tensor.shape, generator=generator))
        for name, tensor in shared.items()
    }
    return Point(torch.zeros(VICTIMS, 1), torch.zeros(VICTIMS, 1), gradients, shared, {}, {})


@pytest.mark.parametrize("scale", [1.0, 1e-25, 0.0])
@pytest.mark.parametrize("near", [1.0, 1e-4])
def test_slopes_of_the_cosine_distance(scale: float, near: float, generator: torch.Generator) -> None:
    """Of gradients whose squares vanish too, and with the digits of a small distance."""
    given = points(scale, generator, near)
    values, slopes = CosineDistance().slopes(given, {}, False)
    for kind in (given.gradients, given.shared):
        for name in kind:
            kind[name] = kind[name].double()
    expected, by = Term.slopes(CosineDistance(), given, {}, False)
    torch.testing.assert_close(values.double(), expected, rtol=1e-3 if near < 1 else 1e-5, atol=0)
    assert slopes.keys() == by.keys() == {("gradients", "w"), ("gradients", "b")}
    for key, slope in slopes.items():
        largest = float(by[key].abs().max())
        torch.testing.assert_close(slope.double(), by[key], rtol=0, atol=(1e-2 if near < 1 else 1e-5) * largest)
