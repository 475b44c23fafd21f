from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leakage.solvers import STATUS, PlainLBFGS

from .conftest import plain_lbfgs

# Rounding grows in the course of a search without line search: what is still compared.
COMPARED = 120


def trace(problem: Any, closure_of: Any, victims: int, **options: Any) -> tuple[PlainLBFGS, list[list[Tensor]]]:
    """The points at which each victim was evaluated while it was running."""
    params = problem.params()
    optimizer = plain_lbfgs(params, **options)
    closure = closure_of(problem, optimizer)
    points: list[list[Tensor]] = [[] for _ in range(victims)]
    while optimizer.running.any():
        flat = torch.cat([param.detach().flatten(1) for param in params], dim=1)
        for victim in optimizer.running.nonzero().flatten().tolist():
            points[victim].append(flat[victim].clone())
        optimizer.step(closure)
    return optimizer, points


def reference(
    problem: Any, victim: int, history_size: int, max_calls: int, jitter: float = 0.0
) -> tuple[list[Tensor], int]:
    """The same by ``torch.optim.LBFGS``, and how many they are until a call changes nothing."""
    params = [nn.Parameter(start[victim] * (1 + jitter)) for start in problem.starts]
    optimizer = torch.optim.LBFGS(params, lr=1, history_size=history_size, max_iter=20)
    points: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = problem.only(victim, params)
        loss.backward()
        points.append(torch.cat([param.detach().flatten() for param in params]))
        return loss

    for _ in range(max_calls):
        before = len(points)
        optimizer.step(closure)
        now = torch.cat([param.detach().flatten() for param in params])
        if len(points) == before + 1 and torch.equal(points[-1], now):
            break
    if not torch.equal(points[-1], now):
        points.append(now)  # the loss at the very end has to be known
    return points, len(points)


def without_repeats(points: list[Tensor]) -> list[Tensor]:
    """A call begins by evaluating where the one before ended."""
    return [p for i, p in enumerate(points) if i == 0 or not torch.equal(p, points[i - 1])]


def assert_same_search(problem: Any, closure_of: Any, victims: int, *, history_size: int, max_calls: int) -> list[int]:
    optimizer, points = trace(
        problem, closure_of, victims, history_size=history_size, max_calls=max_calls, tolerance=0.0
    )
    lengths = []
    for victim in range(victims):
        expected, evaluations = reference(problem, victim, history_size, max_calls)
        jittered, _ = reference(problem, victim, history_size, max_calls, jitter=1e-13)
        own, expected, jittered = (without_repeats(p) for p in (points[victim], expected, jittered))
        status = STATUS[int(optimizer.status[victim])]
        steady = 0
        for ours, theirs, moved in zip(own[:COMPARED], expected, jittered, strict=False):
            # Where a relative change of 1e-13 at the start has grown beyond this, so has the rounding.
            if not torch.allclose(theirs, moved, rtol=1e-7, atol=1e-7):
                break
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            steady += 1
        lengths.append(steady)
        if steady == len(expected) and status != "diverged":
            assert len(own) == len(expected)
            counted = int(optimizer.evaluations[victim])
            # torch evaluates once more before it does nothing for ever.
            assert counted == evaluations or (status in ("stalled", "converged") and counted == evaluations - 1)
    return lengths


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    unknowns=st.integers(2, 12),
    history_size=st.sampled_from([1, 3, 5, 100]),
)
def test_random_functions_take_the_iterates_of_torch(
    smooth: Any, closure_of: Any, seed: int, unknowns: int, history_size: int
) -> None:
    problem = smooth(seed, 3, unknowns)
    lengths = assert_same_search(problem, closure_of, 3, history_size=history_size, max_calls=4)
    assert max(lengths) >= 5


@pytest.mark.parametrize("history_size", [6, 100])
def test_gradient_matching_takes_the_iterates_of_torch(matching: Any, closure_of: Any, history_size: int) -> None:
    lengths = assert_same_search(matching(3, 3), closure_of, 3, history_size=history_size, max_calls=3)
    # The ring of six has gone round several times, and two calls have ended.
    assert max(lengths) > 40
    assert min(lengths) > 20


def test_a_small_ring_takes_other_iterates_than_a_large_one(matching: Any, closure_of: Any) -> None:
    _, small = trace(matching(3, 1), closure_of, 1, history_size=2, max_calls=1)
    _, large = trace(matching(3, 1), closure_of, 1, history_size=100, max_calls=1)
    assert torch.allclose(small[0][3], large[0][3])
    assert not torch.allclose(small[0][12], large[0][12])


def bowl(start: list[float], **options: Any) -> tuple[PlainLBFGS, nn.Parameter, Any]:
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64)[:, None])
    optimizer = plain_lbfgs([x], **options)

    def closure() -> Tensor:
        losses = (x - 1).square().sum(1)
        (x.grad,) = torch.autograd.grad(losses.sum(), x)
        return losses

    return optimizer, x, closure


