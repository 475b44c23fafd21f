"""Damped least-squares steps, from products with the Jacobian or from the Jacobian itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from leakage.solvers.linear import least_squares
from leakage.solvers.solver import Equations
from leakage.solvers.spectrum import ImageSpectrum

# Directions in one pass of forward mode; more give no further speed-up.
_DIRECTIONS_AT_ONCE = 256
# Rows per block of the symmetric product; computing only lower blocks halves the work.
_BLOCK = 256
# The damping falls (grows) if a step decreases the loss by more (less) than these shares of the prediction.
_BOLD, _FIRM = 0.75, 0.25
_BOLDER, _FIRMER = 0.1, 4.0
# If steps with this damping do not lower the loss, no step will.
_HOPELESS = 1e4
# After a failed factorisation the damping grows by this factor, up to this many times.
_REPAIR, _ATTEMPTS = 10.0, 12
# Dampings to try with one Jacobian until the loss falls.
_RETRIES = 5
# Steps with one Jacobian continue while each leaves at most this share of the loss.
_CHORD_SHARE = 0.25


@dataclass
class Step:
    """Steps of L lanes: ``step`` is ``(L, D)``, all other fields are ``(L,)``."""

    step: Tensor
    promised: Tensor  # decrease of the loss if the residuals were linear
    products: Tensor  # number of products with the Jacobian, or of its columns
    solved: Tensor  # whether the linear equations were solved to tolerance
    damping: Tensor  # the damping used, relative to the mean eigenvalue


@dataclass
class Judgement:
    """Assessment of the steps of L lanes; all fields are ``(L,)``."""

    accepted: Tensor  # whether the loss has fallen
    damping: Tensor  # damping of the next step
    slow: Tensor  # number of accepted steps in a row that left nearly all of the loss
    hopeless: Tensor  # whether no damping seems sufficient


def judge_steps(
    loss: Tensor, reached: Tensor, promised: Tensor, damping: Tensor, slow: Tensor, *, slow_share: float
) -> Judgement:
    """Assess steps by the rules of Levenberg-Marquardt.

    A step that does not lower the loss is not accepted; before the first step the loss is infinite. The damping falls
    to a tenth if the loss fell by more than three quarters of the predicted decrease, and grows fourfold if it fell by
    less than a quarter. A step is slow if it left more than ``slow_share`` of the loss.
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
    r"""Estimate the mean eigenvalue of :math:`T^\top J^\top J T`, ``(L,)``, by one product with random signs."""
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
    r"""Return steps that approximately solve :math:`(J^\top J + \lambda P^{-1}) d = -J^\top r` without forming J.

    Each iteration of conjugate gradients, preconditioned by P, needs one product with J and one with its transpose. A
    lane ends when the residual norm of these equations, in the metric of P, has fallen to its share ``forcing``.

    Args:
        equations: the residuals r.
        point: ``(L, D)``.
        lanes: ``(L,)``, passed on to ``equations``.
        damping: ``(L,)``, relative to :func:`damping_scale`.
        forcing: ``(L,)`` in (0, 1).
        max_products: maximum number of pairs of products per lane; a lane that needs more is not ``solved``.
        max_step: entries of the step are clamped to this.
        spectrum: P; None for the identity.
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
    """The Jacobian J of some lanes, with a preconditioner.

    J d is computed as the transpose of the linear map u -> J^T u, in reverse mode twice. So everything that depends
    only on the point is computed once, and not with every product as in forward mode.
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
    """Return the transposed Jacobian ``(D, M)`` of a single lane, times T if there is a spectrum."""
    size = point.shape[1]

    def along(direction: Tensor) -> Tensor:
        image: Tensor = jvp(lambda points: equations(points, lane), (point,), (direction[None],))[1][0]
        return image

    jacobian = None  # filled in place, because concatenating a list would need twice the memory
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
    r"""Return the step of a single lane that solves its damped normal equations, by the full Jacobian and Cholesky.

    In the coordinates u = T^{-1} d, the damping matrix is the identity. Most of the cost is the Jacobian, so it is used
    more than once. If a step does not lower the loss, it is repeated with more damping. If it does, further steps
    (chords) follow while each leaves at most a quarter of the loss; because these use new residuals, they also correct
    what single precision loses in :math:`J^\top J`. Arguments are as in :func:`conjugate_gradients`, with L = 1 and the
    damping relative to the mean of the diagonal; ``max_chords`` is the maximum number of chords.
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
    """Return the step in pixels for a right-hand side ``(1, D)``."""
    return _rooted(spectrum, -torch.cholesky_solve(right.mT, factor).mT)


def dense_bytes(equations: int, unknowns: int, itemsize: int) -> int:
    """Return the bytes of a dense step of one lane: Jacobian, normal equations, factor and a copy."""
    return itemsize * unknowns * (equations + 3 * unknowns)


def _symmetric_product(rows: Tensor) -> Tensor:
    """Compute the lower triangle of ``rows @ rows.mT`` in blocks; entries above it are undefined."""
    product = rows.new_empty(len(rows), len(rows))
    for first in range(0, len(rows), _BLOCK):
        last = min(first + _BLOCK, len(rows))
        product[first:last, :last] = rows[first:last] @ rows[:last].mT
    return product


def _factorise(normal: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of the damped matrix, and the damping, raised if rounding made it indefinite."""
    diagonal = normal.diagonal()
    exact = diagonal.clone()
    mean, tiny = exact.mean(), torch.finfo(normal.dtype).tiny
    least = torch.finfo(normal.dtype).eps * exact.max() / mean.clamp(min=tiny)
    factor = None
    for _ in range(_ATTEMPTS):
        diagonal.copy_(exact + damping * mean)  # in place, because the matrix is large
        found, failed = torch.linalg.cholesky_ex(normal)
        if not bool(failed) and bool(torch.isfinite(found.diagonal()).all()):
            factor = found
            break
        damping = torch.maximum(damping * _REPAIR, least)
    diagonal.copy_(exact)
    if factor is None:  # the matrix is only noise or infinite: fall back to a short step of steepest descent
        factor = torch.diag(exact.abs().sum().clamp(min=tiny).sqrt().expand(len(normal)))
    return factor, damping


def _rooted(spectrum: ImageSpectrum | None, vectors: Tensor) -> Tensor:
    return vectors if spectrum is None else spectrum.root(vectors)
