"""Objectives of an attack that knows the clients' defenses: against plain autograd, and at the truth."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from leakage.attacks import GaussNewtonAttack
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.defenses import (
    DPSGD,
    Clip,
    Defense,
    GaussianNoise,
    LaplaceNoise,
    Quantise,
    RandomPruning,
    Sign,
    Soteria,
    TopK,
)
from leakage.dummies import JointLabels, Pixels, RevealedLabels
from leakage.inversion import evaluator as evaluator_module
from leakage.inversion.evaluator import Evaluator
from leakage.models import LeNet
from leakage.objectives import CosineDistance, SquaredDistance, Term

SHAPE, CLASSES, VICTIMS = (2, 8, 8), 5, 3
DEFENSES: dict[str, list[Defense]] = {
    "clip": [Clip(0.05)],
    "clip nothing": [Clip(1e6)],
    "top k": [TopK(0.3)],
    "random pruning": [RandomPruning(0.3)],
    "quantise": [Quantise(4)],
    "quantise by chance": [Quantise(4, stochastic=True)],
    "sign": [Sign(scaled=True)],
    "soteria": [Soteria(0.5)],
    "noise": [Clip(0.05), GaussianNoise(0.1, relative=True)],
    "several": [Clip(0.5), RandomPruning(0.5), Quantise(5)],
    "dp-sgd": [DPSGD(0.1, 0.5)],
    "dp-sgd and more": [DPSGD(0.0, 0.5), Quantise(6)],
}
OBJECTIVES = {"squared": SquaredDistance(), "cosine": CosineDistance()}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(
    defenses: list[Defense], own: bool = False, images: int = 2, **options: Any
) -> tuple[Victim, SharedGradient, Tensor]:
    """Clients, what they share, and their images; the labels are revealed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LeNet(SHAPE[0], SHAPE[1], CLASSES, width=3).double()
    victim = Victim(model, image_shape=SHAPE, num_images=images, defenses=defenses, **options)
    private = draw(VICTIMS, images, *SHAPE)
    labels = torch.randint(CLASSES, (VICTIMS, images), generator=torch.Generator().manual_seed(1))
    states = victim.fresh_states([*range(VICTIMS)]) if own else None
    return victim, victim.share(private, labels, states=states, reveal_labels=True), private


def plain_gradients(victim: Victim, state: dict[str, Tensor], images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    weights = {name: state[name].detach().requires_grad_() for name in victim.trainable}
    logits = functional_call(victim.model, {**state, **weights}, (images,))
    value = -(targets * logits.log_softmax(1)).sum(1).mean()
    found = torch.autograd.grad(value, list(weights.values()), create_graph=True)
    return dict(zip(weights, found, strict=True))


def flat(gradients: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in gradients.values()])


def by_hand(
    victim: Victim, state: dict[str, Tensor], images: Tensor, targets: Tensor, shared: dict[str, Tensor], distance: str
) -> Tensor:
    """The slow reference: one victim, and with DP-SGD one image, by plain autograd."""
    defenses = list(victim.defenses)
    if isinstance(defenses[0], DPSGD):
        parts = []
        for image, target in zip(images, targets, strict=True):
            parts.append(plain_gradients(victim, state, image[None], target[None]))
            factor = (defenses[0].norm / flat(parts[-1]).norm()).clamp(max=1)
            parts[-1] = {name: factor * tensor for name, tensor in parts[-1].items()}
        gradients = {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}
    else:
        gradients = plain_gradients(victim, state, images, targets)
    for defense in defenses:
        gradients = dict(defense.simulate(gradients, shared))
    found, wanted = flat(gradients), flat({name: shared[name] for name in gradients})
    if distance == "squared":
        return (found - wanted).square().sum() / wanted.square().sum()
    return 1 - F.cosine_similarity(found, wanted, dim=0)


