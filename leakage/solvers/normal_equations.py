"""Damped least-squares steps from products with a Jacobian, or from the Jacobian itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from leakage.solvers.linear import least_squares
from leakage.solvers.solver import Equations
from leakage.solvers.spectrum import ImageSpectrum

# Directions of one pass of forward mode: more of them no longer pay.
_DIRECTIONS_AT_ONCE = 256
# Rows of the blocks in which the symmetric product is computed: half the work of the whole one.
_BLOCK = 256
# A step that decreases the loss by more (less) than these shares of what it promised lowers (raises) the damping.
_BOLD, _FIRM = 0.75, 0.25
_BOLDER, _FIRMER = 0.1, 4.0
# Where steps with this damping still do not lower the loss, none will.
_HOPELESS = 1e4
# Damping of a factorisation that failed grows by this, up to this many times.
_REPAIR, _ATTEMPTS = 10.0, 12
# Dampings that are tried with one Jacobian until the loss falls.
_RETRIES = 5
# Steps with one Jacobian go on as long as each leaves at most this share of the loss.
_CHORD_SHARE = 0.25


@dataclass
class Step:
    """Steps ``(L, D)`` of L lanes; the rest is ``(L,)``."""

    step: Tensor
    promised: Tensor  # by how much the loss falls if the residuals are as linear as their Jacobian says
    products: Tensor  # with the Jacobian, or its columns
    solved: Tensor  # whether the linear equations hold as well as was asked for
    damping: Tensor  # that was used, relative to the mean eigenvalue


@dataclass
class Judgement:
    """What follows from steps of L lanes, each ``(L,)``."""

    accepted: Tensor  # whether the loss has fallen
    damping: Tensor  # of the next step
    slow: Tensor  # accepted steps in a row that left nearly all of the loss
    hopeless: Tensor  # whether no damping seems to be enough


def judge_steps(
    loss: Tensor, reached: Tensor, promised: Tensor, damping: Tensor, slow: Tensor, *, slow_share: float
) -> Judgement:
    """The rules of Levenberg-Marquardt, for all that search by it.

    A step that does not lower the loss (infinite where there was none yet) is not accepted. The damping falls to a
    tenth where the loss fell by more than three quarters of what the linear equations promised, and grows fourfold
    where it fell by less than a quarter. A step is slow if it left more than ``slow_share`` of the loss.
    """
    accepted = reached < loss
    ratio = (loss - reached) / promised
    factor = torch.where(ratio > _BOLD, _BOLDER, torch.where(ratio < _FIRM, _FIRMER, 1.0))
    return Judgement(
        accepted,
        (damping * torch.where(accepted, factor, _FIRMER)).clamp(min=torch.finfo(loss.dtype).eps / 100),
        torch.where(accepted, torch.where(reached > slow_share * loss, slow + 1, 0), slow),
        ~accepted & (damping > _HOPELESS),
    )


def damping_scale(equations: Equations, point: Tensor, lanes: Tensor, spectrum: ImageSpectrum | None) -> Tensor:
    r"""About the mean eigenvalue of :math:`T^\top J^\top J T`, by one product with random signs, ``(L,)``."""
    signs = torch.randint(0, 2, point.shape[1:], generator=torch.Generator().manual_seed(0)).to(point) * 2 - 1
    direction = _rooted(spectrum, signs[None]).expand_as(point)
    image: Tensor = jvp(lambda points: equations(points, lanes), (point,), (direction,))[1]
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
        equations, point, lanes: r, ``(L, D)``, and ``(L,)``, which is handed on to r.
        damping: ``(L,)``, relative to :func:`damping_scale`.
        forcing: ``(L,)`` in (0, 1).
        max_products: pairs of products that a lane may take; one that needs more is not ``solved``.
        max_step: entries of the step are clamped to this.
        spectrum: P; None is the identity.
    """
    system = _Linearised(equations, point, lanes, spectrum)
    found = least_squares(
        system,
        [-system.residuals],
        tolerance=forcing,
        max_products=max_products,
        damping=damping * damping_scale(equations, point, lanes, spectrum),
    )
    step = torch.where(torch.isfinite(found.x), found.x, 0.0).clamp(-max_step, max_step)
    (image,) = system.product(step)
    promised = -(image * (2 * system.residuals + image)).sum(1)
    return Step(step, promised, found.products, found.solved, damping)


class _Linearised:
    """J of some lanes, preconditioned.

    J d is the transpose of the linear map u -> J^T u: in reverse mode twice, what depends on the point alone is
    computed once, not with every product as forward mode would.
    """

    def __init__(self, equations: Equations, point: Tensor, lanes: Tensor, spectrum: ImageSpectrum | None) -> None:
        self.equations, self.point, self.lanes, self.spectrum = equations, point, lanes, spectrum
        self.residuals, self._pull = vjp(lambda points: equations(points, lanes), point)[:2]
        self._push = vjp(lambda images: self._pull(images)[0], torch.zeros_like(self.residuals))[1]

    def product(self, x: Tensor) -> list[Tensor]:
        return [self._push(x)[0]]

    def transposed(self, parts: list[Tensor]) -> Tensor:
        gradient: Tensor = self._pull(parts[0])[0]
        return gradient

    def precondition(self, x: Tensor) -> Tensor:
        return x if self.spectrum is None else self.spectrum(x)

    def select(self, lanes: Tensor) -> _Linearised:
        return _Linearised(self.equations, self.point[lanes], self.lanes[lanes], self.spectrum)


