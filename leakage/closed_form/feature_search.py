"""Search for the features of every image of a batch: the equations of the last layer, starts, Levenberg-Marquardt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, cholesky_solve
from torch.func import grad, jvp, vjp, vmap
from torch.linalg import cholesky_ex
from torch.nn import functional as F

from leakage.clients.losses import LOSSES
from leakage.seeds import derive_seed
from leakage.solvers.linear import least_squares, select_lanes
from leakage.solvers.normal_equations import judge_steps

# Number of starts per victim in each round, for up to 16 images and for more; victims whose equations hold to rounding
# need no further round.
ROUNDS, ROUNDS_OF_MANY = (2, 6, 24), (1, 1)
# Equations hold to rounding if the error is below the first number, in units of rounding (the third number is the limit
# of float64), or below the second number if two starts agree on the error: a probability near one has lost digits that
# the equations can't recover.
_ROUNDING, _AGREEING, _LEAST = 16.0, 50.0, 1e-12
# A search ends after this many steps (the second number is for many images), or after this many slow steps in a row; a
# step is slow if it leaves more than this share of the error.
_STEPS, _STEPS_OF_MANY, _SLOW_STEPS, _SLOW_SHARE = 200, 100, 8, 1 - 1e-3
# Damping of the first step.
_DAMPING = 0.1
# Largest number of images for which normal equations are built.
MOST_DIRECT = 16
# By conjugate gradients: precision of a step and of its correction by the second derivative, and the most products with
# the Jacobian for one of them.
_TOLERANCE, _TOLERANCE_OF_TURN, _PRODUCTS = 1e-2, 1e-1, 100
# Linear solutions in turn before the search, and what they add to the diagonal.
_LINEAR_STEPS, _RIDGE = 4, 1e-6
# Deltas of two images count as different from this share of their mean square.
_SAME = 1e-12
# Bytes for all searches that run at once.
_MEMORY = 2**28


@dataclass
class FeatureEquations:
    r"""The equations of L searches: :math:`\omega_k (\sum_n \delta_{nk} [a_n, 1] - G_k) = 0` for each class k."""

    weight: Tensor  # (L, K, N), W in the coordinates of the features
    bias: Tensor  # (L, K)
    labels: Tensor  # (L, N, K), the targets of the loss
    target: Tensor  # (L, K, N) or, with a bias, (L, K, N + 1): G, the gradients, not divided by N
    row_weights: Tensor  # (L, K), omega
    mean: Tensor  # (L, N), the batch's mean feature, of norm about 1
    strengths: Tensor  # (L, N), singular values of the gradient, from 1 downwards
    size: Tensor  # (L,), the norm of the mean feature, by which all coordinates are divided
    precision: Tensor  # (L,), the rounding of the shared gradient
    loss: str

    def __getitem__(self, searches: Tensor) -> FeatureEquations:
        return select_lanes(self, searches)

    def __len__(self) -> int:
        return len(self.target)

    @property
    def has_bias(self) -> bool:
        """Whether the bias shares its gradient."""
        return self.target.shape[-1] > self.weight.shape[-1]

    def logits(self, unknowns: Tensor) -> Tensor:
        """Return ``(L, N, K)``."""
        return unknowns @ self.weight.mT + self.bias[:, None]

    def deltas(self, unknowns: Tensor) -> Tensor:
        """Return ``(L, N, K)``, the gradients of each image's loss by its logits."""
        return self.by_logits(self.logits(unknowns))

    def by_logits(self, logits: Tensor) -> Tensor:
        """Return the deltas for given logits."""
        gradient: Tensor = grad(lambda logits: LOSSES[self.loss](logits, self.labels).sum())(logits)
        return gradient

    def errors(self, unknowns: Tensor) -> Tensor:
        """Return ``(L, K, N)`` or ``(L, K, N + 1)``, the errors of the equations relative to the gradient's norm."""
        made = self.deltas(unknowns).mT @ self.inputs(unknowns)
        return (made - self.target) * self.row_weights[..., None]

    def inputs(self, unknowns: Tensor) -> Tensor:
        """Return the factors of the deltas: the unknowns and, with a bias, one."""
        return F.pad(unknowns, (0, 1), value=1.0) if self.has_bias else unknowns

    def costs(self, unknowns: Tensor) -> Tensor:
        """Return ``(L,)``, the sums of squared errors."""
        return self.errors(unknowns).square().sum((1, 2))


