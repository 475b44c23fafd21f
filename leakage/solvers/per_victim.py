"""What every solver with one state per victim shares: lanes, their states, and a checkpoint of both."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from leakage.errors import check_choice
from leakage.files.checkpoints import check_like, restoring
from leakage.files.tensors import brief

# How a victim stands: still searching, below the tolerance, without progress, not finite, out of budget.
STATUS = ("running", "converged", "stalled", "diverged", "exhausted")
RUNNING, CONVERGED, STALLED, DIVERGED, EXHAUSTED = range(5)


class PerVictimOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` that searches for V victims at once, each with a state of its own.

    Parameters carry a leading victims' dimension, ``(V, ...)``; a *lane* is one index into it. Each
    :meth:`step` evaluates the closure once, which returns the losses ``(V,)`` at the parameters and
    leaves their gradients in ``.grad``, and moves every running lane by its own rules. A lane whose
    ``status`` is no longer ``running`` does not move; :meth:`select` drops it, so that it costs
    nothing more, :meth:`restart` begins it anew and :meth:`extend` adds further lanes.

    Attributes:
        status: ``(V,)``, indices into :data:`STATUS`.
        best_loss: ``(V,)``, the lowest loss seen since the lane began.
        iterations: ``(V,)``, steps taken.
        evaluations: ``(V,)``, evaluations of the closure while the lane was running.

    Args:
        params: parameters or one group of them, all with the same leading dimension.
        defaults: the group's options.

    Raises:
        ValueError: no parameters, several groups, or leading dimensions that differ.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        if len(self.param_groups) != 1:
            raise ValueError(f"Expected `params` as one group, but got {len(self.param_groups)}.")
        lanes = [parameter.shape[0] if parameter.ndim else None for parameter in self._params]
        if None in lanes or len(set(lanes)) != 1:
            raise ValueError(f"Expected `params` with one leading dimension for the victims, but got {lanes}.")
        self.state[self._params[0]] = self._fresh(cast(int, lanes[0]))

    @property
    def _params(self) -> list[Tensor]:
        return cast(list[Tensor], self.param_groups[0]["params"])

    @property
    def _sizes(self) -> list[int]:
        """Unknowns per victim in each parameter."""
        return [math.prod(parameter.shape[1:]) for parameter in self._params]

    @property
    def _options(self) -> dict[str, Any]:
        return self.param_groups[0]

    @property
    def lanes(self) -> dict[str, Tensor]:
        """The state of all lanes: name to a tensor that starts with the victims' dimension."""
        return cast(dict[str, Tensor], self.state[self._params[0]])

    status = property(lambda self: self.lanes["status"])
    best_loss = property(lambda self: self.lanes["best_loss"])
    iterations = property(lambda self: self.lanes["iterations"])
    evaluations = property(lambda self: self.lanes["evaluations"])

    @property
    def running(self) -> Tensor:
        """``(V,)``, whether each lane is still searching."""
        return self.lanes["status"] == RUNNING

    @property
    def bytes_per_lane(self) -> int:
        """What the state of one victim takes when it is largest."""
        return sum(tensor.nbytes for tensor in self._fullest().values())

    def _fullest(self) -> dict[str, Tensor]:
        """The state of one lane when it is largest."""
        return self._fresh(1)

    def best(self) -> list[Tensor]:
        """The parameters of lowest loss since each lane began, shaped as the parameters."""
        return self._unflatten(self.lanes["best"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Evaluate ``closure`` once and move every running lane.

        Args:
            closure: returns the losses ``(V,)`` and leaves the gradients in ``.grad``.

        Returns:
            The losses ``(V,)`` at the parameters before the move.

        Raises:
            ValueError: no closure, losses of another shape, or a parameter without gradient.
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
        better = finite & (losses < lanes["best_loss"]) & self.running
        point = self._flatten()
        torch.where(better[:, None], point, lanes["best"], out=lanes["best"])
        lanes["best_loss"] = torch.where(better, losses, lanes["best_loss"])
        self._unflatten_into_params(self._move(point, losses, gradient, finite))
        return losses

    def _set_status(self, chosen: Tensor, status: int) -> None:
        """Settle the chosen lanes, where they are still running."""
        self.lanes["status"] = torch.where(chosen & (self.lanes["status"] == RUNNING), status, self.lanes["status"])

    @abstractmethod
    def _move(self, point: Tensor, losses: Tensor, gradient: Tensor, finite: Tensor) -> Tensor:
        """The next points ``(V, D)``; points of lanes that are not running must stay as they are."""

    def _fresh(self, victims: int) -> dict[str, Tensor]:
        """The state of lanes that have not been evaluated yet."""
        first = self._params[0]
        size = sum(self._sizes)
        return {
            "status": torch.full((victims,), RUNNING, device=first.device),
            "best_loss": first.new_full((victims,), torch.inf),
            "best": first.new_zeros(victims, size),
            "iterations": torch.zeros(victims, dtype=torch.long, device=first.device),
            "evaluations": torch.zeros(victims, dtype=torch.long, device=first.device),
        }

    @torch.no_grad()
    def select(self, kept: Tensor) -> None:
        """Keep the lanes at the given indices (or of a boolean mask), in that order; drop the others."""
        for parameter in self._params:
            parameter.data = parameter.data[kept]
            parameter.grad = None
        indices = kept.nonzero().squeeze(1) if kept.dtype == torch.bool else kept
        self.state[self._params[0]] = self._selected(indices)

    @torch.no_grad()
    def extend(self, *values: Tensor) -> None:
        """Append lanes that start at ``values``, one ``(new, ...)`` tensor per parameter."""
        fresh = self._match(self._fresh(len(values[0])))
        self.state[self._params[0]] = {name: torch.cat([tensor, fresh[name]]) for name, tensor in self.lanes.items()}
        for parameter, value in zip(self._params, values, strict=True):
            parameter.data = torch.cat([parameter.data, value.to(parameter.data)])
            parameter.grad = None

    @torch.no_grad()
    def restart(self, chosen: Tensor, *values: Tensor) -> None:
        """Begin the lanes at the given indices anew at ``values``, one ``(chosen, ...)`` tensor per parameter."""
        self._renew(chosen)
        for parameter, value in zip(self._params, values, strict=True):
            parameter.data[chosen] = value.to(parameter.data)

    def _selected(self, kept: Tensor) -> dict[str, Tensor]:
        """The state of the lanes at these indices; the present one is not used any more."""
        return {name: tensor[kept] for name, tensor in self.lanes.items()}

    def _renew(self, chosen: Tensor) -> None:
        """Make the state of the lanes at these indices a fresh one."""
        for name, tensor in self._match(self._fresh(len(chosen))).items():
            self.lanes[name][chosen] = tensor

    def _match(self, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give a fresh state the shapes of the present one (histories grow with use)."""
        return fresh

    def _flatten(self) -> Tensor:
        return torch.cat([parameter.detach().flatten(1) for parameter in self._params], dim=1)

    def _unflatten(self, flat: Tensor) -> list[Tensor]:
        return [
            part.reshape(len(flat), *parameter.shape[1:])
            for part, parameter in zip(torch.split(flat, self._sizes, dim=1), self._params, strict=True)
        ]

    def _unflatten_into_params(self, flat: Tensor) -> None:
        for parameter, part in zip(self._params, self._unflatten(flat), strict=True):
            parameter.copy_(part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore lanes of any number, with the dtypes they were saved in (the base class would cast them).

        Raises:
            ValueError: the state of another solver, or one with tensors or options that no such solver has.
        """
        with restoring("the state of the solver"):
            lanes, options = state_dict["state"][0], state_dict["param_groups"][0]
            if lanes.keys() != self.lanes.keys():
                raise ValueError(f"Expected a state with {sorted(self.lanes)}, but got {brief(sorted(lanes))}.")
            before = dict(self._options), self.lanes
            try:
                self._load_options(options)
                self._load_lanes(lanes)
            except Exception:
                self._options.update(before[0])
                self.state[self._params[0]] = before[1]
                raise

    def _load_options(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            if name == "params":
                continue
            check_choice("option", name, self._options)
            kind = type(self._options[name])
            if kind is str or value is None:
                sound = isinstance(value, str) or name == "reference_loss"
            else:
                number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
                sound = number and (value > 0 or (value == 0 and name == "tolerance"))
            if not sound:
                raise ValueError(f"Expected the option {name!r} of a solver, but got {brief(repr(value))}.")
            self._options[name] = value

    def _load_lanes(self, lanes: dict[str, Tensor]) -> None:
        device, victims = self._params[0].device, len(lanes["status"])
        self.state[self._params[0]] = {name: tensor.to(device).clone() for name, tensor in lanes.items()}
        check_like("the solver", {name: tensor[:0] for name, tensor in self.lanes.items()}, self._match(self._fresh(0)))
        lengths = {len(tensor) for tensor in self.lanes.values()}
        if lengths != {victims} or len(self._params[0]) not in (0, victims):
            raise ValueError(
                f"Expected the solver of a checkpoint to have one number of lanes, that of the {len(self._params[0])} "
                f"restored, but got {brief(sorted(lengths))}."
            )
        most = {"status": len(STATUS), "row": victims}
        for name, tensor in self.lanes.items():
            if not tensor.is_floating_point() and bool(((tensor < 0) | (tensor >= most.get(name, 2**62))).any()):
                raise ValueError(
                    f"Expected the solver of a checkpoint with {name!r} from 0 to below {most.get(name, 2**62)}, but "
                    f"got {tensor.min().item()} to {tensor.max().item()}."
                )
