"""L-BFGS as ``torch.optim.LBFGS`` without line search, for many victims at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leakage.errors import check_count, check_positive
from leakage.solvers.history import HISTORY, fresh_history, grow, push_and_recurse
from leakage.solvers.per_victim import CONVERGED, DIVERGED, EXHAUSTED, STALLED, PerVictimOptimizer

# As in torch.optim.LBFGS.
_TOLERANCE_GRADIENT = 1e-7
_TOLERANCE_CHANGE = 1e-9
_CURVATURE = 1e-10


class PlainLBFGS(PerVictimOptimizer):
    """The published search: every victim follows the iterates of ``torch.optim.LBFGS``.

    It is what DLG and iDLG were published with: full steps of length ``lr`` without a line search,
    ``max_calls`` calls of ``step`` with ``max_iterations`` iterations each, and the loss compared
    with ``tolerance`` every ``check_every`` calls. Nothing keeps a victim from diverging; the
    iterate of lowest loss is kept nevertheless. Use :class:`leakage.solvers.LBFGS` to succeed more
    often in less time.

    Args:
        params: parameters ``(V, ...)``, a leading victims' dimension each.
        lr: length of every step but the first, which is ``lr * min(1, 1 / |g|_1)``.
        history_size: pairs (s, y) each victim remembers.
        max_iterations: iterations per call.
        max_calls: calls after which a victim is exhausted.
        check_every: calls between two comparisons with ``tolerance``; the first call is compared.
        tolerance: a victim has converged when its loss is below this.

    Raises:
        ValueError: an option out of its range.

    References:
        Zhu et al., *Deep Leakage from Gradients*, NeurIPS 2019, https://arxiv.org/abs/1906.08935.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([[3.0, -1.0], [5.0, 2.0]]))
        >>> optimizer = PlainLBFGS([x], tolerance=1e-10, check_every=1)
        >>> def closure():
        ...     losses = (x - 1).square().sum(1)
        ...     x.grad = torch.autograd.grad(losses.sum(), x)[0]
        ...     return losses
        >>> while optimizer.running.any():
        ...     _ = optimizer.step(closure)
        >>> x.detach().round(decimals=3)
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1.0,
        history_size: int = 100,
        max_iterations: int = 20,
        max_calls: int = 300,
        check_every: int = 10,
        tolerance: float = 1e-6,
    ) -> None:
        check_positive(lr=lr)
        check_count(
            history_size=history_size,
            max_iterations=max_iterations,
            max_calls=max_calls,
            check_every=check_every,
        )
        if not tolerance >= 0:
            raise ValueError(f"Expected `tolerance` of at least 0, but got {tolerance!r}.")
        super().__init__(
            params,
            {
                "lr": lr,
                "history_size": history_size,
                "max_iterations": max_iterations,
                "max_calls": max_calls,
                "check_every": check_every,
                "tolerance": tolerance,
            },
        )

    def _fresh(self, victims: int) -> dict[str, Tensor]:
        fresh = super()._fresh(victims)
        like = fresh["best"]
        history = fresh_history(victims, like.shape[1], self._options["history_size"], like)
        return fresh | {
            **history,
            "loss": like.new_zeros(victims),  # at the previous iterate
            "gradient": like.clone(),
            "step": like.clone(),  # the step that led to the present point
            "calls": torch.zeros(victims, dtype=torch.long, device=like.device),
            "in_call": torch.zeros(victims, dtype=torch.long, device=like.device),
        }

    def _match(self, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        grow(fresh, self.lanes["s"].shape[1])
        return fresh

    def _fullest(self) -> dict[str, Tensor]:
        fresh = self._fresh(1)
        grow(fresh, self._options["history_size"])
        return fresh

    def _move(self, point: Tensor, losses: Tensor, gradient: Tensor, finite: Tensor) -> Tensor:
        lanes, options = self.lanes, self._options
        self._set_status(~finite, DIVERGED)
        flat = gradient.abs().amax(1) <= _TOLERANCE_GRADIENT
        # Does this evaluation end a call? Then the next call evaluates the same point first.
        ends = (lanes["in_call"] > 0) & (
            flat
            | (lanes["step"].abs().amax(1) <= _TOLERANCE_CHANGE)
            | ((losses - lanes["loss"]).abs() < _TOLERANCE_CHANGE)
        )
        lanes["calls"] += ends & self.running
        lanes["in_call"] = torch.where(ends, 0, lanes["in_call"])
        starts = lanes["in_call"] == 0
        checked = starts & (lanes["calls"] > 0) & ((lanes["calls"] - 1) % options["check_every"] == 0)
        self._set_status(checked & (losses < options["tolerance"]), CONVERGED)
        self._set_status(lanes["calls"] >= options["max_calls"], EXHAUSTED)
        lanes["evaluations"] += ends & self.running
        # A call that starts where the gradient vanishes does nothing, and so would all that follow, until one
        # of them is compared.
        below = losses < options["tolerance"] if options["tolerance"] > 0 else flat
        self._set_status(starts & flat & below, CONVERGED)
        self._set_status(starts & flat, STALLED)

        first = lanes["iterations"] == 0
        change = gradient - lanes["gradient"]
        product = (lanes["step"] * change).sum(1)
        pushed = self.running & ~first & (product > _CURVATURE)
        history = {name: lanes[name] for name in HISTORY if name in lanes}
        direction = push_and_recurse(history, options["history_size"], pushed, lanes["step"], change, gradient)
        lanes.update(history)
        length = options["lr"] * torch.where(first, torch.clamp(1 / gradient.abs().sum(1), max=1.0), 1.0)
        # Nor does a call that finds no descent: the next one would start from the same state.
        uphill = (direction * gradient).sum(1) > -_TOLERANCE_CHANGE
        self._set_status(uphill & below, CONVERGED)
        self._set_status(uphill, STALLED)

        running = self.running
        lanes["iterations"] += running
        lanes["in_call"] += running
        full = running & (lanes["in_call"] == options["max_iterations"])
        lanes["calls"] += full
        lanes["in_call"] = torch.where(full, 0, lanes["in_call"])
        lanes["gradient"] = torch.where(running[:, None], gradient, lanes["gradient"])
        lanes["loss"] = torch.where(running, losses, lanes["loss"])
        lanes["step"] = torch.where(running[:, None], length[:, None] * direction, lanes["step"])
        return torch.where(running[:, None], point + lanes["step"], point)
