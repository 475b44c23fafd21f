"""The published protocol against a plain loop: one victim, plain modules, ``torch.optim.LBFGS``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.attacks import DLGAttack
from leakage.datamodules import GroundTruth
from leakage.models import LeNet
from leakage.seeds import derive_seed
from leakage.solvers import STATUS

CALLS = 4


def start(victim: int, kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(0, victim, f"start/{kind}/0"))
    return torch.randn(shape, generator=generator).double()


def plain_loop(lbfgs_case: Any, kit: Any, victim: int, label: Tensor) -> list[tuple[float, Tensor, Tensor]]:
    """Loss, image and label logits at every evaluation."""
    gradients, state = kit.share_one(kit.victims(victims=4), victim)
    network = LeNet(1, 12).double()
    network.load_state_dict(state)
    weights = dict(network.named_parameters())
    image = start(victim, "images", (1, 1, 12, 12)).requires_grad_()
    logits = F.one_hot(label, 10).double()
    unknowns = [image]
    if lbfgs_case.kind is DLGAttack:
        logits = start(victim, "labels", (1, 10)).requires_grad_()
        unknowns.append(logits)
    optimizer = torch.optim.LBFGS(unknowns, lr=1, max_iter=20, history_size=100)
    seen: list[tuple[float, Tensor, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        target = logits.softmax(-1) if lbfgs_case.kind is DLGAttack else logits
        loss = F.cross_entropy(network(image), target)
        own = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        distance = sum(
            (mine - gradients[name].double()).square().sum() for name, mine in zip(weights, own, strict=True)
        )
        assert isinstance(distance, Tensor)
        distance.backward()
        seen.append((distance.item(), image.detach().clone(), logits.detach().clone()))
        return distance

    for call in range(CALLS):
        optimizer.step(closure)
        loss = closure().item()  # the next call begins with this evaluation
        if call % 10 == 0 and loss < 1e-6:
            break
        if call < CALLS - 1 or torch.equal(seen[-1][1], seen[-2][1]):
            seen.pop()
    return seen


def test_follows_a_plain_loop(lbfgs_case: Any, kit: Any) -> None:
    victims = kit.victims(victims=4)
    attack = kit.fit(lbfgs_case.attack(protocol="published", max_evaluations=20 * CALLS), victims, precision="64-true")
    found = kit.by_id(attack)
    truth = GroundTruth.cat(list(victims.val_dataloader()))
    compared = 0
    for victim in range(4):
        seen = plain_loop(lbfgs_case, kit, victim, truth.labels[victim])
        loss, image, logits = min(seen, key=lambda evaluation: evaluation[0])
        error = float((image[0] - truth.images[victim]).square().mean())
        if error > 1:  # diverged: rounding has taken over
            continue
        compared += 1
        assert found.loss[victim].item() == pytest.approx(loss, rel=1e-4, abs=1e-12)
        torch.testing.assert_close(found.images[victim], image, rtol=1e-5, atol=1e-5)
        assert found.labels[victim].item() == logits.argmax().item()
        assert attack.scores[victim].mse == pytest.approx(error, rel=1e-3, abs=1e-10)
        evaluations = found.evaluations[victim].item()
        if STATUS[int(found.status[victim])] == "exhausted":
            assert evaluations == len(seen)
        else:  # calls that do nothing evaluate once each, and are not made
            assert len(seen) - CALLS <= evaluations <= len(seen)
    assert compared >= 3


def test_compares_the_distance_itself_and_not_its_share_of_the_gradient(lbfgs_case: Any, kit: Any) -> None:
    # One evaluation at the same start under both protocols.
    options: dict[str, Any] = {"max_evaluations": 1, "restarts": 0, "start_std": 1.0}
    published = kit.fit(lbfgs_case.attack(protocol="published", **options), kit.victims(victims=3), max_steps=1)
    robust = kit.fit(lbfgs_case.attack(**options), kit.victims(victims=3))
    victims = kit.victims(victims=3)
    gradients = [kit.share_one(victims, victim)[0] for victim in range(3)]
    norms = torch.tensor([sum(float(g.square().sum()) for g in one.values()) for one in gradients])
    torch.testing.assert_close(published.current().loss, kit.by_id(robust).loss * norms, rtol=1e-4, atol=0)


def test_takes_other_steps_than_the_robust_search(lbfgs_case: Any, kit: Any) -> None:
    options: dict[str, Any] = {"max_evaluations": 40, "restarts": 0, "start_std": 1.0}
    published = kit.by_id(kit.fit(lbfgs_case.attack(protocol="published", **options), kit.victims(victims=3)))
    robust = kit.by_id(kit.fit(lbfgs_case.attack(**options), kit.victims(victims=3)))
    assert not torch.allclose(published.images, robust.images, atol=1e-3)
