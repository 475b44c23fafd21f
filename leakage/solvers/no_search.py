"""A solver for closed-form attacks, whose start is the result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.errors import check_not_negative
from leakage.pieces import State
from leakage.solvers.solver import CONVERGED, DIVERGED, EXHAUSTED, Evaluated, Solver, settle


@dataclass(kw_only=True, repr=False, eq=False)
class NoSearch(Solver):
    """Evaluate the start once, to measure how well it fits, and keep it: for images in closed form.

    Args:
        tolerance: a victim whose loss is at most this has converged; the others are exhausted.

    Raises:
        ValueError: if the tolerance is negative.

    Example:
        >>> NoSearch()
        NoSearch(tolerance=1e-08)
    """

    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        check_not_negative(tolerance=self.tolerance)

    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """End all lanes without moving them."""
        settle(lanes, ~at.finite, DIVERGED)
        settle(lanes, at.losses <= self.tolerance, CONVERGED)
        settle(lanes, torch.ones_like(at.finite), EXHAUSTED)
        return at.point
