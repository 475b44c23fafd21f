"""What a solver is: rules by which each victim moves, with a state of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.pieces import Piece, State

STATUS = ("running", "converged", "stalled", "diverged", "exhausted", "uninformative")
"""How a victim stands: still searching, below the tolerance, without progress, not finite, out of budget, with a
gradient that says nothing."""
RUNNING, CONVERGED, STALLED, DIVERGED, EXHAUSTED, UNINFORMATIVE = range(6)

STEERING = "steering"
"""Entries of a solver's state under this name steer the objective, see :class:`Solver`."""

# Residuals (L, M) of some lanes, from their unknowns (L, D) and the lanes' numbers (L,); row by row independent.
Equations = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Problem:
    """What a solver may use beside losses and gradients.

    Attributes:
        num_images: N, the images behind one gradient.
        project: puts points ``(V, D)`` back where they may be; None if they may be anywhere.
        preconditioner: multiplies vectors ``(V, D)`` by the covariance that unknowns have; None if it is not known.
        equations: residuals whose squared norm is the loss; None if the loss has none.
        num_equations: M, of one victim.
        num_unknowns: D, of one victim.
        element_size: bytes of a number.
        written: the unknowns in words.
    """

    num_images: int = 1
    project: Callable[[Tensor], Tensor] | None = None
    preconditioner: Callable[[Tensor], Tensor] | None = None
    equations: Equations | None = None
    num_equations: int = 0
    num_unknowns: int = 0
    element_size: int = 4
    written: str = ""


@dataclass
class Evaluated:
    """An evaluation of V lanes.

    Attributes:
        point: ``(V, D)``, where.
        losses: ``(V,)``.
        gradient: ``(V, D)``.
        finite: ``(V,)``, whether loss and gradient are finite.
        problem: what is solved.
    """

    point: Tensor
    losses: Tensor
    gradient: Tensor
    finite: Tensor
    problem: Problem


class Solver(Piece, ABC):
    """Moves the unknowns of many victims after each evaluation of the objective, each by a state of its own.

    A *lane* is one index into the victims' dimension. Of your own: write :meth:`move`, and :meth:`fresh` if it keeps a
    state of its own. Beside that, the lanes' state has ``status (V,)`` (indices into :data:`STATUS`; end a lane with
    :func:`settle`), ``best_loss (V,)`` and ``best (V, D)`` (the lowest loss so far, and where), ``iterations (V,)``
    (steps taken, which the solver counts; those of lanes that have ended are put back) and ``evaluations (V,)``.

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
        """The state of lanes that have not been evaluated yet, each entry ``(V, ...)``; by default none.

        An entry ``seed (V,)``, int64, is for a solver that draws: an attack fills it with one for each victim and
        restart. A solver steers the objective by ``"steering/sharpness" (V,)``, that of
        :func:`~leakage.clients.smoothing.smoothed` networks, and ``"steering/fading" (V,)``, which multiplies the
        weights of priors.

        Args:
            like: ``(V, D)``, for its shape, precision and device.
        """
        return {}

    @abstractmethod
    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """The next points ``(V, D)``; what is given for lanes that are not running is not used.

        Args:
            lanes: the state of all lanes, changed in place or entry by entry.
            at: the evaluation that has just been made.
        """

    def fit(self, problem: Problem) -> Solver:
        """The solver as it is for this problem.

        Raises:
            ValueError: one that it can't solve.
        """
        return self

    def meet_new_objective(self, lanes: State, chosen: Tensor, target: Tensor) -> Tensor:
        """The objective of the lanes at these indices has changed: forget what is known of the old one.

        By default they begin anew at their best points.

        Args:
            lanes: the state of all lanes, changed in place.
            chosen: indices.
            target: the points ``(V, D)`` that :meth:`move` has given.

        Returns:
            The next points.
        """
        target = target.clone()
        target[chosen] = lanes["best"][chosen]
        self.renew(lanes, chosen, self.fresh(target[chosen]))
        return target

    # Where a state is large, a solver may lay it out in its own way.

    def largest(self, like: Tensor) -> State:
        """The state of lanes when it is largest."""
        return self.fresh(like)

    def match(self, fresh: State, lanes: State) -> State:
        """Give a fresh state the shapes of the present one, to stand behind it."""
        return fresh

    def select(self, lanes: State, kept: Tensor) -> State:
        """The state of the lanes at these indices; the present one is not used any more."""
        return {name: tensor[kept] for name, tensor in lanes.items()}

    def renew(self, lanes: State, chosen: Tensor, fresh: State) -> None:
        """Make the state of the lanes at these indices a fresh one."""
        for name, tensor in self.match(fresh, lanes).items():
            lanes[name][chosen] = tensor


def settle(lanes: State, chosen: Tensor, status: int) -> None:
    """End the chosen lanes with a status, an index into :data:`STATUS`, where they are still running."""
    lanes["status"] = torch.where(chosen & (lanes["status"] == RUNNING), status, lanes["status"])


def running(lanes: State) -> Tensor:
    """``(V,)``, whether each lane is still searching."""
    return lanes["status"] == RUNNING
