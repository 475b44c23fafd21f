from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.solvers import STATUS, PerVictimOptimizer

from .conftest import lbfgs, plain_lbfgs

SOLVERS = [
    pytest.param(lbfgs, {"history_size": 3, "tolerance": 1e-12}, id="LBFGS"),
    pytest.param(plain_lbfgs, {"history_size": 3, "tolerance": 1e-12, "lr": 0.8}, id="PlainLBFGS"),
]
every_solver = pytest.mark.parametrize(("solver", "options"), SOLVERS)


def closure_for(optimizer: PerVictimOptimizer, goals: Tensor) -> Any:
    """Ripples around a goal of each victim; the goals follow the lanes."""

    def closure() -> Tensor:
        x, z = optimizer.param_groups[0]["params"]
        away = torch.cat([x.flatten(1), z.flatten(1)], dim=1) - goals
        losses = (torch.tensor([1.0, 5.0, 20.0, 2.0]) * (away.square() + 0.2 * away.pow(4))).sum(1)
        x.grad, z.grad = torch.autograd.grad(losses.sum(), [x, z])
        return losses

    return closure


def starts(victims: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(victims, 1, 3, generator=generator), torch.randn(victims, 1, generator=generator)


def params(victims: int, seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(start) for start in starts(victims, seed)]


def lanes_of(optimizer: PerVictimOptimizer, lane: int) -> dict[str, Tensor]:
    return {name: tensor[lane] for name, tensor in optimizer.lanes.items()}


@every_solver
def test_selected_victims_go_on_as_they_were(solver: Any, options: dict[str, Any]) -> None:
    goals = starts(5, 1)[0][:, 0, :1].expand(5, 4)
    whole, part = solver(params(5), **options), solver(params(5), **options)
    for optimizer in (whole, part):
        for _ in range(6):
            optimizer.step(closure_for(optimizer, goals))
    kept = torch.tensor([4, 1, 2])
    part.select(kept)
    assert part.status.shape == (3,)
    for _ in range(8):
        whole.step(closure_for(whole, goals))
        part.step(closure_for(part, goals[kept]))
    for new, old in enumerate(kept.tolist()):
        for theirs, ours in zip(whole.best(), part.best(), strict=True):
            torch.testing.assert_close(theirs[old], ours[new], rtol=1e-4, atol=1e-5)
        assert whole.evaluations[old] == part.evaluations[new]
    part.select(torch.tensor([False, True, False]))
    assert [tuple(p.shape) for p in part.param_groups[0]["params"]] == [(1, 1, 3), (1, 1)]


@every_solver
def test_further_victims_search_as_if_they_were_alone(solver: Any, options: dict[str, Any]) -> None:
    goals = torch.linspace(-2, 2, 5)[:, None].expand(5, 4)
    first, second = starts(2, 0), starts(3, 7)
    joined = solver([nn.Parameter(start.clone()) for start in first], **options)
    for _ in range(5):
        joined.step(closure_for(joined, goals[:2]))
    joined.extend(*second)
    alone = solver([nn.Parameter(start.clone()) for start in second], **options)
    for _ in range(9):
        joined.step(closure_for(joined, goals))
        alone.step(closure_for(alone, goals[2:]))
    assert joined.evaluations.tolist()[2:] == alone.evaluations.tolist()
    for ours, theirs in zip(joined.best(), alone.best(), strict=True):
        torch.testing.assert_close(ours[2:], theirs, rtol=1e-4, atol=1e-5)


@every_solver
def test_a_restarted_victim_knows_nothing_of_its_past(solver: Any, options: dict[str, Any]) -> None:
    goals = torch.linspace(-2, 2, 3)[:, None].expand(3, 4)
    optimizer = solver(params(3), **options)
    for _ in range(7):
        optimizer.step(closure_for(optimizer, goals))
    untouched = {name: tensor.clone() for name, tensor in lanes_of(optimizer, 0).items()}
    anew = starts(1, 9)
    optimizer.restart(torch.tensor([1]), *anew)
    assert optimizer.evaluations.tolist()[1] == 0
    assert optimizer.iterations.tolist()[1] == 0
    assert torch.isinf(optimizer.best_loss[1])
    for name, tensor in lanes_of(optimizer, 0).items():
        assert torch.equal(tensor, untouched[name]), name
    fresh = solver([nn.Parameter(start.clone()) for start in anew], **options)
    for _ in range(9):
        optimizer.step(closure_for(optimizer, goals))
        fresh.step(closure_for(fresh, goals[1:2]))
    for ours, theirs in zip(optimizer.best(), fresh.best(), strict=True):
        torch.testing.assert_close(ours[1:2], theirs, rtol=1e-4, atol=1e-5)


@every_solver
def test_a_restart_revives_a_victim_that_was_done(solver: Any, options: dict[str, Any]) -> None:
    goals = torch.zeros(2, 4)
    optimizer = solver(params(2), **options)
    for _ in range(400):
        optimizer.step(closure_for(optimizer, goals))
    assert not optimizer.running.any()
    optimizer.restart(torch.tensor([0]), *starts(1, 5))
    assert optimizer.running.tolist() == [True, False]


@every_solver
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_continues_from_its_state_bit_for_bit(solver: Any, options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    goals = torch.linspace(-2, 2, 4)[:, None].expand(4, 4)
    one = solver(params(4), **options)
    for _ in range(steps):
        one.step(closure_for(one, goals))
    torch.save({"solver": one.state_dict(), "params": one.param_groups[0]["params"]}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    # Loaded into a solver without lanes, as when a run is resumed.
    other = solver([nn.Parameter(torch.empty(0, 1, 3)), nn.Parameter(torch.empty(0, 1))], **options)
    other.load_state_dict(saved["solver"])
    for parameter, value in zip(other.param_groups[0]["params"], saved["params"], strict=True):
        parameter.data = value.data
    assert other.lanes.keys() == one.lanes.keys()
    for name, tensor in one.lanes.items():
        assert other.lanes[name].dtype == tensor.dtype, name
        assert torch.equal(other.lanes[name], tensor), name
    whole = {name for name, tensor in one.lanes.items() if not tensor.is_floating_point()}
    assert {"status", "iterations", "evaluations", "pairs"} <= whole
    for optimizer in (one, other):
        for _ in range(30):
            optimizer.step(closure_for(optimizer, goals))
    for name, tensor in one.lanes.items():
        assert torch.equal(other.lanes[name], tensor), name


@every_solver
def test_continues_bit_for_bit_after_victims_have_come_and_gone(solver: Any, options: dict[str, Any]) -> None:
    goals = torch.linspace(-2, 2, 6)[:, None].expand(6, 4)
    one = solver(params(6), **options)
    for chosen in ([3, 0], [5], [1, 3]):
        for _ in range(3):
            one.step(closure_for(one, goals))
        one.restart(torch.tensor(chosen), *starts(len(chosen), chosen[0]))
    kept = torch.tensor([5, 0, 3, 2])
    one.select(kept)
    other = solver(params(4), **options)
    other.load_state_dict(one.state_dict())
    for parameter, value in zip(other.param_groups[0]["params"], one.param_groups[0]["params"], strict=True):
        parameter.data = value.data.clone()
    for _ in range(20):
        for optimizer in (one, other):
            optimizer.step(closure_for(optimizer, goals[kept]))
    for name, tensor in one.lanes.items():
        assert torch.equal(other.lanes[name], tensor), name


@every_solver
def test_a_loaded_state_shares_nothing_with_the_saved_one(solver: Any, options: dict[str, Any]) -> None:
    goals = torch.zeros(2, 4)
    one, other = solver(params(2), **options), solver(params(2, seed=4), **options)
    one.step(closure_for(one, goals))
    other.load_state_dict(one.state_dict())
    before = {name: tensor.clone() for name, tensor in one.lanes.items()}
    for _ in range(5):
        other.step(closure_for(other, goals))
    for name, tensor in one.lanes.items():
        assert torch.equal(tensor, before[name]), name


def test_refuses_the_state_of_another_solver() -> None:
    with pytest.raises(ValueError, match=r"the solver of a checkpoint with .*'window_loss'.*, but got .*'calls'"):
        lbfgs(params(2)).load_state_dict(plain_lbfgs(params(2)).state_dict())


@every_solver
def test_refuses_parameters_that_are_no_lanes(solver: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"one leading dimension for the victims, but got \[2, 3\]"):
        solver([nn.Parameter(torch.zeros(2, 1)), nn.Parameter(torch.zeros(3, 1))])
    with pytest.raises(ValueError, match=r"one leading dimension for the victims, but got \[None\]"):
        solver([nn.Parameter(torch.tensor(1.0))])
    groups = [{"params": [parameter]} for parameter in params(2)]
    with pytest.raises(ValueError, match="Expected `params` as one group, but got 2"):
        solver(groups)
    with pytest.raises(ValueError, match="empty"):
        solver([])


@every_solver
def test_refuses_a_closure_that_does_not_do_its_part(solver: Any, options: dict[str, Any]) -> None:
    optimizer = solver(params(2), **options)
    with pytest.raises(ValueError, match="Expected a `closure` that returns the losses"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"Expected losses of shape \(2,\), but got \(\)"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match=r"Expected the closure to leave a gradient in `\.grad`"):
        optimizer.step(lambda: torch.zeros(2))
    # Nothing was counted and nobody moved.
    assert optimizer.evaluations.tolist() == [0, 0]
    assert STATUS[int(optimizer.status[0])] == "running"


@every_solver
def test_lanes_may_be_none_at_first(solver: Any, options: dict[str, Any]) -> None:
    optimizer = solver([nn.Parameter(torch.empty(0, 1, 3)), nn.Parameter(torch.empty(0, 1))], **options)
    assert not optimizer.running.any()
    optimizer.extend(*starts(2, 3))
    for _ in range(300):
        optimizer.step(closure_for(optimizer, torch.zeros(2, 4)))
    assert not optimizer.running.any()
    assert bool((optimizer.best_loss < 1e-6).all())


@every_solver
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("best", lambda tensor: tensor[:, :2], r"Expected the solver of a checkpoint with 'best' \(0, 4\) .* \(0, 2\)"),
        ("best", lambda tensor: tensor.double(), "Expected the solver of a checkpoint with 'best' .*float64"),
        ("best", lambda tensor: tensor.tolist(), "Expected the state of the solver of a checkpoint .* AttributeError"),
        ("s", lambda tensor: tensor[:, :, None], r"Expected the solver of a checkpoint with 's' "),
    ],
)
def test_refuses_a_state_with_other_tensors(
    solver: Any, options: dict[str, Any], name: str, change: Any, message: str
) -> None:
    optimizer = solver(params(2), **options)
    state = optimizer.state_dict()
    state["state"][0] = state["state"][0] | {name: change(state["state"][0][name])}
    before = optimizer.lanes
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.lanes is before


@pytest.mark.parametrize("state", [{}, {"state": {}}, {"state": [3], "param_groups": [{}]}])
def test_refuses_what_is_no_state(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected the state of the solver of a checkpoint as leakage writes it"):
        lbfgs(params(2)).load_state_dict(state)
