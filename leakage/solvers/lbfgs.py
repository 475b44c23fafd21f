"""L-BFGS for many victims at once, with separate history, step length and line search for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.errors import check_count, check_flag, check_limit, check_not_negative, check_positive
from leakage.pieces import State
from leakage.solvers.history import (
    HISTORY,
    Remembering,
    begin_anew,
    forget,
    fresh_history,
    fresh_products,
    keep,
    push_and_direct,
    times,
)
from leakage.solvers.solver import CONVERGED, DIVERGED, EXHAUSTED, STALLED, Evaluated, Problem, running, settle

# Armijo's condition requires this share of the decrease that the slope predicts.
_SUFFICIENT_DECREASE = 1e-4
# A pair is stored if s.y exceeds this share of |y|^2 (otherwise the direction could point uphill).
_CURVATURE = 1e-10


@dataclass(kw_only=True, repr=False, eq=False)
class LBFGS(Remembering):
    """L-BFGS with a backtracking line search, separate for each victim.

    At every step, each victim is evaluated at its own trial point. If Armijo's condition
    ``f(x + t d) <= f(x) + 1e-4 t <g, d>`` holds, the point is accepted, and the next direction is tried with step
    length 1. Otherwise the victim shortens its step by quadratic interpolation. So no victim waits for the line search
    of another. A victim whose step becomes too short clears its history and tries the (preconditioned) steepest
    descent; if that fails too, it has stalled.

    If points must stay in a box, entries on its border that are pulled outwards stay there. The others move by the
    quasi-Newton direction restricted to them.

    Args:
        lr: length of the first trial step along each quasi-Newton direction.
        max_step: no unknown changes by more than this in one step.
        history_size: number of pairs (s, y) that each victim remembers.
        tolerance: a victim has converged when its loss is at most this.
        max_evaluations: evaluations per start after which a victim is exhausted.
        stall_window: a victim has stalled if its loss is not below ``stall_factor`` times its loss this many
            evaluations, or a third of all its evaluations, ago.
        stall_factor: see ``stall_window``.
        spectrum: whether the initial inverse Hessian is the typical covariance of images
            (:class:`~leakage.solvers.ImageSpectrum`) if unknowns are pixels; otherwise it is the identity.

    Raises:
        ValueError: if an option is out of range.

    References:
        Liu and Nocedal, *On the limited memory BFGS method for large scale optimization*, 1989,
        https://doi.org/10.1007/BF01589116; Bertsekas, *Projected Newton methods for optimization problems with simple
        constraints*, 1982, https://doi.org/10.1137/0320018.

    Example:
        >>> LBFGS(tolerance=1e-8, max_evaluations=300).history_size
        100
    """

    lr: float = 1.0
    max_step: float = math.inf
    history_size: int = 100
    tolerance: float = 0.0
    max_evaluations: int = 1000
    stall_window: int = 100
    stall_factor: float = 0.9
    spectrum: bool = True

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_limit(max_step=self.max_step)
        check_not_negative(tolerance=self.tolerance)
        check_count(
            history_size=self.history_size, max_evaluations=self.max_evaluations, stall_window=self.stall_window
        )
        check_flag(spectrum=self.spectrum)
        check_positive(stall_factor=self.stall_factor)
        if self.stall_factor > 1:
            raise ValueError(f"Expected `stall_factor` in (0, 1], but got {self.stall_factor!r}.")

    def fresh(self, like: Tensor) -> State:
        """Return history, last accepted point with loss and gradient, direction, slope, length and stall window."""
        losses = like.new_full((len(like),), torch.inf)
        history = fresh_history(len(like), like.shape[1], self.history_size, like)
        return {
            **history,
            **fresh_products(history),
            "point": torch.zeros_like(like),
            "loss": losses,
            "gradient": torch.zeros_like(like),
            "direction": torch.zeros_like(like),
            "slope": like.new_zeros(len(like)),
            "length": like.new_zeros(len(like)),
            "window_loss": losses.clone(),
            "window_end": torch.full((len(like),), self.stall_window, device=like.device),
        }

    def select(self, lanes: State, kept: Tensor) -> State:
        """Return the state of the lanes at these indices; most histories are kept in place."""
        others = {name: tensor[kept] for name, tensor in lanes.items() if name not in HISTORY}
        return others | keep(_history(lanes), kept)

    def renew(self, lanes: State, chosen: Tensor, fresh: State) -> None:
        """Replace the state of the lanes at these indices by a fresh one; histories are cleared in place."""
        for name, tensor in fresh.items():
            if name not in HISTORY:
                lanes[name][chosen] = tensor
        begin_anew(_history(lanes), chosen)

    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """Accept the trial points, or shorten the steps that led to them."""
        point, losses, gradient, finite = at.point, at.losses, at.gradient, at.finite
        preconditioner = at.problem.preconditioner if self.spectrum else None
        searching, new = running(lanes), torch.isinf(lanes["loss"])
        settle(lanes, searching & new & ~finite, DIVERGED)
        step, change = point - lanes["point"], gradient - lanes["gradient"]
        # Projection onto a box may have shortened the step.
        if at.problem.project is None:
            decrease = _SUFFICIENT_DECREASE * lanes["length"] * lanes["slope"]
        else:
            decrease = _SUFFICIENT_DECREASE * (step * lanes["gradient"]).sum(1)
        promised = lanes["loss"] + decrease
        accepted = searching & finite & (new | (losses <= promised) & (losses < lanes["loss"]))
        rejected = running(lanes) & ~accepted
        product = (step * change).sum(1)
        pushed = accepted & ~new & (product > _CURVATURE * change.square().sum(1)) & (product < torch.inf)
        length = _shorten(lanes, losses, finite)
        lanes["iterations"] += accepted & ~new
        for name, value in (("point", point), ("gradient", gradient)):
            torch.where(accepted[:, None], value, lanes[name], out=lanes[name])
        lanes["loss"] = torch.where(accepted, losses, lanes["loss"])

        # If a step is too short, try the steepest descent, or give up if that has been tried.
        too_short = rejected & (
            length * lanes["direction"].abs().amax(1)
            <= torch.finfo(point.dtype).eps * (1 + lanes["point"].abs().amax(1))
        )
        hopeless = too_short & (lanes["pairs"] == 0)
        settle(lanes, hopeless, STALLED)
        again = too_short & ~hopeless
        forget(_history(lanes), again)

        if bool((accepted | again).any()):
            history, free = _history(lanes), _free(lanes, at.problem)
            downhill = push_and_direct(
                history, self.history_size, pushed, step, change, free(lanes["gradient"]), preconditioner
            )
            direction = free(downhill)
            lanes.update(history)
            slope = (direction * lanes["gradient"]).sum(1)
            uphill = (accepted | again) & ~(slope < 0)
            if bool(uphill.any()):
                forget(_history(lanes), uphill)
                steepest = -free(times(preconditioner, free(lanes["gradient"])))
                direction = torch.where(uphill[:, None], steepest, direction)
                slope = torch.where(uphill, (steepest * lanes["gradient"]).sum(1), slope)
            cautious = torch.clamp(1 / direction.abs().sum(1), max=1.0)
            longest = self.max_step / direction.abs().amax(1)
            fresh_length = torch.minimum(self.lr * torch.where(lanes["pairs"] == 0, cautious, 1.0), longest)
            turned = accepted | again
            torch.where(turned[:, None], direction, lanes["direction"], out=lanes["direction"])
            lanes["slope"] = torch.where(turned, slope, lanes["slope"])
            length = torch.where(turned, fresh_length, length)
        lanes["length"] = torch.where(accepted | rejected, length, lanes["length"])
        self._judge(lanes)
        return lanes["point"] + lanes["length"][:, None] * lanes["direction"]

    def _judge(self, lanes: State) -> None:
        """End lanes that have converged, stalled or spent their budget."""
        settle(lanes, lanes["loss"] <= self.tolerance, CONVERGED)
        settle(lanes, lanes["gradient"].abs().amax(1) == 0, STALLED)
        settle(lanes, lanes["evaluations"] >= self.max_evaluations, EXHAUSTED)
        due = running(lanes) & (lanes["evaluations"] >= lanes["window_end"])
        settle(lanes, due & (lanes["loss"] > self.stall_factor * lanes["window_loss"]), STALLED)
        # The longer a victim has made progress, the longer it may pause.
        window = torch.clamp(lanes["evaluations"] // 2, min=self.stall_window)
        lanes["window_end"] = torch.where(due, lanes["evaluations"] + window, lanes["window_end"])
        lanes["window_loss"] = torch.where(due, lanes["loss"], lanes["window_loss"])


def _history(lanes: State) -> State:
    return {name: lanes[name] for name in HISTORY}


def _free(lanes: State, problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return a function that zeroes the entries on the border of the box that descent pulls outwards."""
    if problem.project is None:
        return lambda vectors: vectors
    point, gradient = lanes["point"], lanes["gradient"]
    # Such entries do not move in a small projected step of descent.
    pulled = problem.project(point - gradient.sign() * 1e-3 * (1 + point.abs()))
    free = ((pulled != point) | (gradient == 0)).to(point)
    return lambda vectors: free * vectors


def _shorten(lanes: State, losses: Tensor, finite: Tensor) -> Tensor:
    """Return the minimum of the parabola through value, slope and rejected trial, within bounds."""
    length, slope = lanes["length"], lanes["slope"]
    parabola = -slope * length.square() / (2 * (losses - lanes["loss"] - slope * length))
    parabola = torch.where(finite & torch.isfinite(parabola), parabola, 0.1 * length)
    return torch.maximum(torch.minimum(parabola, 0.5 * length), 0.1 * length)
