"""Linear least squares for many lanes at once, by conjugate gradients."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

# Ended lanes are removed once they are this share of all.
_LEAVING_SHARE = 1 / 2

_Dataclass = TypeVar("_Dataclass")


class LinearMap(Protocol):
    """A linear map A for each of L lanes, from D unknowns to a few groups of equations, and a preconditioner P."""

    def product(self, x: Tensor) -> list[Tensor]:
        """Return A x for x of shape ``(L, D)``, as tensors ``(L, ...)``."""

    def transposed(self, parts: list[Tensor]) -> Tensor:
        r"""Return :math:`A^\top y`, ``(L, D)``."""

    def precondition(self, x: Tensor) -> Tensor:
        """Return P x for x of shape ``(L, D)``; P is symmetric and positive definite."""

    def select(self, lanes: Tensor) -> LinearMap:
        """Return the map of the lanes at these indices."""


@dataclass
class Solution:
    """Result of :func:`least_squares`."""

    x: Tensor  # (L, D)
    products: Tensor  # (L,), number of products with A, and as many with its transpose
    solved: Tensor  # (L,), whether the tolerance was reached


def least_squares(
    system: LinearMap,
    given: list[Tensor],
    *,
    tolerance: Tensor | float,
    max_products: int,
    damping: Tensor | None = None,
) -> Solution:
    r"""Solve linear least squares for each lane by preconditioned conjugate gradients (CGLS).

    .. math:: \min_x \; \lVert A x - b \rVert^2 + \lambda \, x^\top P^{-1} x

    Where A does not determine x, x stays near 0. The iteration updates the residual :math:`b - A x` and computes the
    gradient as its product with :math:`A^\top`. A recurrence for the gradient itself would have far larger rounding
    errors, because the condition number of A enters squared.

    Args:
        system: A and P.
        given: b, with the structure of a product: tensors ``(L, ...)``.
        tolerance: a lane ends when the norm of its gradient, in the metric of P, has fallen to this share of the first;
            a number or ``(L,)``.
        max_products: maximum number of products per lane. A lane also ends when a value is no longer finite.
        damping: :math:`\lambda`, ``(L,)``; None for 0.

    References:
        Hestenes and Stiefel, *Methods of conjugate gradients for solving linear systems*, 1952,
        https://doi.org/10.6028/jres.049.044; Björck, *Numerical methods for least squares problems*, 1996, section 7.4.
    """
    rest = given
    gradient = system.transposed(rest)
    direction = system.precondition(gradient)
    size = (gradient * direction).sum(1)
    enough = tolerance**2 * size
    running = (size > 0) & torch.isfinite(size)
    x, products, solved = torch.zeros_like(gradient), torch.zeros_like(size, dtype=torch.long), size == 0
    dual, dual_x = gradient, x  # P^-1 times the direction and x, without P^-1
    found, at = Solution(x.clone(), products.clone(), solved.clone()), torch.arange(len(x), device=x.device)
    for _ in range(max_products):
        direction = torch.where(running[:, None], direction, 0)  # ended lanes do not move
        ended = int((~running).sum())
        if ended >= _LEAVING_SHARE * len(running):
            found.x[at], found.products[at], found.solved[at] = x, products, solved
            kept = running.nonzero()[:, 0]
            if not len(kept):
                return found
            system, rest = system.select(kept), [part[kept] for part in rest]
            at, running, x, products, solved = (part[kept] for part in (at, running, x, products, solved))
            direction, dual, dual_x, size, enough = (part[kept] for part in (direction, dual, dual_x, size, enough))
            damping = None if damping is None else damping[kept]
        change = system.product(direction)
        curvature = sum(part.flatten(1).square().sum(1) for part in change)
        if damping is not None:
            curvature = curvature + damping * (direction * dual).sum(1)
        length = size / curvature
        products += running
        running = running & torch.isfinite(length)
        length = torch.where(running, length, 0)[:, None]
        x = torch.addcmul(x, length, direction)
        rest = [
            torch.addcmul(part, length.view(-1, *[1] * (part.ndim - 1)), moved, value=-1)
            for part, moved in zip(rest, change, strict=True)
        ]
        gradient = system.transposed(rest)
        if damping is not None:
            dual_x = torch.addcmul(dual_x, length, dual)
            gradient = torch.addcmul(gradient, damping[:, None], dual_x, value=-1)
        towards = system.precondition(gradient)
        new = (gradient * towards).sum(1)
        solved |= running & (new <= enough)
        running = running & (new > enough) & torch.isfinite(new)
        share = (new / size)[:, None]
        direction, size = torch.addcmul(towards, share, direction), new
        if damping is not None:
            dual = torch.addcmul(gradient, share, dual)
    found.x[at], found.products[at], found.solved[at] = x, products, solved
    return found


def select_lanes(system: _Dataclass, lanes: Tensor) -> _Dataclass:
    """Return a copy of a dataclass with only these lanes of each of its tensors."""
    tensors: dict[str, Any] = {name: value[lanes] for name, value in vars(system).items() if isinstance(value, Tensor)}
    return dataclasses.replace(system, **tensors)  # type: ignore[type-var]