class _Linearised:
    r"""The Jacobian J of the errors, and damped steps.

    If image n moves by x, the errors change by :math:`E_n x a_n^\top + \delta_n x^\top`, where :math:`E_n` are the
    derivatives of delta by the features. Steps solve :math:`(J^\top J + \lambda m I) \, x = J^\top y`, where m is the
    mean of the diagonal. For few images :math:`J^\top J` is built. For more there are conjugate gradients with products
    of J: this object is their :class:`~leakage.solvers.linear.LinearMap`, with the damping as further equations. The
    second term alone would make :math:`J^\top J` the matrix :math:`\Delta \Delta^\top` for each coordinate, which is
    inverted as the preconditioner.
    """

    def __init__(self, equations: FeatureEquations, point: Tensor, damping: Tensor) -> None:
        self.equations, self.point, self.damping = equations, point, damping
        deltas, self._pull = vjp(equations.by_logits, equations.logits(point))[:2]
        self.deltas = deltas * equations.row_weights[:, None]
        self.inputs = equations.inputs(point)
        self.residuals = self.deltas.mT @ self.inputs - equations.target * equations.row_weights[..., None]
        self._gram = self.deltas @ self.deltas.mT
        self.direct = point.shape[1] <= MOST_DIRECT
        if self.direct:
            matrix = _ridged(self.normal(), damping + torch.finfo(point.dtype).eps)
        else:
            matrix = _ridged(self._gram, damping + _SAME)
            self._root = (damping * self._gram.diagonal(dim1=1, dim2=2).mean(1)).sqrt()[:, None]
        self._factor, failed = cholesky_ex(matrix)
        self.usable = failed == 0

    def solve(self, given: Tensor, tolerance: float) -> Tensor:
        """Return the step ``(L, N, N)`` that makes the errors change by ``given``; the tolerance is that of CG."""
        if self.direct:
            return cholesky_solve(self._product_with_transpose(given)[..., None], self._factor).view_as(self.point)
        parts = [given, torch.zeros_like(self.point).flatten(1)]
        found = least_squares(self, parts, tolerance=tolerance, max_products=_PRODUCTS)
        return torch.where(torch.isfinite(found.x), found.x, 0.0).view_as(self.point)

    def product(self, x: Tensor) -> list[Tensor]:
        moved = x.view_as(self.point)
        bent = self._bend(moved @ self.equations.weight.mT) * self.equations.row_weights[:, None]
        change = bent.mT @ self.inputs
        change[..., : moved.shape[2]] += self.deltas.mT @ moved
        return [change, self._root * x]

    def transposed(self, parts: list[Tensor]) -> Tensor:
        gradient: Tensor = self._product_with_transpose(parts[0]) + self._root * parts[1]
        return gradient

    def precondition(self, x: Tensor) -> Tensor:
        return cholesky_solve(x.view_as(self.point), self._factor).flatten(1)

    def select(self, lanes: Tensor) -> _Linearised:
        return _Linearised(self.equations[lanes], self.point[lanes], self.damping[lanes])

    def _bend(self, direction: Tensor) -> Tensor:
        """Return how the deltas change with the logits along a direction; the derivative is its own transpose."""
        bent: Tensor = self._pull(direction)[0]
        return bent

    def _product_with_transpose(self, errors: Tensor) -> Tensor:
        weighted = errors * self.equations.row_weights[..., None]
        bent = self._bend(self.inputs @ weighted.mT) @ self.equations.weight
        gradient: Tensor = (bent + self.deltas @ errors[..., : self.point.shape[2]]).flatten(1)
        return gradient

    def normal(self) -> Tensor:
        r"""Return ``(L, N * N, N * N)``, :math:`J^\top J`, from products of small matrices, without building J."""
        searches, count, width = self.point.shape
        pulled = vmap(lambda direction: self._bend(direction[:, None].expand_as(self.deltas)), in_dims=2, out_dims=3)(
            self.equations.weight
        )
        derivatives = (pulled * self.equations.row_weights[:, None, :, None]).transpose(1, 2).flatten(2)  # (L, K, N N)
        product = (derivatives.mT @ derivatives).view(searches, count, width, count, width)
        product = product * (self.inputs @ self.inputs.mT)[:, :, None, :, None]
        mixed = (self.deltas @ derivatives).view(searches, count, count, width)
        mixed = torch.einsum("lmni,lnj->lnimj", mixed, self.point)
        product += mixed + mixed.permute(0, 3, 4, 1, 2)
        product.diagonal(dim1=2, dim2=4).add_(self._gram[..., None])
        return product.reshape(searches, count * width, count * width)


