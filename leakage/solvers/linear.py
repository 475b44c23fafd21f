"""Linear least squares for many lanes at once, by conjugate gradients."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

# Lanes that have ended leave once they are this share of all.
_LEAVING_SHARE = 1 / 2

_Dataclass = TypeVar("_Dataclass")


class LinearMap(Protocol):
    """A linear map A for each of L lanes, from D unknowns to a few groups of equations, and a preconditioner P."""

    def product(self, x: Tensor) -> list[Tensor]:
        """A x of ``(L, D)``: tensors ``(L, ...)``."""

    def transposed(self, parts: list[Tensor]) -> Tensor:
        r""":math:`A^\top y`, ``(L, D)``."""

    def precondition(self, x: Tensor) -> Tensor:
        """P x of ``(L, D)``, symmetric and positive."""

    def select(self, lanes: Tensor) -> LinearMap:
        """The same for the lanes at some indices."""


@dataclass
class Solution:
    """What :func:`least_squares` found."""

    x: Tensor  # (L, D)
    products: Tensor  # (L,), with A and as many with its transposed
    solved: Tensor  # (L,), whether the equations hold as well as was asked for


def least_squares(
    system: LinearMap,
    given: list[Tensor],
    *,
    tolerance: Tensor | float,
    max_products: int,
    damping: Tensor | None = None,
) -> Solution:
    r"""Least squares of each lane by preconditioned conjugate gradients (CGLS), x near 0 where A leaves it free.

    .. math:: \min_x \; \lVert A x - b \rVert^2 + \lambda \, x^\top P^{-1} x

    The residual :math:`b - A x` is what is brought forward, and the gradient is its product with :math:`A^\top`: the
    rounding of a recurrence for the gradient, which has the condition of A squared, would be far larger.

    Args:
        system: A and P.
        given: b, the tensors ``(L, ...)`` of a product.
        tolerance: a lane ends when the gradient's norm in the metric of P has fallen to this share of the first;
            a number or ``(L,)``.
        max_products: that a lane may take. It ends too where a number is no longer finite.
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
        direction = torch.where(running[:, None], direction, 0)  # who has ended stands still
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
    """A dataclass with some lanes of each tensor in it."""
    tensors: dict[str, Any] = {name: value[lanes] for name, value in vars(system).items() if isinstance(value, Tensor)}
    return dataclasses.replace(system, **tensors)  # type: ignore[type-var]
