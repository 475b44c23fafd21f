"""A solver as a ``torch.optim.Optimizer``, which Lightning can step and save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from leakage.files.checkpoints import check_like, restoring
from leakage.files.tensors import shorten
from leakage.pieces import State
from leakage.solvers.solver import RUNNING, Evaluated, Problem, Solver, running


class PerVictimOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` that searches for V victims at once, with a separate state for each.

    The leading dimension of every parameter, ``(V, ...)``, is the victim; a *lane* is one index into it. Each
    :meth:`step` evaluates the closure once and moves every running lane by the rules of the solver. A lane whose
    ``status`` is no longer ``running`` does not move. Use :meth:`select` to drop lanes, :meth:`restart` to restart
    them, and :meth:`extend` to add new ones.

    Attributes:
        lanes: the state of all lanes, see :class:`~leakage.solvers.Solver`, each ``(V, ...)``.
        status, best_loss, iterations, evaluations: entries of that state, ``(V,)``.

    Args:
        params: parameters, all with the same leading dimension.
        solver: the rules by which lanes move.
        problem: what the solver may use in addition to losses and gradients.

    Raises:
        ValueError: if there are no parameters or several groups, if leading dimensions differ, or if the solver cannot
            solve the problem.

    Example:
        >>> from leakage.solvers import LBFGS
        >>> x = torch.nn.Parameter(torch.tensor([[3.0, -1.0], [5.0, 2.0]]))
        >>> optimizer = PerVictimOptimizer([x], LBFGS(tolerance=1e-10))
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
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], solver: Solver, problem: Problem | None = None
    ) -> None:
        super().__init__(params, {})
        if len(self.param_groups) != 1:
            raise ValueError(f"Expected `params` as one group, but got {len(self.param_groups)}.")
        lanes = [parameter.shape[0] if parameter.ndim else None for parameter in self._params]
        if None in lanes or len(set(lanes)) != 1:
            raise ValueError(f"Expected `params` with one leading dimension for the victims, but got {lanes}.")
        self.problem = Problem() if problem is None else problem
        self.solver = solver.fit(self.problem)
        self._set_lanes(self._fresh(cast(int, lanes[0])))

    @property
    def _params(self) -> list[Tensor]:
        return cast(list[Tensor], self.param_groups[0]["params"])

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(parameter.shape[1:]) for parameter in self._params]

    @property
    def lanes(self) -> State:
        """State of all lanes."""
        return cast(State, self.state[self._params[0]])

    def _set_lanes(self, lanes: State) -> None:
        self.state[self._params[0]] = lanes

    status = property(lambda self: self.lanes["status"])
    best_loss = property(lambda self: self.lanes["best_loss"])
    iterations = property(lambda self: self.lanes["iterations"])
    evaluations = property(lambda self: self.lanes["evaluations"])

    @property
    def running(self) -> Tensor:
        """``(V,)``, whether each lane is still searching."""
        return running(self.lanes)

    @property
    def bytes_per_lane(self) -> int:
        """Number of bytes of one victim's state at its largest size."""
        like = self._like(1)
        return sum(tensor.nbytes for tensor in (self._own(like) | self.solver.largest(like)).values())

    def best(self) -> list[Tensor]:
        """Return the parameters with the lowest loss since each lane started, in the shapes of the parameters."""
        return self._unflatten(self.lanes["best"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Evaluate ``closure`` once and move every running lane.

        Args:
            closure: returns the losses ``(V,)`` and leaves the gradients in ``.grad``.

        Returns:
            The losses ``(V,)`` at the parameters before the move.

        Raises:
            ValueError: if there is no closure, losses have the wrong shape, or a parameter has no gradient.
        """
        if closure is None:
            raise ValueError("Expected a `closure` that returns the losses (V,), but got None.")
        with torch.enable_grad():
            losses = closure()
        losses = losses.detach()
        if not len(self.status) and not len(losses):
            return losses
        if losses.shape != self.status.shape:
            raise ValueError(f"Expected losses of shape {tuple(self.status.shape)}, but got {tuple(losses.shape)}.")
        if any(parameter.grad is None for parameter in self._params):
            raise ValueError("Expected the closure to leave a gradient in `.grad` of every parameter, but got None.")
        gradient = torch.cat([cast(Tensor, parameter.grad).flatten(1) for parameter in self._params], dim=1)
        lanes = self.lanes
        lanes["evaluations"] += self.running
        finite = torch.isfinite(losses) & torch.isfinite(gradient).all(1)
        better = finite & ((losses < lanes["best_loss"]) | lanes["outdated"]) & self.running
        lanes["outdated"] = lanes["outdated"] & ~better
        point = torch.cat([parameter.detach().flatten(1) for parameter in self._params], dim=1)
        torch.where(better[:, None], point, lanes["best"], out=lanes["best"])
        lanes["best_loss"] = torch.where(better, losses, lanes["best_loss"])
        was_running, iterations = self.running, lanes["iterations"].clone()
        target = self.solver.move(lanes, Evaluated(point, losses, gradient, finite, self.problem))
        lanes["iterations"] = torch.where(was_running, lanes["iterations"], iterations)
        if self.problem.project is not None:
            target = self.problem.project(target)
        target = torch.where(self.running[:, None], target, point)
        for parameter, part in zip(self._params, self._unflatten(target), strict=True):
            parameter.copy_(part)
        return losses

    def _like(self, victims: int) -> Tensor:
        return self._params[0].new_zeros(victims, sum(self._sizes))

    def _own(self, like: Tensor) -> State:
        count = torch.zeros(len(like), dtype=torch.long, device=like.device)
        return {
            "status": torch.full_like(count, RUNNING),
            "best_loss": like.new_full((len(like),), torch.inf),
            "best": torch.zeros_like(like),
            "outdated": torch.zeros_like(count, dtype=torch.bool),
            "iterations": count,
            "evaluations": count.clone(),
        }

    def _fresh(self, victims: int, **given: Tensor | None) -> State:
        like = self._like(victims)
        fresh = self._own(like) | self.solver.fresh(like)
        for name, tensor in given.items():
            if tensor is not None and name in fresh:
                fresh[name] = tensor.to(fresh[name])
        return fresh

    @torch.no_grad()
    def select(self, kept: Tensor) -> None:
        """Keep the lanes at the given indices, in that order, or those of a boolean mask; drop the others."""
        for parameter in self._params:
            parameter.data = parameter.data[kept]
            parameter.grad = None
        indices = kept.nonzero().squeeze(1) if kept.dtype == torch.bool else kept
        self._set_lanes(self.solver.select(self.lanes, indices))

    @torch.no_grad()
    def extend(self, *values: Tensor, seeds: Tensor | None = None) -> None:
        """Append lanes that start at ``values``, one ``(new, ...)`` tensor per parameter.

        Args:
            values: starts of the new lanes.
            seeds: ``(new,)``, int64, for a solver that draws random numbers; by default 0.
        """
        fresh = self.solver.match(self._fresh(len(values[0]), seed=seeds), self.lanes)
        self._set_lanes({name: torch.cat([tensor, fresh[name]]) for name, tensor in self.lanes.items()})
        for parameter, value in zip(self._params, values, strict=True):
            parameter.data = torch.cat([parameter.data, value.to(parameter.data)])
            parameter.grad = None

    @torch.no_grad()
    def restart(
        self, chosen: Tensor, *values: Tensor, seeds: Tensor | None = None, restarts: Tensor | None = None
    ) -> None:
        """Restart the lanes at the given indices.

        Args:
            chosen: indices of the lanes.
            values: starts of these lanes, as in :meth:`extend`.
            seeds: as in :meth:`extend`.
            restarts: ``(chosen,)``, int64, how often each lane has been restarted, for a solver that asks for it.
        """
        self.solver.renew(self.lanes, chosen, self._fresh(len(chosen), seed=seeds, restart=restarts))
        for parameter, value in zip(self._params, values, strict=True):
            parameter.data[chosen] = value.to(parameter.data)

    def _unflatten(self, flat: Tensor) -> list[Tensor]:
        return [
            part.reshape(len(flat), *parameter.shape[1:])
            for part, parameter in zip(torch.split(flat, self._sizes, dim=1), self._params, strict=True)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore any number of lanes with their saved dtypes, which the base class would change.

        Raises:
            ValueError: if the state belongs to another solver.
        """
        with restoring("the state of the solver"):
            lanes = {name: tensor.to(self._params[0].device) for name, tensor in state_dict["state"][0].items()}
            if lanes.keys() != self.lanes.keys():
                raise ValueError(
                    f"Expected the solver of a checkpoint with {sorted(self.lanes)}, but got {shorten(sorted(lanes))}."
                )
            first = {name: tensor[:0] for name, tensor in lanes.items()}
            check_like("the solver", first, self.solver.match(self._fresh(0), first))
            self._set_lanes({name: tensor.clone() for name, tensor in lanes.items()})
