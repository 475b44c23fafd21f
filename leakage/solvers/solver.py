"""The base class of solvers: rules by which victims move, with a separate state for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.pieces import Piece, State

STATUS = ("running", "converged", "stalled", "diverged", "exhausted", "uninformative")
"""Status of a victim: still searching, below the tolerance, without progress, not finite, out of budget, or with a
gradient that carries no information."""
RUNNING, CONVERGED, STALLED, DIVERGED, EXHAUSTED, UNINFORMATIVE = range(6)

STEERING = "steering"
"""Prefix of the entries of a solver's state that steer the objective, see :meth:`Solver.fresh`."""

# Residuals (L, M) from unknowns (L, D) and lane indices (L,); rows are independent.
Equations = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Problem:
    """What a solver may use in addition to losses and gradients.

    Attributes:
        num_images: N, the number of images behind one gradient.
        project: projects points ``(V, D)`` onto the allowed set; None if there are no bounds.
        preconditioner: multiplies vectors ``(V, D)`` by the typical covariance of unknowns; None if unknown.
        equations: residuals whose squared norm is the loss; None if the loss is not a sum of squares.
        num_equations: M, the number of equations of one victim.
        num_unknowns: D, the number of unknowns of one victim.
        element_size: bytes per element.
        written: description of the unknowns, for messages.
        kinked: whether the network has kinks that :func:`~leakage.clients.smoothing.smoothed` can smooth.
        kinks_left: names of the network's kinked functions that can't be smoothed.
        exact: whether no defense has changed the gradients, so that only rounding keeps the distance from zero.
    """

    num_images: int = 1
    project: Callable[[Tensor], Tensor] | None = None
    preconditioner: Callable[[Tensor], Tensor] | None = None
    equations: Equations | None = None
    num_equations: int = 0
    num_unknowns: int = 0
    element_size: int = 4
    written: str = ""
    kinked: bool = True
    kinks_left: tuple[str, ...] = ()
    exact: bool = True


@dataclass
class Evaluated:
    """An evaluation of the objective for V lanes.

    Attributes:
        point: ``(V, D)``, the unknowns.
        losses: ``(V,)``, the losses at ``point``.
        gradient: ``(V, D)``, the gradients of the losses.
        finite: ``(V,)``, whether loss and gradient are finite.
        problem: the problem to solve.
    """

    point: Tensor
    losses: Tensor
    gradient: Tensor
    finite: Tensor
    problem: Problem


class Solver(Piece, ABC):
    """Base class of solvers, which move the unknowns of many victims after each evaluation of the objective.

    A *lane* is one index into the victims' dimension. To write a solver, implement :meth:`move`, and :meth:`fresh` if
    it has a state. In addition to this state, lanes have ``status (V,)`` (indices into :data:`STATUS`; end a lane with
    :func:`settle`), ``best_loss (V,)`` and ``best (V, D)`` (the lowest loss so far, and its point), ``outdated (V,)``
    (set by a solver that has changed the objective: the next finite loss replaces the lowest), ``iterations (V,)``
    (number of steps, incremented by the solver; changes for ended lanes are undone) and ``evaluations (V,)``.

    Example:
        >>> class Descent(Solver):
        ...     def __init__(self, lr: float, steps: int) -> None:
        ...         self.lr, self.steps = lr, steps
        ...     def move(self, lanes, at):
        ...         lanes["iterations"] += 1
        ...         settle(lanes, lanes["evaluations"] >= self.steps, EXHAUSTED)
        ...         return at.point - self.lr * at.gradient
        >>> Descent(0.1, 10)
        Descent(lr=0.1, steps=10)
    """

    def fresh(self, like: Tensor) -> State:
        """Return the state of lanes that have not been evaluated yet, each entry ``(V, ...)``; empty by default.

        A solver that draws random numbers adds an entry ``seed (V,)``, int64, which the attack fills with one seed for
        each victim and restart; likewise ``restart (V,)``, the number of restarts so far. A solver can steer the
        objective by ``"steering/sharpness" (V,)``, the sharpness of :func:`~leakage.clients.smoothing.smoothed`
        networks, and ``"steering/fading" (V,)``, a factor on the weights of priors. All starts of a victim must then
        end with the same steering, so that their losses can be compared.

        Args:
            like: ``(V, D)``, a tensor with the shape, precision and device of the unknowns.
        """
        return {}

    @abstractmethod
    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """Return the next points ``(V, D)``; those of lanes that are not running are ignored.

        Args:
            lanes: the state of all lanes; update tensors in place or replace entries.
            at: the latest evaluation.
        """

    def fit(self, problem: Problem) -> Solver:
        """Return this solver, or a copy adapted to the problem.

        Raises:
            ValueError: if the solver cannot solve the problem.
        """
        return self

    def meet_new_objective(self, lanes: State, chosen: Tensor, target: Tensor) -> Tensor:
        """Discard what is known of the objective of some lanes, because it has changed.

        By default these lanes restart at their best points.

        Args:
            lanes: the state of all lanes, changed in place.
            chosen: indices of the lanes.
            target: the points ``(V, D)`` returned by :meth:`move`.

        Returns:
            The next points ``(V, D)``.
        """
        target = target.clone()
        target[chosen] = lanes["best"][chosen]
        self.renew(lanes, chosen, self.fresh(target[chosen]))
        return target

    # A solver with a large state may choose its own layout.

    def largest(self, like: Tensor) -> State:
        """Return the state of lanes at its largest size."""
        return self.fresh(like)

    def match(self, fresh: State, lanes: State) -> State:
        """Give a fresh state the shapes of the present one, so that it can be appended."""
        return fresh

    def select(self, lanes: State, kept: Tensor) -> State:
        """Return the state of the lanes at these indices; ``lanes`` is no longer used afterwards."""
        return {name: tensor[kept] for name, tensor in lanes.items()}

    def renew(self, lanes: State, chosen: Tensor, fresh: State) -> None:
        """Replace the state of the lanes at these indices by a fresh one."""
        for name, tensor in self.match(fresh, lanes).items():
            lanes[name][chosen] = tensor


def settle(lanes: State, chosen: Tensor, status: int) -> None:
    """End those of the chosen lanes that are running, with a status, an index into :data:`STATUS`."""
    lanes["status"] = torch.where(chosen & (lanes["status"] == RUNNING), status, lanes["status"])


def running(lanes: State) -> Tensor:
    """Return ``(V,)``, whether each lane is still searching."""
    return lanes["status"] == RUNNING
