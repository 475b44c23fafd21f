"""L-BFGS as ``torch.optim.LBFGS`` without line search, for many victims at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.errors import check_count, check_not_negative, check_positive
from leakage.pieces import State
from leakage.solvers.history import HISTORY, Remembering, fresh_history, push_and_recurse
from leakage.solvers.solver import CONVERGED, DIVERGED, EXHAUSTED, STALLED, Evaluated, Problem, Solver, running, settle

# As in torch.optim.LBFGS.
_TOLERANCE_GRADIENT = 1e-7
_TOLERANCE_CHANGE = 1e-9
_CURVATURE = 1e-10


@dataclass(kw_only=True, repr=False, eq=False)
class PlainLBFGS(Remembering):
    """The published search of DLG and iDLG: every victim follows the iterates of ``torch.optim.LBFGS``.

    It makes full steps of length ``lr`` without a line search: ``max_calls`` calls of ``step`` with ``max_iterations``
    iterations each. The loss is compared with ``tolerance`` every ``check_every`` calls. Victims may diverge; the
    iterate with the lowest loss is kept. Use :class:`leakage.solvers.LBFGS` for more successes in less time, or if
    pixels must stay in a box.

    Args:
        lr: length of every step except the first, which has length ``lr * min(1, 1 / |g|_1)``.
        history_size: number of pairs (s, y) that each victim remembers.
        max_iterations: iterations per call.
        max_calls: calls after which a victim is exhausted.
        check_every: calls between two comparisons with ``tolerance``, starting with the first call.
        tolerance: a victim has converged when its loss is below this.

    Raises:
        ValueError: if an option is out of range; in ``fit``, if the problem has a box.

    References:
        Zhu et al., *Deep Leakage from Gradients*, NeurIPS 2019, https://arxiv.org/abs/1906.08935.

    Example:
        >>> PlainLBFGS().max_calls * PlainLBFGS().max_iterations
        6000
    """

    lr: float = 1.0
    history_size: int = 100
    max_iterations: int = 20
    max_calls: int = 300
    check_every: int = 10
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_count(
            history_size=self.history_size,
            max_iterations=self.max_iterations,
            max_calls=self.max_calls,
            check_every=self.check_every,
        )
        check_not_negative(tolerance=self.tolerance)

    def fit(self, problem: Problem) -> Solver:
        """Return this solver, unless points must stay in a box."""
        if problem.project is not None:
            raise ValueError("Expected no box with PlainLBFGS, which cannot stay in one, but got one. Use LBFGS.")
        return self

    def fresh(self, like: Tensor) -> State:
        """Return history, loss and gradient at the previous iterate, the step from it, and the number of calls."""
        count = torch.zeros(len(like), dtype=torch.long, device=like.device)
        return {
            **fresh_history(len(like), like.shape[1], self.history_size, like),
            "loss": like.new_zeros(len(like)),
            "gradient": torch.zeros_like(like),
            "step": torch.zeros_like(like),
            "calls": count,
            "in_call": count.clone(),
        }

    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """Make one iteration for each victim."""
        point, losses, gradient, finite = at.point, at.losses, at.gradient, at.finite
        settle(lanes, ~finite, DIVERGED)
        flat = gradient.abs().amax(1) <= _TOLERANCE_GRADIENT
        # If this evaluation ends a call, the next call first evaluates the same point.
        ends = (lanes["in_call"] > 0) & (
            flat
            | (lanes["step"].abs().amax(1) <= _TOLERANCE_CHANGE)
            | ((losses - lanes["loss"]).abs() < _TOLERANCE_CHANGE)
        )
        lanes["calls"] += ends & running(lanes)
        lanes["in_call"] = torch.where(ends, 0, lanes["in_call"])
        starts = lanes["in_call"] == 0
        checked = starts & (lanes["calls"] > 0) & ((lanes["calls"] - 1) % self.check_every == 0)
        settle(lanes, checked & (losses < self.tolerance), CONVERGED)
        settle(lanes, lanes["calls"] >= self.max_calls, EXHAUSTED)
        lanes["evaluations"] += ends & running(lanes)
        # A call that starts at a vanishing gradient does nothing, and neither do the following ones, until one is
        # compared with the tolerance.
        below = losses < self.tolerance if self.tolerance > 0 else flat
        settle(lanes, starts & flat & below, CONVERGED)
        settle(lanes, starts & flat, STALLED)

        first = lanes["iterations"] == 0
        change = gradient - lanes["gradient"]
        product = (lanes["step"] * change).sum(1)
        pushed = running(lanes) & ~first & (product > _CURVATURE)
        history = {name: lanes[name] for name in HISTORY if name in lanes}
        direction = push_and_recurse(history, self.history_size, pushed, lanes["step"], change, gradient)
        lanes.update(history)
        length = self.lr * torch.where(first, torch.clamp(1 / gradient.abs().sum(1), max=1.0), 1.0)
        # A call that finds no descent does nothing either: the next one would start from the same state.
        uphill = (direction * gradient).sum(1) > -_TOLERANCE_CHANGE
        settle(lanes, uphill & below, CONVERGED)
        settle(lanes, uphill, STALLED)

        searching = running(lanes)
        lanes["iterations"] += searching
        lanes["in_call"] += searching
        full = searching & (lanes["in_call"] == self.max_iterations)
        lanes["calls"] += full
        lanes["in_call"] = torch.where(full, 0, lanes["in_call"])
        lanes["gradient"] = torch.where(searching[:, None], gradient, lanes["gradient"])
        lanes["loss"] = torch.where(searching, losses, lanes["loss"])
        lanes["step"] = torch.where(searching[:, None], length[:, None] * direction, lanes["step"])
        return point + lanes["step"]
