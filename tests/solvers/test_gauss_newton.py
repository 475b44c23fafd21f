from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from leakage.clients.victim import Victim
from leakage.models import LeNet
from leakage.solvers import STATUS, ImageSpectrum, PerVictimOptimizer, normal_equations
from leakage.solvers.normal_equations import dense_bytes

from .conftest import gauss_newton

both_solvers = pytest.mark.parametrize("solver", ["cg", "cholesky"])


class Curved:
    """Eight equations in five unknowns, u + c u^2 = 0 with u = A (x - s): zero at s, and else hardly."""

    def __init__(self, seed: int, victims: int, curvature: float = 0.1, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.matrices = torch.randn(victims, 8, 5, generator=generator, dtype=torch.float64).to(dtype)
        self.solutions = torch.randn(victims, 5, generator=generator, dtype=torch.float64).to(dtype)
        self.starts = self.solutions + torch.randn(victims, 5, generator=generator, dtype=torch.float64).to(dtype)
        self.curvature = curvature
        self.kept = torch.arange(victims)  # which victim each lane has

    def equations(self, points: Tensor, lanes: Tensor) -> Tensor:
        chosen = self.kept[lanes]
        away = torch.einsum("vij,vj->vi", self.matrices[chosen], points - self.solutions[chosen])
        return away + self.curvature * away.square()

    def solver(self, chosen: slice | list[int] = slice(None), **options: Any) -> PerVictimOptimizer:
        """The lanes of some victims, their unknowns in two parameters."""
        self.kept = self.kept[chosen]
        return gauss_newton(self.parameters(self.kept), equations=self.equations, **options)

    def parameters(self, victims: Tensor) -> list[nn.Parameter]:
        starts = self.starts[victims]
        return [nn.Parameter(starts[:, :4].reshape(-1, 2, 2).clone()), nn.Parameter(starts[:, 4:].clone())]


def closure_of(optimizer: PerVictimOptimizer, equations: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        params = optimizer.param_groups[0]["params"]
        points = torch.cat([param.flatten(1) for param in params], dim=1)
        losses = equations(points, torch.arange(len(points))).square().sum(1)
        for param, gradient in zip(params, torch.autograd.grad(losses.sum(), params), strict=True):
            param.grad = gradient
        return losses

    return closure


def run(optimizer: PerVictimOptimizer, equations: Callable[[Tensor, Tensor], Tensor], limit: int = 300) -> None:
    closure = closure_of(optimizer, equations)
    for _ in range(limit):
        if not optimizer.running.any():
            return
        optimizer.step(closure)
    raise AssertionError(f"still running after {limit} steps")


def single(starts: Tensor, equations: Callable[[Tensor, Tensor], Tensor], **options: Any) -> PerVictimOptimizer:
    return gauss_newton([nn.Parameter(starts.clone())], equations=equations, **options)


def names(optimizer: PerVictimOptimizer) -> list[str]:
    return [STATUS[status] for status in optimizer.status.tolist()]


def flat(optimizer: PerVictimOptimizer) -> Tensor:
    return torch.cat([param.detach().flatten(1) for param in optimizer.param_groups[0]["params"]], dim=1)


def network() -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """Gradient equations of three victims, a small LeNet each; their images, and starts nearby."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (1, 8, 8), torch.float64
    victim = Victim(LeNet(1, 8, num_classes=4, width=4).to(dtype), image_shape=shape)
    states = {name: state.to(dtype) for name, state in victim.fresh_states([0, 1, 2]).items()}
    images, labels = torch.rand(3, 1, *shape, generator=generator, dtype=dtype), torch.tensor([0, 1, 3])
    shared = victim.share(images, labels[:, None], states=states).gradients
    targets = torch.eye(4, dtype=dtype)[labels]
    norms = torch.cat([gradient.flatten(1) for gradient in shared.values()], dim=1).norm(dim=1)

    def residuals(point: Tensor, state: Any, target: Tensor, goal: dict[str, Tensor], norm: Tensor) -> Tensor:
        found = victim.gradients(state, point.view(1, *shape), target[None])
        return torch.cat([(found[name] - goal[name]).flatten() for name in goal]) / norm

    def equations(points: Tensor, lanes: Tensor) -> Tensor:
        state, goal = ({name: t[lanes] for name, t in ts.items()} for ts in (states, shared))
        return vmap(residuals)(points, state, targets[lanes], goal, norms[lanes])

    solutions = images.flatten(1)
    return equations, solutions, solutions + 0.05 * torch.randn(3, 64, generator=generator, dtype=dtype)


@pytest.mark.parametrize("solver", ["auto", "cg", "cholesky"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-9), (torch.float64, 1e-20)])
def test_solves_in_the_precision_of_the_parameters(solver: str, dtype: torch.dtype, tolerance: float) -> None:
    problem = Curved(0, 12, dtype=dtype)
    optimizer = problem.solver(solver=solver, tolerance=tolerance)
    run(optimizer, problem.equations)
    assert names(optimizer) == ["converged"] * 12
    assert bool((optimizer.evaluations <= 15).all())
    assert len(set(optimizer.evaluations.tolist())) > 1, "every victim takes its own number of steps"
    torch.testing.assert_close(flat(optimizer), problem.solutions, rtol=1e-3, atol=20 * tolerance**0.5)
    for name in ("best", "best_loss", "point", "loss", "first_loss", "promised", "damping"):
        assert optimizer.lanes[name].dtype == dtype, name


@both_solvers
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_right_digits_double_near_the_solution(
    solver: str, preconditioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On victims with known images; without damping or chords, so that nothing else slows or speeds the steps."""
    monkeypatch.setattr(normal_equations, "_CHORD_SHARE", 0.0)
    equations, solutions, starts = network()
    optimizer = single(
        starts,
        equations,
        solver=solver,
        damping=1e-16,
        max_products=400,
        spectrum=ImageSpectrum(1, (1, 8, 8)) if preconditioned else None,
    )
    closure = closure_of(optimizer, equations)
    distances = []
    for _ in range(6):
        distances.append((flat(optimizer) - solutions).norm(dim=1))
        optimizer.step(closure)
    for lane in range(3):
        right = [-math.log10(float(distance[lane])) for distance in distances]
        assert right[-1] > 6, right
        # From the first right digit on, until rounding or what conjugate gradients leave.
        near = [(before, after) for before, after in pairwise(right) if 1 < before < 3.5]
        assert near, right
        assert all(after > 1.7 * before for before, after in near), right
    assert float(optimizer.best_loss.max()) < 1e-16


@both_solvers
def test_victims_together_take_the_points_they_take_alone(solver: str) -> None:
    equations, _, starts = network()
    starts = starts + 0.2 * torch.randn(3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = single(starts, equations, solver=solver, max_products=25)
    closure, points = closure_of(together, equations), []
    for _ in range(4):
        points.append(flat(together))
        together.step(closure)
    for lane in range(3):

        def own(points: Tensor, lanes: Tensor, lane: int = lane) -> Tensor:
            return equations(points, torch.full_like(lanes, lane))

        alone = single(starts[lane : lane + 1], own, solver=solver, max_products=25)
        closure = closure_of(alone, own)
        for step in range(4):
            torch.testing.assert_close(flat(alone)[0], points[step][lane], rtol=1e-5, atol=1e-6)
            alone.step(closure)


def test_the_damping_follows_what_the_linear_equations_promised() -> None:
    """Every rule of it, by hand, along strongly rippled searches (Cholesky raises it within a step, too)."""
    problem = Curved(3, 64, curvature=0.0)

    def equations(points: Tensor, lanes: Tensor) -> Tensor:
        away = problem.equations(points, lanes)
        return away + 0.6 * torch.sin(4 * away)

    optimizer = single(problem.starts, equations, solver="cg", damping=1e-2)
    closure = closure_of(optimizer, equations)
    optimizer.step(closure)
    factors = set()
    for _ in range(12):
        before = {name: tensor.clone() for name, tensor in optimizer.lanes.items()}
        losses = equations(flat(optimizer), torch.arange(64)).square().sum(1)
        evaluated = flat(optimizer)
        optimizer.step(closure)
        after = optimizer.lanes
        for lane in before["status"].eq(0).nonzero().flatten().tolist():
            old, new = float(before["loss"][lane]), float(losses[lane])
            ratio = (old - new) / float(before["promised"][lane])
            factor = 0.1 if ratio > 0.75 else 4.0 if ratio < 0.25 else 1.0
            assert float(after["damping"][lane]) == pytest.approx(factor * float(before["damping"][lane]))
            if new < old:
                assert torch.equal(after["point"][lane], evaluated[lane])
                assert float(after["loss"][lane]) == pytest.approx(new)
                assert after["iterations"][lane] == before["iterations"][lane] + 1
                factors.add(("accepted", factor))
            else:  # taken back
                assert torch.equal(after["point"][lane], before["point"][lane])
                assert after["loss"][lane] == before["loss"][lane]
                assert after["iterations"][lane] == before["iterations"][lane]
                factors.add(("taken back", factor))
    assert factors == {("accepted", 0.1), ("accepted", 1.0), ("accepted", 4.0), ("taken back", 4.0)}
    assert torch.equal(optimizer.best_loss, optimizer.lanes["loss"])


@both_solvers
def test_linear_equations_are_solved_as_promised(solver: str) -> None:
    problem = Curved(4, 3, curvature=0.0)
    optimizer = problem.solver(solver=solver, damping=1e-8)
    closure = closure_of(optimizer, problem.equations)
    optimizer.step(closure)
    before, promised = optimizer.best_loss.clone(), optimizer.lanes["promised"].clone()
    optimizer.step(closure)
    torch.testing.assert_close(before - optimizer.best_loss, promised, rtol=1e-9, atol=0)
    torch.testing.assert_close(optimizer.lanes["damping"], torch.full((3,), 1e-9, dtype=torch.float64))


@both_solvers
def test_steps_back_from_where_the_loss_is_not_finite(solver: str) -> None:
    # The first step from 4 leaves the domain of the logarithm.
    starts = torch.tensor([[4.0], [1.5]], dtype=torch.float64)
    optimizer = single(starts, lambda x, lanes: x.log(), solver=solver, tolerance=1e-20)
    closure, seen = closure_of(optimizer, lambda x, lanes: x.log()), []
    while optimizer.running.any():
        seen.append(optimizer.step(closure))
    assert names(optimizer) == ["converged"] * 2
    # Cholesky looks at the residuals before it takes a step.
    assert bool(torch.stack(seen)[:, 0].isnan().any()) == (solver == "cg")
    torch.testing.assert_close(flat(optimizer), torch.ones(2, 1, dtype=torch.float64))


@both_solvers
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_victim_that_breaks_spoils_nobody(solver: str, bad: float) -> None:
    problem = Curved(5, 3)

    def broken(points: Tensor, lanes: Tensor) -> Tensor:
        scale = torch.where(lanes == 1, bad, 1.0).double()
        return problem.equations(points, lanes) * scale[:, None]

    good = problem.solver(solver=solver, tolerance=1e-20)
    run(good, problem.equations)
    spoilt = gauss_newton(problem.parameters(problem.kept), equations=broken, solver=solver, tolerance=1e-20)
    run(spoilt, broken)
    assert names(spoilt) == ["converged", "diverged", "converged"]
    assert int(spoilt.evaluations[1]) == 1
    assert torch.equal(flat(spoilt)[1], problem.starts[1])
    assert math.isinf(float(spoilt.best_loss[1]))
    torch.testing.assert_close(flat(spoilt)[::2], flat(good)[::2], rtol=1e-10, atol=1e-10)
    assert torch.equal(spoilt.evaluations[::2], good.evaluations[::2])


@both_solvers
def test_stalls_where_nothing_more_is_to_be_had(solver: str) -> None:
    # A loss that can't fall below 1, and one that is flat from the start.
    starts = torch.tensor([[0.7, -0.4], [0.0, 0.0]], dtype=torch.float64)

    def equations(points: Tensor, lanes: Tensor) -> Tensor:
        return torch.cat([points, torch.ones_like(points[:, :1])], dim=1)

    optimizer = single(starts, equations, solver=solver, tolerance=1e-6)
    run(optimizer, equations)
    assert names(optimizer) == ["stalled"] * 2
    torch.testing.assert_close(optimizer.best_loss, torch.ones(2, dtype=torch.float64))
    assert int(optimizer.evaluations[1]) == 1
    assert 3 < int(optimizer.evaluations[0]) <= 20


@both_solvers
def test_near_rounding_it_stalls_sooner(solver: str) -> None:
    problem = Curved(6, 4, dtype=torch.float32)
    optimizer = problem.solver(solver=solver)
    run(optimizer, problem.equations)
    settled = {"stalled", "converged"}  # exactly zero, now and then
    assert set(names(optimizer)) <= settled
    assert bool((optimizer.lanes["loss"] < 1e-9 * optimizer.lanes["first_loss"]).all())
    assert bool((optimizer.evaluations <= 14).all())


def test_is_exhausted_after_its_evaluations() -> None:
    problem = Curved(7, 2)
    problem.starts[1] = problem.solutions[1]
    optimizer = problem.solver(tolerance=1e-20, max_evaluations=3)
    run(optimizer, problem.equations)
    assert names(optimizer) == ["exhausted", "converged"]
    assert optimizer.evaluations.tolist() == [3, 1]


def test_a_victim_that_is_done_neither_moves_nor_counts() -> None:
    problem = Curved(8, 2)
    problem.starts[0] = problem.solutions[0]
    optimizer = problem.solver()
    closure = closure_of(optimizer, problem.equations)
    optimizer.step(closure)
    assert names(optimizer) == ["converged", "running"]
    before = {name: tensor[0].clone() for name, tensor in optimizer.lanes.items()}
    for _ in range(4):
        optimizer.step(closure)
    for name, tensor in optimizer.lanes.items():
        assert torch.equal(tensor[0], before[name]), name
    assert torch.equal(flat(optimizer)[0], problem.solutions[0])
    assert int(optimizer.evaluations[1]) == 5


@pytest.mark.parametrize(
    "solver",
    ["cg", "cholesky"],
)
def test_no_unknown_changes_by_more_than_the_longest_step(solver: str) -> None:
    largest = {}
    for max_step in (0.05, math.inf):
        problem = Curved(9, 6)
        optimizer = problem.solver(solver=solver, tolerance=1e-16, max_step=max_step)
        closure = closure_of(optimizer, problem.equations)
        largest[max_step] = 0.0
        while optimizer.running.any():
            optimizer.step(closure)
            change = (flat(optimizer) - optimizer.lanes["point"]).abs().max()
            largest[max_step] = max(largest[max_step], float(change))
    assert largest[0.05] == pytest.approx(0.05)
    assert largest[math.inf] > 0.5


def stiff(points: Tensor, lanes: Tensor) -> Tensor:
    """Lanes of odd numbers need as many products as they have unknowns, even ones a single one."""
    scales = torch.linspace(1, 10, points.shape[1], dtype=points.dtype)
    return torch.where(lanes[:, None] % 2 == 1, scales * points - 1 / scales, points - 1)


def test_auto_forms_the_jacobian_only_of_lanes_that_conjugate_gradients_did_not_solve() -> None:
    starts = torch.zeros(4, 12, dtype=torch.float64)
    optimizer = single(starts, stiff, max_products=3, damping=1e-9, tolerance=1e-20)
    closure = closure_of(optimizer, stiff)
    optimizer.step(closure)
    assert optimizer.lanes["dense"].tolist() == [False, True, False, True]
    assert optimizer.lanes["products"].tolist()[1::2] == [3, 3], "the step of conjugate gradients is not thrown away"
    optimizer.step(closure)
    assert optimizer.lanes["products"].tolist()[1::2] == [3 + 12, 3 + 12]
    run(optimizer, stiff)
    assert names(optimizer) == ["converged"] * 4
    assert optimizer.lanes["dense"].tolist() == [False, True, False, True]
    # A lane that begins anew begins with products.
    optimizer.restart(torch.tensor([1]), starts[1:2])
    assert optimizer.lanes["dense"].tolist() == [False, False, False, True]


@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_forms_no_jacobian_without_memory_for_it(solver: str) -> None:
    starts = torch.zeros(4, 12, dtype=torch.float64)
    memory = dense_bytes(12, 12, 8) - (solver == "auto")  # it would fit with one byte more
    options = {"max_products": 3, "damping": 1e-9, "max_evaluations": 8}
    if memory < dense_bytes(12, 12, 8):
        with pytest.warns(UserWarning, match="need 4,608 bytes, but `memory` is 4,607. The attack uses only products"):
            optimizer = single(starts, stiff, solver=solver, memory=memory, **options)
    else:
        optimizer = single(starts, stiff, solver=solver, memory=memory, **options)
    closure = closure_of(optimizer, stiff)
    for _ in range(4):
        optimizer.step(closure)
    assert not optimizer.lanes["dense"].any()


solvers_and_budgets = pytest.mark.parametrize(
    "options", [{"solver": "cholesky"}, {"solver": "cg"}, {"solver": "auto", "max_products": 3}]
)


@solvers_and_budgets
@pytest.mark.parametrize("steps", [1, 3])
def test_continues_from_its_state_bit_for_bit(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    problem = Curved(10, 4, curvature=0.4)
    one = problem.solver(damping=0.1, **options)
    closure = closure_of(one, problem.equations)
    for _ in range(steps):
        one.step(closure)
    torch.save({"solver": one.state_dict(), "params": one.param_groups[0]["params"]}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    # Loaded into a solver without lanes, as when a run is resumed.
    empty = [nn.Parameter(torch.empty(0, 2, 2).double()), nn.Parameter(torch.empty(0, 1).double())]
    other = gauss_newton(empty, equations=problem.equations, damping=0.1, **options)
    other.load_state_dict(saved["solver"])
    for parameter, value in zip(other.param_groups[0]["params"], saved["params"], strict=True):
        parameter.data = value.data
    for optimizer in (one, other):
        closure = closure_of(optimizer, problem.equations)
        for _ in range(4):
            optimizer.step(closure)
    for name, tensor in one.lanes.items():
        assert other.lanes[name].dtype == tensor.dtype, name
        assert torch.equal(other.lanes[name], tensor), name
    assert torch.equal(flat(one), flat(other))


@solvers_and_budgets
def test_selected_further_and_restarted_victims_go_on_as_they_would_alone(options: dict[str, Any]) -> None:
    problem = Curved(11, 6, curvature=0.4)
    optimizer = problem.solver(slice(4), damping=0.1, **options)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, problem.equations))
    kept = torch.tensor([3, 1])
    optimizer.select(kept)
    problem.kept = torch.tensor([3, 1, 5, 4])
    optimizer.extend(*problem.parameters(torch.tensor([5, 4])))
    assert optimizer.evaluations.tolist() == [2, 2, 0, 0]
    optimizer.step(closure_of(optimizer, problem.equations))
    # The second lane begins anew.
    optimizer.restart(torch.tensor([1]), *problem.parameters(torch.tensor([1])))
    for _ in range(2):
        optimizer.step(closure_of(optimizer, problem.equations))
    assert optimizer.evaluations.tolist() == [5, 2, 3, 3]
    for lane, (victim, steps) in enumerate([(3, 5), (1, 2), (5, 3), (4, 3)]):
        problem.kept = torch.tensor([victim])
        alone = gauss_newton(problem.parameters(problem.kept), equations=problem.equations, damping=0.1, **options)
        for _ in range(steps):
            alone.step(closure_of(alone, problem.equations))
        assert int(alone.lanes["products"][0]) == int(optimizer.lanes["products"][lane])
        for name in ("best", "best_loss", "point", "loss", "damping", "promised"):
            torch.testing.assert_close(optimizer.lanes[name][lane], alone.lanes[name][0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(flat(optimizer)[lane], flat(alone)[0], rtol=1e-6, atol=1e-9)


def test_lanes_may_be_none_at_first() -> None:
    problem = Curved(12, 2)
    empty = [nn.Parameter(torch.empty(0, 2, 2).double()), nn.Parameter(torch.empty(0, 1).double())]
    optimizer = gauss_newton(empty, equations=problem.equations, tolerance=1e-16)
    assert not optimizer.running.any()
    optimizer.extend(*problem.parameters(problem.kept))
    run(optimizer, problem.equations)
    assert names(optimizer) == ["converged"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "Expected `damping` to be positive and finite, but got 0.0"),
        ({"max_step": 0.0}, "Expected `max_step` to be positive, but got 0.0"),
        ({"max_step": math.nan}, "Expected `max_step` to be positive, but got nan"),
        ({"tolerance": -1.0}, "Expected `tolerance` of at least 0, but got -1.0"),
        ({"max_evaluations": 0}, "Expected `max_evaluations` to be a whole number of at least 1, but got 0"),
        ({"max_products": 2.5}, "Expected `max_products` to be a whole number .* but got 2.5"),
        ({"memory": 0}, "Expected `memory` to be a whole number of at least 1, but got 0"),
        ({"solver": "qr"}, r"Expected `solver` to be one of \['auto', 'cg', 'cholesky'\], but got 'qr'"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        single(torch.zeros(2, 3), stiff, **options)
