"""L-BFGS for many victims at once, each with its own history, step length and line search."""

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

# Armijo's condition asks for this share of the decrease that the slope promises.
_SUFFICIENT_DECREASE = 1e-4
# A pair is stored if s.y exceeds this share of |y|^2 (else the direction could point uphill).
_CURVATURE = 1e-10


@dataclass(kw_only=True, repr=False, eq=False)
class LBFGS(Remembering):
    """L-BFGS with backtracking, safeguarded for each victim on its own.

    At every step each victim is evaluated at its own trial point. Where Armijo's condition
    ``f(x + t d) <= f(x) + 1e-4 t <g, d>`` holds, the point is accepted and the next direction is
    tried with step length 1; elsewhere the victim shortens its own step by quadratic interpolation.
    So no victim waits for another one's line search. A victim whose step has become too short
    forgets its history and tries the steepest descent (times the preconditioner); if that fails too, it
    has stalled.

    Where points have to stay in a box, entries that lie on its border and are pulled outwards stay there, and the
    others move by the quasi-Newton direction among them.

    Args:
        lr: length of the first trial along each quasi-Newton direction.
        max_step: no unknown changes by more than this in one step.
        history_size: pairs (s, y) each victim remembers.
        tolerance: a victim has converged when its loss is at most this.
        max_evaluations: evaluations per start after which a victim is exhausted.
        stall_window: a victim has stalled if its loss has not fallen below ``stall_factor`` times what
            it was this many evaluations, or a third of all its evaluations, ago.
        stall_factor: see ``stall_window``.
        spectrum: begin from the covariance that images have (:class:`~leakage.solvers.ImageSpectrum`), where unknowns
            are pixels, in place of the identity.

    Raises:
        ValueError: an option out of its range.

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
        """History, last accepted point with loss and gradient, direction with slope and length, stall window."""
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
        """Histories stay in the memory where they are, if most of them stay."""
        others = {name: tensor[kept] for name, tensor in lanes.items() if name not in HISTORY}
        return others | keep(_history(lanes), kept)

    def renew(self, lanes: State, chosen: Tensor, fresh: State) -> None:
        """Histories are emptied in place."""
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
        # In a box the step is shorter than it was meant to be.
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

        # Too short a step: begin again along the steepest descent, or give up if that was tried.
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
        """Converged, stalled or out of budget?"""
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
    """Makes zero of the entries that lie on the border of their box and are pulled outwards by the gradient."""
    if problem.project is None:
        return lambda vectors: vectors
    point, gradient = lanes["point"], lanes["gradient"]
    # A small step along the gradient that ends where it began.
    pulled = problem.project(point - gradient.sign() * 1e-3 * (1 + point.abs()))
    free = ((pulled != point) | (gradient == 0)).to(point)
    return lambda vectors: free * vectors


def _shorten(lanes: State, losses: Tensor, finite: Tensor) -> Tensor:
    """Minimum of the parabola through the value, the slope and the rejected trial, within bounds."""
    length, slope = lanes["length"], lanes["slope"]
    parabola = -slope * length.square() / (2 * (losses - lanes["loss"] - slope * length))
    parabola = torch.where(finite & torch.isfinite(parabola), parabola, 0.1 * length)
    return torch.maximum(torch.minimum(parabola, 0.5 * length), 0.1 * length)