def dense_jacobian(equations: Equations, point: Tensor, lane: Tensor, spectrum: ImageSpectrum | None) -> Tensor:
    """Jacobian times T (without a spectrum, itself) of a single lane, ``(D, M)``: transposed, in forward mode."""
    size = point.shape[1]

    def along(direction: Tensor) -> Tensor:
        image: Tensor = jvp(lambda points: equations(points, lane), (point,), (direction[None],))[1][0]
        return image

    jacobian = None  # filled in place: a list to concatenate would take its memory twice
    for first in range(0, size, _DIRECTIONS_AT_ONCE):
        basis = torch.zeros(min(_DIRECTIONS_AT_ONCE, size - first), size, dtype=point.dtype, device=point.device)
        basis[torch.arange(len(basis)), first + torch.arange(len(basis))] = 1
        rows = vmap(along)(_rooted(spectrum, basis))
        if jacobian is None:
            jacobian = rows.new_empty(size, rows.shape[1])
        jacobian[first : first + len(rows)] = rows
    assert jacobian is not None
    return jacobian


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

    In the coordinates u = T^{-1} d the damping is that of the identity. The Jacobian is what costs. So where a
    step does not lower the loss, it serves another one with more damping; and where it does, further steps
    (chords) as long as each leaves a quarter of the loss or less: with residuals of their own these also mend what
    single precision loses in :math:`J^\top J`. Arguments are those of :func:`conjugate_gradients`, with L = 1 and
    the damping relative to the mean of the diagonal; ``max_chords`` is the number of further steps with one Jacobian
    at most.
    """
    jacobian = dense_jacobian(equations, point, lane, spectrum)
    normal = _symmetric_product(jacobian)
    residual = equations(point, lane)
    loss = residual.square().sum()
    right = residual @ jacobian.mT
    for attempt in range(_RETRIES):
        factor, damping = _factorise(normal, damping * (_REPAIR if attempt else 1))
        step = _solved(factor, right, spectrum).clamp(-max_step, max_step)
        fresh = equations(point + step, lane)
        if bool(fresh.square().sum() < loss):
            break
    image = jvp(lambda points: equations(points, lane), (point,), (step,))[1]
    promised = loss - (residual + image).square().sum(1)
    for _ in range(max_chords):
        share = fresh.square().sum() / loss
        if not bool(share <= _CHORD_SHARE):
            break
        loss = share * loss
        longer = (step + _solved(factor, fresh @ jacobian.mT, spectrum)).clamp(-max_step, max_step)
        fresh = equations(point + longer, lane)
        if not bool(fresh.square().sum() < loss):
            break
        step = longer
    products = torch.full_like(lane, len(jacobian))
    return Step(step, promised, products, torch.ones_like(lane, dtype=torch.bool), damping)


def _solved(factor: Tensor, right: Tensor, spectrum: ImageSpectrum | None) -> Tensor:
    """The step in pixels for a right-hand side ``(1, D)``."""
    return _rooted(spectrum, -torch.cholesky_solve(right.mT, factor).mT)


def dense_bytes(equations: int, unknowns: int, itemsize: int) -> int:
    """Bytes of the dense step of one lane, without activations: Jacobian, normal equations, their factor and a copy."""
    return itemsize * unknowns * (equations + 3 * unknowns)


def _symmetric_product(rows: Tensor) -> Tensor:
    """The lower triangle of ``rows @ rows.mT`` in blocks; what is above it is not filled in."""
    product = rows.new_empty(len(rows), len(rows))
    for first in range(0, len(rows), _BLOCK):
        last = min(first + _BLOCK, len(rows))
        product[first:last, :last] = rows[first:last] @ rows[:last].mT
    return product


def _factorise(normal: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of the damped lower triangle, and the damping: more where rounding has left it indefinite."""
    diagonal = normal.diagonal()
    exact = diagonal.clone()
    mean, tiny = exact.mean(), torch.finfo(normal.dtype).tiny
    least = torch.finfo(normal.dtype).eps * exact.max() / mean.clamp(min=tiny)
    factor = None
    for _ in range(_ATTEMPTS):
        diagonal.copy_(exact + damping * mean)  # in place: the matrix is the largest there is
        found, failed = torch.linalg.cholesky_ex(normal)
        if not bool(failed) and bool(torch.isfinite(found.diagonal()).all()):
            factor = found
            break
        damping = torch.maximum(damping * _REPAIR, least)
    diagonal.copy_(exact)
    if factor is None:  # nothing but noise or infinities: the steepest descent, no longer than is safe
        factor = torch.diag(exact.abs().sum().clamp(min=tiny).sqrt().expand(len(normal)))
    return factor, damping


def _rooted(spectrum: ImageSpectrum | None, vectors: Tensor) -> Tensor:
    return vectors if spectrum is None else spectrum.root(vectors)
