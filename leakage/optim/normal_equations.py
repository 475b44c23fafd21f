"""Damped least-squares steps from products with a Jacobian, or from the Jacobian itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from leakage.optim.spectrum import ImageSpectrum

# Residuals (L, M) of some lanes, from their unknowns (L, D) and the lanes' numbers (L,); row by row independent.
Equations = Callable[[Tensor, Tensor], Tensor]

# Directions of one pass of forward mode: more of them no longer pay.
_DIRECTIONS_AT_ONCE = 256
# Lanes that have ended leave the conjugate gradients when they are this share of them.
_LEAVING_SHARE = 1 / 2
# Damping of a factorisation that failed grows by this, up to this many times.
_FIRMER, _ATTEMPTS = 10.0, 12
# Steps with one Jacobian go on as long as each leaves at most this share of the loss.
_CHORD_SHARE = 0.25


@dataclass
class Step:
    """Steps ``(L, D)`` of L lanes, the decrease of the loss they promise, their cost, and whether they are solved."""

    step: Tensor
    promised: Tensor
    products: Tensor
    solved: Tensor


def damping_scale(equations: Equations, point: Tensor, lanes: Tensor, spectrum: ImageSpectrum | None) -> Tensor:
    r"""About the mean eigenvalue of :math:`T^\top J^\top J T`, by one product with random signs, ``(L,)``."""
    signs = torch.randint(0, 2, point.shape[1:], generator=torch.Generator().manual_seed(0)).to(point) * 2 - 1
    direction = _rooted(spectrum, signs[None]).expand_as(point)
    image = jvp(lambda points: equations(points, lanes), (point,), (direction,))[1]
    return image.square().sum(1) / point.shape[1]


def conjugate_gradients(
    equations: Equations,
    point: Tensor,
    lanes: Tensor,
    damping: Tensor,
    *,
    forcing: Tensor,
    max_products: int,
    max_step: float,
    spectrum: ImageSpectrum | None,
) -> Step:
    r"""Steps that nearly solve :math:`(J^\top J + \lambda P^{-1}) d = -J^\top r` without forming J.

    Conjugate gradients preconditioned by P need one product with J and one with its transpose each; a lane
    ends when the norm of what is left, in the metric of P, has fallen to its share ``forcing``.

    Args:
        equations: r.
        point: ``(L, D)``.
        lanes: ``(L,)``, handed on to ``equations``.
        damping: ``(L,)``, relative to :func:`damping_scale`.
        forcing: ``(L,)`` in (0, 1).
        max_products: pairs of products that a lane may take; one that needs more is not ``solved``.
        max_step: entries of the step are clamped to this.
        spectrum: P; None is the identity.
    """
    damping = damping * damping_scale(equations, point, lanes, spectrum)

    def forward(chosen: Tensor, directions: Tensor) -> Tensor:
        at = lanes[chosen]
        return jvp(lambda points: equations(points, at), (point[chosen],), (directions,))[1]

    residuals, back = vjp(lambda points: equations(points, lanes), point)
    right = -back(residuals)[0]
    step, products = torch.zeros_like(point), torch.zeros_like(lanes)
    solved = torch.zeros_like(lanes, dtype=torch.bool)
    # The lanes that go on, by their place; `dual` is P^-1 of `direction`.
    at = torch.arange(len(point), device=point.device)
    left, preconditioned = right, _times(spectrum, right)
    product = (left * preconditioned).sum(1)
    first, found = product, step.clone()
    direction, dual = preconditioned, left
    for _ in range(max_products):
        image = forward(at, direction)
        turned = back(image)[0] + damping[at, None] * dual
        length = product / (direction * turned).sum(1)
        length = torch.where(torch.isfinite(length), length, 0.0)
        found = found + length[:, None] * direction
        left = left - length[:, None] * turned
        preconditioned = _times(spectrum, left)
        fresh = (left * preconditioned).sum(1)
        running = ~solved[at]
        products[at] += running
        step[at] = torch.where(running[:, None], found, step[at])
        ended = (fresh <= forcing[at].square() * first[at]) | ~torch.isfinite(fresh)
        solved[at] |= ended
        again = torch.where(product > 0, fresh / product, 0.0)[:, None]
        direction, dual, product = preconditioned + again * direction, left + again * dual, fresh
        gone = solved[at]
        if bool(gone.all()):
            break
        if float(gone.float().mean()) >= _LEAVING_SHARE:
            kept = (~gone).nonzero().squeeze(1)
            at = at[kept]
            left, direction, dual, product, found = (tensor[kept] for tensor in (left, direction, dual, product, found))
            here = lanes[at]
            _, back = vjp(lambda points, here=here: equations(points, here), point[at])
    step = step.clamp(-max_step, max_step)
    everyone = torch.arange(len(point), device=point.device)
    image = forward(everyone, step)
    return Step(step, 2 * (step * right).sum(1) - image.square().sum(1), products, solved)


def dense_jacobian(equations: Equations, point: Tensor, lane: Tensor, spectrum: ImageSpectrum | None) -> Tensor:
    """Jacobian times T of a single lane, ``(D, M)``: transposed, in forward mode, some columns at a time.

    Args:
        equations: r.
        point: ``(1, D)``.
        lane: ``(1,)``.
        spectrum: T T^T; None for the Jacobian itself.
    """
    size = point.shape[1]

    def along(direction: Tensor) -> Tensor:
        return jvp(lambda points: equations(points, lane), (point,), (direction[None],))[1][0]

    rows = []
    for first in range(0, size, _DIRECTIONS_AT_ONCE):
        basis = torch.zeros(min(_DIRECTIONS_AT_ONCE, size - first), size, dtype=point.dtype, device=point.device)
        basis[torch.arange(len(basis)), first + torch.arange(len(basis))] = 1
        rows.append(vmap(along)(_rooted(spectrum, basis)))
    return torch.cat(rows)


def cholesky_steps(
    equations: Equations,
    point: Tensor,
    lane: Tensor,
    damping: Tensor,
    *,
    max_step: float,
    spectrum: ImageSpectrum | None,
    max_chords: int,
) -> Step:
    r"""The step of a single lane that solves its damped normal equations, by the whole Jacobian and Cholesky.

    In the coordinates u = T^{-1} d the damping is that of the identity. As the Jacobian is what costs, it
    serves further steps (chords) as long as each leaves a quarter of the loss or less; with a residual of
    its own for each they also mend what single precision loses in :math:`J^\top J`.

    Args:
        equations: r.
        point: ``(1, D)``.
        lane: ``(1,)``.
        damping: ``(1,)``, relative to the mean of the diagonal.
        max_step: entries of each step are clamped to this.
        spectrum: T T^T; None is the identity.
        max_chords: further steps with the same Jacobian, at most.
    """
    jacobian = dense_jacobian(equations, point, lane, spectrum)
    factor, normal = _factorise(jacobian @ jacobian.mT, damping)
    start, residual = point, equations(point, lane)
    loss, promised = residual.square().sum(), point.new_zeros(1)
    for chord in range(1 + max_chords):
        right = -(residual @ jacobian.mT)
        solution = torch.cholesky_solve(right.mT, factor).mT
        trial = point + _rooted(spectrum, solution).clamp(-max_step, max_step)
        residual = equations(trial, lane)
        share = residual.square().sum() / loss
        if not chord:
            promised = 2 * (solution * right).sum(1) - (solution @ normal * solution).sum(1)
        if not chord or bool(share < 1):
            point, loss = trial, share * loss
        if not bool(share <= _CHORD_SHARE):
            break
    products = torch.full_like(lane, jacobian.shape[0])
    return Step(point - start, promised, products, torch.ones_like(lane, dtype=torch.bool))


def dense_bytes(equations: int, unknowns: int, itemsize: int) -> int:
    """Memory that the dense step of one lane takes: the Jacobian, its normal equations and their factor."""
    return itemsize * unknowns * (equations + 3 * unknowns)


def _factorise(normal: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of the damped matrix, damped further where rounding has left it indefinite."""
    added = damping * normal.diagonal().mean()
    for _ in range(_ATTEMPTS):
        factor, failed = torch.linalg.cholesky_ex(normal + torch.diag(added.expand(len(normal))))
        if not bool(failed) and bool(torch.isfinite(factor).all()):
            return factor, normal
        added = torch.clamp(added * _FIRMER, min=torch.finfo(normal.dtype).eps * float(normal.diagonal().max()))
    # Nothing but noise or infinities: the steepest descent.
    return torch.diag(normal.diagonal().abs().max().clamp(min=1).sqrt().expand(len(normal))), normal


def _times(spectrum: ImageSpectrum | None, vectors: Tensor) -> Tensor:
    return vectors if spectrum is None else spectrum(vectors)


def _rooted(spectrum: ImageSpectrum | None, vectors: Tensor) -> Tensor:
    return vectors if spectrum is None else spectrum.root(vectors)
