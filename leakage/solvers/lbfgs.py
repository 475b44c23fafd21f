"""L-BFGS for many victims at once, each with its own history, step length and line search."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leakage.errors import check_count, check_positive
from leakage.solvers.history import (
    HISTORY,
    Preconditioner,
    begin_anew,
    forget,
    fresh_history,
    fresh_products,
    grow,
    keep,
    push_and_direct,
    times,
)
from leakage.solvers.per_victim import CONVERGED, DIVERGED, EXHAUSTED, STALLED, PerVictimOptimizer

# Armijo's condition asks for this share of the decrease that the slope promises.
_SUFFICIENT_DECREASE = 1e-4
# A pair is stored if s.y exceeds this share of |y|^2 (else the direction could point uphill).
_CURVATURE = 1e-10


class LBFGS(PerVictimOptimizer):
    """L-BFGS with backtracking, safeguarded for each victim on its own.

    At every :meth:`step` each victim is evaluated at its own trial point. Where Armijo's condition
    ``f(x + t d) <= f(x) + 1e-4 t <g, d>`` holds, the point is accepted and the next direction is
    tried with step length 1; elsewhere the victim shortens its own step by quadratic interpolation.
    So no victim waits for another one's line search. A victim whose step has become too short
    forgets its history and tries the steepest descent (times the preconditioner); if that fails too, it
    has stalled.

    Args:
        params: parameters ``(V, ...)``, a leading victims' dimension each.
        lr: length of the first trial along each quasi-Newton direction.
        max_step: no unknown changes by more than this in one step.
        history_size: pairs (s, y) each victim remembers.
        tolerance: a victim has converged when its loss is at most this.
        max_evaluations: evaluations per start after which a victim is exhausted.
        stall_window: a victim has stalled if its loss has not fallen below ``stall_factor`` times what
            it was this many evaluations, or a third of all its evaluations, ago.
        stall_factor: see ``stall_window``.
        preconditioner: multiplies vectors ``(V, D)``, the flattened parameters one after another, by a
            symmetric, positive definite matrix that is near the inverse Hessian but for its scale; the
            identity by default. Not part of the state.

    Raises:
        ValueError: an option out of its range.

    References:
        Liu and Nocedal, *On the limited memory BFGS method for large scale optimization*, 1989,
        https://doi.org/10.1007/BF01589116.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([[3.0, -1.0], [5.0, 2.0]]))
        >>> optimizer = LBFGS([x], tolerance=1e-10)
        >>> def closure():
        ...     losses = (x - 1).square().sum(1)
        ...     x.grad = torch.autograd.grad(losses.sum(), x)[0]
        ...     return losses
        >>> while optimizer.running.any():
        ...     _ = optimizer.step(closure)
        >>> x.detach()
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1.0,
        max_step: float = math.inf,
        history_size: int = 100,
        tolerance: float = 0.0,
        max_evaluations: int = 1000,
        stall_window: int = 100,
        stall_factor: float = 0.9,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        check_positive(lr=lr)
        if not max_step > 0:
            raise ValueError(f"Expected `max_step` to be positive, but got {max_step!r}.")
        check_count(history_size=history_size, max_evaluations=max_evaluations, stall_window=stall_window)
        if not tolerance >= 0:
            raise ValueError(f"Expected `tolerance` of at least 0, but got {tolerance!r}.")
        if not 0 < stall_factor <= 1:
            raise ValueError(f"Expected `stall_factor` in (0, 1], but got {stall_factor!r}.")
        self._preconditioner = preconditioner
        super().__init__(
            params,
            {
                "lr": lr,
                "max_step": max_step,
                "history_size": history_size,
                "tolerance": tolerance,
                "max_evaluations": max_evaluations,
                "stall_window": stall_window,
                "stall_factor": stall_factor,
            },
        )

    def _fresh(self, victims: int) -> dict[str, Tensor]:
        fresh = super()._fresh(victims)
        like = fresh["best"]
        history = fresh_history(victims, like.shape[1], self._options["history_size"], like)
        return fresh | {
            **history,
            **fresh_products(history),
            "point": like.clone(),  # the last accepted point, its loss and gradient
            "loss": fresh["best_loss"].clone(),
            "gradient": like.clone(),
            "direction": like.clone(),
            "slope": like.new_zeros(victims),
            "length": like.new_zeros(victims),
            "window_loss": fresh["best_loss"].clone(),
            "window_end": torch.full_like(fresh["evaluations"], self._options["stall_window"]),
        }

    def _match(self, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        grow(fresh, self.lanes["s"].shape[1])
        fresh["row"] += len(self.lanes["row"])
        return fresh

    @property
    def _history(self) -> dict[str, Tensor]:
        return {name: self.lanes[name] for name in HISTORY}

    def _fullest(self) -> dict[str, Tensor]:
        fresh = self._fresh(1)
        grow(fresh, self._options["history_size"])
        return fresh

    def _selected(self, kept: Tensor) -> dict[str, Tensor]:
        others = {name: tensor[kept] for name, tensor in self.lanes.items() if name not in HISTORY}
        return others | keep(self._history, kept)

    def _renew(self, chosen: Tensor) -> None:
        for name, tensor in self._fresh(len(chosen)).items():
            if name not in HISTORY:
                self.lanes[name][chosen] = tensor
        begin_anew(self._history, chosen)

    def _move(self, point: Tensor, losses: Tensor, gradient: Tensor, finite: Tensor) -> Tensor:
        lanes, options = self.lanes, self._options
        running, new = self.running, torch.isinf(lanes["loss"])
        self._set_status(running & new & ~finite, DIVERGED)
        promised = lanes["loss"] + _SUFFICIENT_DECREASE * lanes["length"] * lanes["slope"]
        accepted = running & finite & (new | (losses <= promised) & (losses < lanes["loss"]))
        rejected = self.running & ~accepted

        step, change = point - lanes["point"], gradient - lanes["gradient"]
        product = (step * change).sum(1)
        pushed = accepted & ~new & (product > _CURVATURE * change.square().sum(1)) & (product < torch.inf)
        length = self._shorten(losses, finite)
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
        self._set_status(hopeless, STALLED)
        again = too_short & ~hopeless
        forget(self._history, again)

        if bool((accepted | again).any()):
            history = self._history
            direction = push_and_direct(
                history, options["history_size"], pushed, step, change, lanes["gradient"], self._preconditioner
            )
            lanes.update(history)
            slope = (direction * lanes["gradient"]).sum(1)
            uphill = (accepted | again) & ~(slope < 0)
            if bool(uphill.any()):
                forget(self._history, uphill)
                steepest = -times(self._preconditioner, lanes["gradient"])
                direction = torch.where(uphill[:, None], steepest, direction)
                slope = torch.where(uphill, (steepest * lanes["gradient"]).sum(1), slope)
            first = lanes["pairs"] == 0
            cautious = torch.clamp(1 / direction.abs().sum(1), max=1.0)
            longest = options["max_step"] / direction.abs().amax(1)
            fresh_length = torch.minimum(options["lr"] * torch.where(first, cautious, 1.0), longest)
            turned = accepted | again
            torch.where(turned[:, None], direction, lanes["direction"], out=lanes["direction"])
            lanes["slope"] = torch.where(turned, slope, lanes["slope"])
            length = torch.where(turned, fresh_length, length)
        lanes["length"] = torch.where(accepted | rejected, length, lanes["length"])
        self._judge()
        target = lanes["point"] + lanes["length"][:, None] * lanes["direction"]
        return torch.where(self.running[:, None], target, point)

    def _shorten(self, losses: Tensor, finite: Tensor) -> Tensor:
        """Minimum of the parabola through the value, the slope and the rejected trial, within bounds."""
        length, slope = self.lanes["length"], self.lanes["slope"]
        parabola = -slope * length.square() / (2 * (losses - self.lanes["loss"] - slope * length))
        parabola = torch.where(finite & torch.isfinite(parabola), parabola, 0.1 * length)
        return torch.maximum(torch.minimum(parabola, 0.5 * length), 0.1 * length)

    def _judge(self) -> None:
        """Converged, stalled or out of budget?"""
        lanes, options = self.lanes, self._options
        flat = lanes["gradient"].abs().amax(1) == 0
        self._set_status(self.running & (lanes["loss"] <= options["tolerance"]), CONVERGED)
        self._set_status(self.running & flat, STALLED)
        self._set_status(self.running & (lanes["evaluations"] >= options["max_evaluations"]), EXHAUSTED)
        due = self.running & (lanes["evaluations"] >= lanes["window_end"])
        self._set_status(due & (lanes["loss"] > options["stall_factor"] * lanes["window_loss"]), STALLED)
        # The longer a victim has made progress, the longer it may pause.
        window = torch.clamp(lanes["evaluations"] // 2, min=options["stall_window"])
        lanes["window_end"] = torch.where(due, lanes["evaluations"] + window, lanes["window_end"])
        lanes["window_loss"] = torch.where(due, lanes["loss"], lanes["window_loss"])