def solve(
    equations: FeatureEquations, seeds: Sequence[int], rounds: Sequence[int], *, steps: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Search from several starts, until the equations hold to rounding.

    Args:
        equations: those of V victims.
        seeds: a seed for the starts of each victim.
        rounds: number of starts per victim in each round.
        steps: largest number of steps of a search, by default as many as are useful.

    Returns:
        ``(V, N, N)``, the coordinates of all features, from the start whose equations hold best; ``(V,)``, the norm of
        their errors; and ``(V,)``, whether they hold to rounding.
    """
    victims, count = equations.mean.shape
    steps = steps or (_STEPS if count <= MOST_DIRECT else _STEPS_OF_MANY)
    at_once = max(1, _MEMORY // (32 * count**4 if count <= MOST_DIRECT else 160 * equations.target[0].numel()))
    best = equations.mean.new_zeros(victims, count, count)
    least = equations.mean.new_full((victims,), torch.inf)
    solved = torch.zeros_like(least, dtype=torch.bool)
    linear = linear_start(equations)
    first = 0
    for starts in rounds:
        (unsolved,) = torch.where(~solved)
        if not len(unsolved):
            break
        for part in torch.split(unsolved, max(1, at_once // starts)):
            lanes = part.repeat_interleave(starts)
            numbers = [*range(first, first + starts)] * len(part)
            begin = start(equations[lanes], linear[lanes], [seeds[lane] for lane in lanes.tolist()], numbers)
            found = [
                search(equations[lanes[some]], begin[some], steps=steps)
                for some in torch.split(torch.arange(len(lanes), device=lanes.device), at_once)
            ]
            unknowns = torch.cat([unknowns for unknowns, _ in found]).view(len(part), starts, count, count)
            errors = torch.cat([errors for _, errors in found]).view(len(part), starts)
            errors, order = torch.where(errors.isfinite(), errors, torch.inf).sort(dim=1)
            solved[part] = holds_to_rounding(equations[part], errors)
            errors, chosen = errors[:, 0], order[:, 0]
            (better,) = torch.where(errors < least[part])
            best[part[better]] = unknowns[better, chosen[better]]
            least[part[better]] = errors[better]
        first += starts
    return best, least, solved


def holds_to_rounding(equations: FeatureEquations, errors: Tensor) -> Tensor:
    """Return ``(V,)``, whether the least errors ``(V, starts)``, in ascending order, are as small as rounding's."""
    least = (_ROUNDING * equations.precision).clamp(min=_LEAST)
    holds = errors[:, 0] < least
    if errors.shape[1] > 1:
        holds |= (errors[:, 1] < 1.01 * errors[:, 0]) & (errors[:, 0] < least * _AGREEING / _ROUNDING)
    return holds


def linear_start(equations: FeatureEquations) -> Tensor:
    r"""Return ``(L, N, N)``, features that solve the equations as if the deltas were known.

    The deltas of an untrained network hardly depend on the features, as its predictions are nearly uniform. With known
    deltas the equations are linear. Each step solves them with the deltas of the step before, from those of the mean
    feature on. Images of the same label keep a common feature.
    """
    count = equations.mean.shape[1]
    point = equations.mean[:, None].expand(-1, count, -1)
    best, least = point, equations.costs(point)
    for _ in range(_LINEAR_STEPS):
        deltas = equations.deltas(point) * equations.row_weights[:, None]
        gram = _ridged(deltas @ deltas.mT, _RIDGE)
        step: Tensor = torch.linalg.solve(gram, deltas @ equations.errors(point)[..., :count])
        point = point - step
        costs = equations.costs(point)
        lower = costs < least
        best, least = torch.where(lower[:, None, None], point, best), torch.where(lower, costs, least)
    return best


def start(equations: FeatureEquations, linear: Tensor, seeds: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Return starts ``(L, N, N)``: the linear start or, at odd numbers, the mean feature, plus noise.

    The noise has in part the gradient's spread. Without a bias, the mean feature has an unknown length.
    """
    starts = []
    for lane, (seed, number) in enumerate(zip(seeds, numbers, strict=True)):
        mean, strengths = equations.mean[lane], equations.strengths[lane]
        generator = torch.Generator().manual_seed(derive_seed(seed, number, "start"))
        noise = torch.randn(2 * mean.shape, generator=generator, dtype=torch.float64).to(mean)
        spread, power, stretch = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        noise = 10**-spread * noise * strengths ** (power / 2)
        scale = 1.0 if equations.has_bias else 3 ** (2 * stretch - 1)
        starts.append(scale * (mean + noise) if number % 2 else linear[lane] + noise / 10)
    return torch.stack(starts)


def search(equations: FeatureEquations, unknowns: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Run Levenberg-Marquardt with geodesic acceleration in L searches.

    Args:
        equations: those of L searches.
        unknowns: ``(L, N, N)``, the starts.
        steps: largest number of steps.

    Returns:
        Unknowns ``(L, N, N)`` and the norm of their errors ``(L,)``.
    """
    unknowns = unknowns.clone()
    costs = equations.costs(unknowns)
    damping, slow = torch.full_like(costs, _DAMPING), torch.zeros_like(costs)
    active = torch.arange(len(costs), device=costs.device)
    for _ in range(steps):
        some, at = equations[active], unknowns[active]
        linearised = _Linearised(some, at, damping[active])
        step = linearised.solve(-linearised.residuals, _TOLERANCE)
        # First and second derivative of the errors along the step, and the correction by the second derivative.
        change, bend = jvp(  # type: ignore[misc]
            lambda at, some=some, step=step: jvp(some.errors, (at,), (step,))[1], (at,), (step,)
        )
        turn = linearised.solve(-bend / 2, _TOLERANCE_OF_TURN)
        small = turn.norm(dim=(1, 2)) < 0.375 * step.norm(dim=(1, 2))
        moved = at + step + torch.where(small[:, None, None], turn, 0.0)
        reached = torch.where(linearised.usable, some.costs(moved), torch.inf)
        promised = -(change * (2 * linearised.residuals + change)).sum((1, 2))
        judged = judge_steps(costs[active], reached, promised, damping[active], slow[active], slow_share=_SLOW_SHARE)
        damping[active], slow[active] = judged.damping, judged.slow
        unknowns[active] = torch.where(judged.accepted[:, None, None], moved, at)
        costs[active] = torch.where(judged.accepted, reached, costs[active])
        ended = (costs[active] <= 1e-30) | (judged.slow >= _SLOW_STEPS) | judged.hopeless
        active = active[~ended]
        if not len(active):
            break
    return unknowns, costs.sqrt()


def _ridged(gram: Tensor, share: Tensor | float) -> Tensor:
    """Add a share of the mean of the diagonal to the diagonal of matrices ``(L, N, N)``."""
    ridged = gram.clone()
    diagonal = ridged.diagonal(dim1=1, dim2=2)
    diagonal += (share * diagonal.mean(1) + torch.finfo(gram.dtype).tiny)[:, None]
    return ridged
