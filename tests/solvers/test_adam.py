"""Adam against torch's own, schedules, and boxes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from leakage.seeds import hashed_normal
from leakage.solvers import STATUS, Adam, NoSearch, PerVictimOptimizer, PlainLBFGS, Problem, SignedAdam

from .conftest import lbfgs


def closure_of(optimizer: PerVictimOptimizer, goal: torch.Tensor) -> Any:
    def closure() -> torch.Tensor:
        (x,) = optimizer.param_groups[0]["params"]
        losses = ((x - goal) ** 2 * torch.tensor([1.0, 10.0, 0.1]).double()).sum(1)
        x.grad = torch.autograd.grad(losses.sum(), x)[0]
        return losses

    return closure


GOAL = torch.tensor([[0.3, -2.0, 5.0], [1.0, 0.0, -1.0]]).double()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
@pytest.mark.parametrize("signed", [False, True])
def test_follows_torch(betas: tuple[float, float], signed: bool) -> None:
    kind = SignedAdam if signed else Adam
    optimizer = PerVictimOptimizer(
        [nn.Parameter(torch.zeros(2, 3).double())], kind(lr=0.1, steps=60, schedule="constant", betas=betas)
    )
    theirs = nn.Parameter(torch.zeros(2, 3).double())
    reference = torch.optim.Adam([theirs], lr=0.1, betas=betas)
    closure = closure_of(optimizer, GOAL)
    for _ in range(40):
        optimizer.step(closure)
        loss = ((theirs - GOAL) ** 2 * torch.tensor([1.0, 10.0, 0.1]).double()).sum()
        theirs.grad = torch.autograd.grad(loss, theirs)[0]
        if signed:
            theirs.grad = theirs.grad.sign()
        reference.step()
    torch.testing.assert_close(optimizer.param_groups[0]["params"][0], theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["steps", "cosine", "constant"])
def test_schedules(schedule: str) -> None:
    rates = Adam(lr=0.2, steps=80, schedule=schedule, warmup=4)._rate(torch.arange(1, 81).double())
    assert rates[:4].tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2], rel=2e-2)
    if schedule == "steps":
        expected = torch.full((80,), 0.2).double()
        for first in (30, 50, 70):
            expected[first:] *= 0.1
        torch.testing.assert_close(rates[4:], expected[4:])
    elif schedule == "cosine":
        assert float(rates[40]) == pytest.approx(0.1)
        assert rates[-1] < 1e-3
        assert bool((rates[4:].diff() < 0).all())
    else:
        assert rates[4:].unique().tolist() == [0.2]


@pytest.mark.parametrize("kind", [Adam, SignedAdam])
def test_noise_is_added_to_each_step_by_the_rate(kind: type[Adam]) -> None:
    options: dict[str, Any] = {"lr": 0.1, "steps": 60, "schedule": "cosine"}
    start, gradient = torch.ones(2, 3).double(), torch.tensor([[1.0, -2.0, 0.5], [0.1, 3.0, -1.0]]).double()
    moved = []
    for noise in (0.0, 0.2):
        optimizer = PerVictimOptimizer([nn.Parameter(start[:0].clone())], kind(noise=noise, **options))
        optimizer.extend(start, seeds=torch.tensor([5, 6]))
        (x,) = optimizer.param_groups[0]["params"]

        def closure(x: Any = x) -> torch.Tensor:
            x.grad = gradient
            return torch.zeros(2).double() + 1

        path = []
        for _ in range(3):
            optimizer.step(closure)
            path.append(x.detach().clone())
        moved.append(torch.stack(path))
    rates = [0.1 * (1 + math.cos(math.pi * step / 60)) / 2 for step in range(3)]
    noises = [hashed_normal(torch.tensor([5, 6]), torch.full((2,), step), 3) for step in (1, 2, 3)]
    expected = torch.stack([0.2 * rate * noise for rate, noise in zip(rates, noises, strict=True)]).cumsum(0)
    torch.testing.assert_close(moved[1] - moved[0], expected, rtol=0, atol=1e-12)


def test_noise_has_a_seed_of_each_start() -> None:
    optimizer = PerVictimOptimizer([nn.Parameter(torch.zeros(0, 3))], Adam(noise=0.1))
    optimizer.extend(torch.zeros(2, 3), seeds=torch.tensor([5, 6]))
    optimizer.extend(torch.zeros(1, 3), seeds=torch.tensor([7]))
    optimizer.restart(torch.tensor([1]), torch.zeros(1, 3), seeds=torch.tensor([8]))
    assert optimizer.lanes["seed"].tolist() == [5, 8, 7]
    optimizer.select(torch.tensor([2, 1]))
    assert optimizer.lanes["seed"].tolist() == [7, 8]
    assert "seed" not in PerVictimOptimizer([nn.Parameter(torch.zeros(2, 3))], Adam()).lanes


def test_ends_after_its_steps_or_at_its_tolerance_and_keeps_the_best() -> None:
    start = torch.stack([torch.zeros(3), torch.tensor([1.0, 0.0, -1.0])]).double()
    optimizer = PerVictimOptimizer([nn.Parameter(start)], Adam(lr=3.0, steps=8, schedule="constant", tolerance=1e-3))
    losses = []
    while optimizer.running.any():
        losses.append(optimizer.step(closure_of(optimizer, GOAL)))
    assert [STATUS[status] for status in optimizer.status.tolist()] == ["exhausted", "converged"]
    assert optimizer.evaluations.tolist() == [8, 1]
    assert float(optimizer.best_loss[0]) == float(torch.stack(losses)[:, 0].min()) < float(losses[-1][0])


def test_a_victim_without_numbers_has_diverged() -> None:
    optimizer = PerVictimOptimizer([nn.Parameter(torch.zeros(2, 3).double())], SignedAdam(steps=5))

    def closure() -> torch.Tensor:
        (x,) = optimizer.param_groups[0]["params"]
        x.grad = torch.ones_like(x)
        return torch.tensor([1.0, torch.nan]).double()

    optimizer.step(closure)
    assert [STATUS[status] for status in optimizer.status.tolist()] == ["running", "diverged"]
    assert optimizer.param_groups[0]["params"][0][1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "Expected `lr` to be positive and finite, but got 0.0"),
        ({"steps": 0}, "Expected `steps` to be a whole number of at least 1, but got 0"),
        ({"schedule": "step"}, r"Expected `schedule` to be one of \['constant', 'cosine', 'steps'\], but got 'step'"),
        ({"warmup": -1}, "Expected `warmup` to be a whole number of at least 0, but got -1"),
        ({"betas": (0.9, 1.0)}, r"Expected `betas` from 0 to below 1, but got \(0\.9, 1\.0\)"),
        ({"betas": 0.9}, r"Expected `betas` as two numbers, but got 0\.9"),
        ({"betas": (0.9, 0.99, 0.999)}, r"Expected `betas` as two numbers, but got \(0\.9, 0\.99, 0\.999\)"),
        ({"betas": ("0.9", "0.99")}, r"Expected `betas` as two numbers, but got \('0\.9', '0\.99'\)"),
        ({"tolerance": -1.0}, "Expected `tolerance` of at least 0, but got -1.0"),
        ({"noise": -0.1}, "Expected `noise` of at least 0, but got -0.1"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adam(**options)


def test_no_search_stays_where_it_is() -> None:
    start = torch.stack([torch.zeros(3), torch.tensor([1.0, 0.0, -1.0])]).double()
    optimizer = PerVictimOptimizer([nn.Parameter(start.clone())], NoSearch())
    optimizer.step(closure_of(optimizer, GOAL))
    assert [STATUS[status] for status in optimizer.status.tolist()] == ["exhausted", "converged"]
    assert torch.equal(optimizer.param_groups[0]["params"][0], start)
    with pytest.raises(ValueError, match="Expected `tolerance` of at least 0"):
        NoSearch(tolerance=-1.0)


def test_lbfgs_in_a_box_finds_the_least_point_of_it() -> None:
    """Of a bowl that leans: where coordinates end at the border, the others end elsewhere than without it."""
    matrix = torch.tensor([[2.0, 1.2, 0.3], [1.2, 3.0, -0.8], [0.3, -0.8, 1.5]]).double()
    goal = torch.tensor([[0.3, 1.8, 0.5], [-1.0, 0.4, 2.0]]).double()

    def losses_of(x: torch.Tensor) -> torch.Tensor:
        away = x - goal
        return torch.einsum("vi,ij,vj->v", away, matrix, away)

    optimizer = lbfgs([nn.Parameter(torch.full((2, 3), 0.5).double())], project=lambda x: x.clamp(0, 1), history_size=5)

    def closure() -> torch.Tensor:
        (x,) = optimizer.param_groups[0]["params"]
        losses = losses_of(x)
        x.grad = torch.autograd.grad(losses.sum(), x)[0]
        return losses

    while optimizer.running.any():
        optimizer.step(closure)
    (found,) = optimizer.best()
    # By brute force: projected descent of tiny steps.
    slow = torch.full((2, 3), 0.5).double()
    for _ in range(20_000):
        slow = (slow - 0.01 * 2 * (slow - goal) @ matrix).clamp(0, 1)
    assert bool(((slow == 0) | (slow == 1)).any(1).all()), "both end at a border"
    torch.testing.assert_close(found, slow, rtol=0, atol=1e-5)


def test_the_published_search_knows_no_box() -> None:
    with pytest.raises(ValueError, match="Expected no box with PlainLBFGS"):
        PerVictimOptimizer([nn.Parameter(torch.zeros(2, 3))], PlainLBFGS(), Problem(project=lambda x: x))