def of_victim(shared: SharedGradient, victim: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and gradients."""
    state = {name: tensor[victim] if shared.own_weights else tensor for name, tensor in shared.state.items()}
    return state, {name: tensor[victim] for name, tensor in shared.gradients.items()}


@pytest.mark.parametrize(("distance", "own"), [("squared", False), ("cosine", True)])
@pytest.mark.parametrize("name", DEFENSES)
def test_the_objective_is_that_of_plain_autograd_in_every_pass(
    name: str, distance: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, shared, private = share(DEFENSES[name], own)
    unknowns = {"images": private + 0.3 * draw(VICTIMS, 2, *SHAPE, seed=2), "labels": draw(VICTIMS, 2, CLASSES, seed=3)}
    per_image = isinstance(victim.defenses[0], DPSGD)
    for way in ("chain", "joint", "apart"):
        if way == "apart":
            monkeypatch.setattr(evaluator_module, "has_joint_pass", lambda *_: False)
        evaluator = Evaluator(
            victim.without_secrets(), OBJECTIVES[distance], Pixels(), JointLabels(), defenses=victim.defenses
        )
        assert (evaluator._batched is not None) == (distance == "squared" and not per_image)
        if way != "chain":
            evaluator._batched = None
        kept = evaluator.begin(shared)
        values, gradients = evaluator(shared, kept, unknowns)
        if evaluator._batched is None:
            assert evaluator._joint is (way != "apart" and not per_image)
        for row in range(VICTIMS):
            leaves = {key: tensor[row].clone().requires_grad_() for key, tensor in unknowns.items()}
            targets = leaves["labels"].softmax(1)
            state, wanted = of_victim(shared, row)
            expected = by_hand(victim, state, leaves["images"], targets, wanted, distance)
            by = torch.autograd.grad(expected, list(leaves.values()))
            torch.testing.assert_close(values[row], expected.detach(), rtol=1e-9, atol=1e-12)
            assert float(expected) > 1e-6
            for key, slope in zip(leaves, by, strict=True):
                assert float(slope.abs().max()) > 1e-8
                torch.testing.assert_close(gradients[key][row], slope, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=repr)
@pytest.mark.parametrize("noise", [[GaussianNoise(0.1)], [LaplaceNoise(0.1), GaussianNoise(0.1)]], ids=repr)
def test_noise_is_searched_through_as_if_it_was_not_there(noise: list[Defense], objective: Term) -> None:
    victim, shared, private = share(noise)
    found = []
    for defenses in (victim.defenses, ()):
        evaluator = Evaluator(victim.without_secrets(), objective, Pixels(), RevealedLabels(), defenses=defenses)
        found.append(evaluator(shared, evaluator.begin(shared), {"images": private}))
        assert evaluator.simulation.changes is False
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1]["images"], found[1][1]["images"])


@pytest.mark.parametrize("distance", OBJECTIVES)
@pytest.mark.parametrize("name", DEFENSES)
def test_how_victims_are_grouped_does_not_matter(name: str, distance: str) -> None:
    victim, shared, private = share(DEFENSES[name], own=True)
    unknowns = {"images": private + 0.3 * draw(VICTIMS, 2, *SHAPE, seed=2)}

    def evaluate(some: list[int], at_once: int = 0) -> tuple[Tensor, Tensor]:
        part = shared.select(torch.tensor(some))
        evaluator = Evaluator(
            victim.without_secrets(), OBJECTIVES[distance], Pixels(), RevealedLabels(), defenses=victim.defenses
        )
        evaluator.at_once = at_once
        values, gradients = evaluator(part, evaluator.begin(part), {"images": unknowns["images"][some]})
        return values, gradients["images"]

    whole = evaluate([0, 1, 2])
    for found in (evaluate([0, 1, 2], at_once=1), evaluate([0, 1, 2], at_once=2)):
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)
    for some in ([0], [2, 1], [1, 1, 0]):
        torch.testing.assert_close(evaluate(some), tuple(part[some] for part in whole), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DEFENSES)
def test_squares_of_the_equations_are_the_objective(name: str) -> None:
    victim, shared, private = share(DEFENSES[name], own=True)
    images = private + 0.3 * draw(VICTIMS, 2, *SHAPE, seed=2)
    for objective in OBJECTIVES.values():
        evaluator = Evaluator(victim.without_secrets(), objective, Pixels(), RevealedLabels(), defenses=victim.defenses)
        kept = evaluator.begin(shared)
        residuals = evaluator.equations(shared, kept, images.flatten(1))
        expected = evaluator(shared, kept, {"images": images})[0]
        torch.testing.assert_close(residuals.square().sum(1), expected, rtol=1e-9, atol=1e-12)


# -- at the truth


def at(
    victim: Victim, shared: SharedGradient, images: Tensor, objective: Term, rate: float | None = None, **options: Any
) -> Tensor:
    """The objective at these images, and maybe a learning rate."""
    evaluator = Evaluator(victim.without_secrets(), objective, Pixels(), RevealedLabels(), **options)
    kept = evaluator.begin(shared)
    unknowns = {"images": images}
    if rate is not None:
        unknowns["learning_rate"] = (rate / kept["learning_rate/start"]).log()[:, None] / 0.3
        torch.testing.assert_close(evaluator.write_rate(kept, unknowns), torch.full((VICTIMS,), rate).double())
    return evaluator(evaluator.reduced(shared, kept), kept, unknowns)[0]


TRUE = {
    **{name: defenses for name, defenses in DEFENSES.items() if name not in ("noise", "dp-sgd")},
    "dp-sgd without noise": [DPSGD(0.0, 0.5)],
    "dp-sgd, sparse": [DPSGD(0.0, 0.5), RandomPruning(0.3)],
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", TRUE)
def test_it_is_zero_at_the_truth_and_not_elsewhere(name: str, reduction: str) -> None:
    victim, shared, private = share(TRUE[name], own=True, images=3, reduction=reduction)
    for objective in OBJECTIVES.values():
        assert float(at(victim, shared, private, objective, defenses=victim.defenses).abs().max()) < 1e-13
        other = private + 0.3 * draw(VICTIMS, 3, *SHAPE, seed=2)
        assert float(at(victim, shared, other, objective, defenses=victim.defenses).min()) > 1e-9


@pytest.mark.parametrize("name", ["clip", "dp-sgd without noise", "quantise", "sign", "top k"])
def test_to_who_does_not_know_the_defense_the_truth_does_not_look_like_it(name: str) -> None:
    victim, shared, private = share(TRUE[name], images=3)
    assert float(at(victim, shared, private, SquaredDistance()).min()) > 1e-4


@pytest.mark.parametrize(
    ("name", "steps"),
    [*product(["clip", "quantise", "top k", "several"], [1, 2])],
)
def test_it_is_zero_at_the_truth_where_the_learning_rate_is_not_told(name: str, steps: int) -> None:
    """Defenses act on the update then."""
    options = {"local_steps": steps, "learning_rate": 0.2, "reveal_learning_rate": False}
    defenses = [Clip(0.02)] if name == "clip" else TRUE[name]
    victim, shared, private = share(defenses, own=True, **options)
    if name == "clip":
        assert all(float(flat(of_victim(shared, row)[1]).norm()) == pytest.approx(0.02) for row in range(VICTIMS))
    for objective in OBJECTIVES.values():
        options = {"defenses": victim.defenses, "rate": 0.2}
        assert float(at(victim, shared, private, objective, **options).abs().max()) < 1e-13
        other = private + 0.3 * draw(VICTIMS, 2, *SHAPE, seed=2)
        assert float(at(victim, shared, other, objective, **options).min()) > 1e-6


# -- attacks


@pytest.mark.filterwarnings("ignore:The clients defend")
@pytest.mark.parametrize("defense", [Soteria(0.8), Clip(0.1)], ids=repr)
def test_an_attack_finds_all_images_if_it_knows_the_defense_and_none_if_it_does_not(kit: Any, defense: Defense) -> None:
    naive, adaptive = (
        kit.fit(
            GaussNewtonAttack(adaptive=adaptive, restarts=0, max_evaluations=30, solver="cholesky"),
            kit.victims(victims=2, defenses=[defense]),
        )
        for adaptive in (False, True)
    )
    kit.assert_successful(adaptive, 2)
    assert [score.success for score in naive.scores.values()] == [0.0] * 2
    assert all(math.isfinite(score.mse) for score in naive.scores.values())