def run(optimizer: PlainLBFGS, closure: Any, limit: int = 2000) -> int:
    steps = 0
    while optimizer.running.any():
        optimizer.step(closure)
        steps += 1
        assert steps < limit
    return steps


def test_converges_when_a_checked_call_ends_below_the_tolerance() -> None:
    optimizer, x, closure = bowl([5.0, -3.0], tolerance=1e-12, check_every=1)
    run(optimizer, closure)
    assert [STATUS[s] for s in optimizer.status.tolist()] == ["converged"] * 2
    torch.testing.assert_close(x, torch.ones_like(x))


@pytest.mark.parametrize(("check_every", "evaluations"), [(1, 9), (5, 25)])
def test_compares_only_every_so_many_calls(check_every: int, evaluations: int) -> None:
    # A slope; the loss is below the tolerance from the second call on, of four iterations each.
    x = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = plain_lbfgs([x], max_iterations=4, check_every=check_every, tolerance=10.0, lr=0.01)

    def closure() -> Tensor:
        x.grad = torch.full_like(x, -1.0)
        return 10.06 - x.detach().squeeze(1)

    run(optimizer, closure)
    assert STATUS[int(optimizer.status)] == "converged"
    assert int(optimizer.evaluations) == evaluations


def test_is_exhausted_after_its_calls() -> None:
    problem_options = {"max_iterations": 3, "max_calls": 2, "lr": 0.01, "tolerance": 0.0}
    optimizer, _, closure = bowl([50.0], **problem_options)
    run(optimizer, closure)
    assert STATUS[int(optimizer.status)] == "exhausted"
    assert int(optimizer.iterations) == 6


@pytest.mark.parametrize(("least", "status"), [(1.0, "stalled"), (0.0, "converged")])
def test_tells_an_end_above_the_tolerance_from_one_below(least: float, status: str) -> None:
    # Both reach a point from which no call moves, long before the second comparison.
    x = nn.Parameter(torch.tensor([[3.0]], dtype=torch.float64))
    optimizer = plain_lbfgs([x], tolerance=1e-6, max_iterations=1, check_every=100)

    def closure() -> Tensor:
        losses = least + x.square().sum(1)
        (x.grad,) = torch.autograd.grad(losses.sum(), x)
        return losses

    run(optimizer, closure)
    assert STATUS[int(optimizer.status)] == status
    assert int(optimizer.evaluations) < 100
    assert float(optimizer.best_loss) == pytest.approx(least, abs=1e-6)


def test_a_diverging_victim_keeps_its_best_iterate_and_spoils_nobody(smooth: Any, closure_of: Any) -> None:
    problem = smooth(5, 3, 6)
    alone, points = trace(problem, closure_of, 3, max_calls=3, tolerance=0.0)
    calm = problem.only

    def only(victim: int, params: list[Tensor]) -> Tensor:
        loss = calm(victim, params)
        if victim == 1 and only.calls > 12:  # type: ignore[attr-defined]
            loss = loss * torch.nan
        only.calls += victim == 1  # type: ignore[attr-defined]
        return loss

    only.calls = 0  # type: ignore[attr-defined]
    problem.only = only
    spoilt, others = trace(problem, closure_of, 3, max_calls=3, tolerance=0.0)
    assert STATUS[int(spoilt.status[1])] == "diverged"
    assert int(spoilt.evaluations[1]) == 14
    losses = [float(calm(1, [p[:3], p[3:]])) for p in points[1][:13]]
    assert float(spoilt.best_loss[1]) == pytest.approx(min(losses), rel=1e-12)
    for victim in (0, 2):
        assert len(points[victim]) == len(others[victim])
        torch.testing.assert_close(torch.stack(points[victim]), torch.stack(others[victim]), rtol=1e-9, atol=1e-9)
        assert alone.status[victim] == spoilt.status[victim]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "Expected `lr` to be positive and finite, but got 0.0"),
        ({"history_size": 0}, "Expected `history_size` to be a whole number of at least 1, but got 0"),
        ({"max_iterations": 1.5}, "Expected `max_iterations` to be a whole number .* but got 1.5"),
        ({"max_calls": -1}, "Expected `max_calls` to be a whole number .* but got -1"),
        ({"check_every": 0}, "Expected `check_every` to be a whole number .* but got 0"),
        ({"tolerance": -1e-6}, "Expected `tolerance` of at least 0, but got -1e-06"),
        ({"tolerance": float("nan")}, "Expected `tolerance` of at least 0, but got nan"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain_lbfgs([nn.Parameter(torch.zeros(2, 3))], **options)


def test_a_lane_takes_as_many_bytes_as_its_full_history(matching: Any, closure_of: Any) -> None:
    problem = matching(3, 2)
    optimizer = plain_lbfgs(problem.params(), history_size=40)
    expected = optimizer.bytes_per_lane
    closure = closure_of(problem, optimizer)
    for _ in range(45):
        optimizer.step(closure)
    lanes = len(optimizer.status)
    assert optimizer.lanes["s"].shape[1] == 40
    assert sum(tensor.nbytes for tensor in optimizer.lanes.values()) == expected * lanes
