"""Levels of one search, and how they steer the objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leakage.solvers import LBFGS, STATUS, Continuation, GaussNewton, PerVictimOptimizer, Problem, SignedAdam, Solver

SHARPNESS, FADING = "steering/sharpness", "steering/fading"
GOAL = torch.tensor([[0.3, -2.0], [1.0, 4.0], [0.0, 0.5]]).double()


def optimizer_of(solver: Solver, **options: Any) -> PerVictimOptimizer:
    """Least squares of x^3 + s x against what the goal gives without s, with s one over the sharpness."""

    def equations(x: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
        return x**3 + x / optimizer.lanes[SHARPNESS][lanes, None] - GOAL[lanes] ** 3

    problem = Problem(equations=equations, num_equations=2, num_unknowns=2, **options)
    optimizer = PerVictimOptimizer([nn.Parameter(torch.full((3, 2), 1.5).double())], solver, problem)
    return optimizer


def run(optimizer: PerVictimOptimizer) -> list[tuple[list[int], list[float]]]:
    """Levels and best losses after each step."""
    (x,) = optimizer.param_groups[0]["params"]

    def closure() -> torch.Tensor:
        losses: torch.Tensor = optimizer.problem.equations(x, torch.arange(3)).square().sum(1)  # type: ignore[misc]
        x.grad = torch.autograd.grad(losses.sum(), x)[0]
        return losses

    seen = []
    while bool(optimizer.running.any()):
        optimizer.step(closure)
        seen.append((optimizer.lanes["level"].tolist(), optimizer.best_loss.tolist()))
    return seen


@pytest.mark.parametrize(
    "solver",
    [GaussNewton(max_evaluations=200, tolerance=1e-20), LBFGS(max_evaluations=1500, tolerance=1e-20)],
    ids=["gauss_newton", "lbfgs"],
)
def test_ends_where_the_last_level_does(solver: Solver) -> None:
    optimizer = optimizer_of(Continuation(solver=solver, levels=5, sharpness=(0.1, 1e9)))
    seen = run(optimizer)
    assert optimizer.lanes["level"].tolist() == [4, 4, 4]
    torch.testing.assert_close(optimizer.best()[0], GOAL, rtol=0, atol=1e-3)
    assert [STATUS[status] for status in optimizer.status.tolist()] != ["running"] * 3
    for lane in range(3):
        levels = [at[lane] for at, _ in seen]
        assert levels == sorted(levels), "levels only rise"
        assert set(levels) == set(range(5)), "and none is left out"


def test_steers_by_geometric_levels() -> None:
    solver = Continuation(solver=SignedAdam(steps=12), levels=4, sharpness=(2.0, 250.0), fading=1.5)
    optimizer = optimizer_of(solver)
    (x,) = optimizer.param_groups[0]["params"]
    seen = []
    for _ in range(12):
        seen.append(torch.stack([optimizer.lanes[name] for name in (SHARPNESS, FADING)]))

        def closure() -> torch.Tensor:
            x.grad = torch.ones_like(x)
            return torch.ones(3).double()

        optimizer.step(closure)
    expected = torch.tensor([2.0, 10.0, 50.0, 250.0]).double().repeat_interleave(3)
    steered = torch.stack(seen)[:, :, 0].T
    torch.testing.assert_close(steered, torch.stack([expected, (expected / 2) ** -1.5]))
    assert optimizer.evaluations.tolist() == [12, 12, 12]
    assert {STATUS[status] for status in optimizer.status.tolist()} == {"exhausted"}


def test_the_finish_has_neither_smoothing_nor_priors() -> None:
    """Its evaluations come on top, and it starts at the best point of the levels."""
    newton = GaussNewton(max_evaluations=12, tolerance=1e-20)
    for kinked, exact, levels in ((True, True, [0, 1, 2, 3]), (False, True, [3]), (True, False, [0, 1, 2])):
        solver = Continuation(solver=newton, levels=3, sharpness=(0.1, 10.0), finish=GaussNewton(tolerance=1e-20))
        optimizer = optimizer_of(solver, kinked=kinked, exact=exact)
        seen = run(optimizer)
        assert sorted({at[0] for at, _ in seen}) == levels
        if exact:
            assert optimizer.lanes[SHARPNESS].tolist() == [torch.inf] * 3
            assert optimizer.lanes[FADING].tolist() == [0.0] * 3
            torch.testing.assert_close(optimizer.best()[0], GOAL, rtol=0, atol=1e-3)
            assert bool((optimizer.best_loss < 1e-10).all())
        else:
            assert optimizer.lanes[FADING][0] > 0
            assert float((optimizer.best()[0] - GOAL).abs().max()) > 1e-3


def test_the_levels_begin_where_another_search_ended() -> None:
    """The start sees the network as it is and full priors, and its steps come on top; smooth networks need none."""
    newton = GaussNewton(max_evaluations=9, tolerance=1e-20)
    finish = GaussNewton(max_evaluations=4, tolerance=1e-20)
    solver = Continuation(
        solver=newton, levels=3, sharpness=(0.1, 10.0), finish=finish, start=SignedAdam(steps=5, lr=0.1)
    )
    optimizer = optimizer_of(solver)
    begun = [optimizer.lanes[name].tolist() for name in ("level", SHARPNESS, FADING)]
    assert begun == [[-1] * 3, [torch.inf] * 3, [1.0] * 3]
    (x,) = optimizer.param_groups[0]["params"]
    points = []

    def closure() -> torch.Tensor:
        points.append(x.detach().clone())
        losses: torch.Tensor = optimizer.problem.equations(x, torch.arange(3)).square().sum(1)  # type: ignore[misc]
        x.grad = torch.autograd.grad(losses.sum(), x)[0]
        return losses

    levels = []
    while bool(optimizer.running.any()):
        optimizer.step(closure)
        levels.append(optimizer.lanes["level"].tolist())
    assert [level[0] for level in levels[:4]] == [-1] * 4
    assert levels[4] == [0] * 3
    assert max(max(level) for level in levels) == 3
    torch.testing.assert_close((points[1] - points[0]).abs(), torch.full((3, 2), 0.1).double())
    assert bool((optimizer.evaluations <= 5 + 9 + 4).all())
    assert bool((optimizer.evaluations > 5 + 3).all())
    losses = (torch.stack(points[:5]) ** 3 - GOAL**3).square().sum(2)
    for lane, best in enumerate(losses.argmin(0).tolist()):
        assert torch.equal(points[5][lane], points[best][lane]), "the best iterate of the start"
    smooth = optimizer_of(solver, kinked=False)
    assert smooth.lanes["level"].tolist() == [3] * 3


def test_adam_goes_on_over_the_levels() -> None:
    """One level and many are the same where the objective does not look at them."""
    found = []
    for levels in (1, 6):
        optimizer = optimizer_of(Continuation(solver=SignedAdam(steps=30), levels=levels))
        (x,) = optimizer.param_groups[0]["params"]

        def closure(x: Any = x) -> torch.Tensor:
            x.grad = 2 * (x - GOAL)
            return (x - GOAL).square().sum(1).detach()

        for _ in range(30):
            optimizer.step(closure)
        found.append(x.detach().clone())
    assert torch.equal(*found)


def test_what_counts_is_the_best_of_the_last_level() -> None:
    optimizer = optimizer_of(Continuation(solver=SignedAdam(steps=4), levels=2))
    (x,) = optimizer.param_groups[0]["params"]
    points = []
    for loss in (1.0, 2.0, 4.0, 3.0):

        def closure(loss: float = loss) -> torch.Tensor:
            points.append(x.detach().clone())
            x.grad = torch.ones_like(x)
            return torch.full((3,), loss).double()

        optimizer.step(closure)
    assert optimizer.best_loss.tolist() == [3.0] * 3
    assert torch.equal(optimizer.best()[0], points[3])


def test_a_new_level_keeps_the_best_point_until_it_has_a_loss_of_its_own() -> None:
    """So a search may end between two levels, and a level that begins with NaN loses nothing."""
    optimizer = optimizer_of(Continuation(solver=SignedAdam(steps=4), levels=2))
    (x,) = optimizer.param_groups[0]["params"]
    points, best = [], []
    for loss in ([2.0] * 3, [1.0] * 3, [5.0, torch.nan, 5.0], [6.0] * 3):

        def closure(loss: list[float] = loss) -> torch.Tensor:
            points.append(x.detach().clone())
            x.grad = torch.ones_like(x)
            return torch.tensor(loss).double()

        optimizer.step(closure)
        best.append((optimizer.best_loss.tolist(), optimizer.best()[0].clone()))
    assert optimizer.lanes["level"].tolist() == [1, 1, 1]
    assert [losses for losses, _ in best] == [[2.0] * 3, [1.0] * 3, [5.0, 1.0, 5.0], [5.0, 1.0, 5.0]]
    assert torch.equal(best[1][1], points[1])
    assert torch.equal(best[3][1][1], points[1][1])
    assert torch.equal(best[3][1][0], points[2][0])


def test_a_lane_that_diverges_goes_no_further() -> None:
    optimizer = optimizer_of(Continuation(solver=SignedAdam(steps=10), levels=5))
    (x,) = optimizer.param_groups[0]["params"]

    def closure() -> torch.Tensor:
        x.grad = torch.ones_like(x)
        return torch.tensor([1.0, torch.nan, 1.0]).double()

    for _ in range(10):
        optimizer.step(closure)
    assert [STATUS[status] for status in optimizer.status.tolist()] == ["exhausted", "diverged", "exhausted"]
    assert optimizer.lanes["level"].tolist() == [4, 0, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "Expected `levels` to be a whole number of at least 1, but got 0"),
        ({"levels": 11}, "Expected `levels` of at most 10, the solver's evaluations, but got 11"),
        ({"sharpness": (0.0, 5.0)}, r"Expected `sharpness\[0\]` to be positive and finite, but got 0.0"),
        ({"sharpness": 5.0}, "Expected `sharpness`"),
        ({"fading": -1.0}, "Expected `fading` of at least 0, but got -1.0"),
        (
            {"finish": GaussNewton()},
            r"Expected `finish` and `solver` to be GaussNewton, but got Gauss.* and SignedAdam",
        ),
        (
            {"start": SignedAdam()},
            "Expected `start` to be Adam or SignedAdam, and `solver` to be GaussNewton, but got SignedAdam.* and Sign",
        ),
        (
            {"solver": GaussNewton(), "start": LBFGS()},
            r"Expected `start` to be Adam or SignedAdam, and `solver` .* but got LBFGS.* and GaussNewton",
        ),
        ({"unsmoothed": "drop"}, r"Expected `unsmoothed` to be one of \['keep', 'refuse'\], but got 'drop'"),
        ({"strengths": ()}, r"Expected `strengths` with at least one factor, but got \(\)"),
        ({"strengths": (1.0, -1.0)}, r"Expected `strengths\[1\]` of at least 0, but got -1.0"),
        ({"solver": "adam"}, "Expected `solver` to be another solver, but got 'adam'"),
        ({"solver": Continuation(solver=SignedAdam(steps=20))}, "Expected `solver` to be another solver"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Continuation(**{"solver": SignedAdam(steps=10), "levels": 5, **options})
