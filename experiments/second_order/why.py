r"""Why the second-order attack fails: measurements on single victims by the auditor, who knows the ground truth.

They use the residuals :math:`r(x) = (g(x) - g^*) / \lVert g^* \rVert` of `GaussNewtonAttack` and their Jacobian J, in
double precision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.solvers.normal_equations import Equations, dense_jacobian

# An image with an MSE below this counts as found.
FOUND = 1e-4
# Largest number of unknowns for which the Jacobian is formed, and bytes that 256 of its columns may take.
MOST_UNKNOWNS, _MEMORY = 4000, 2**30
# Equations kept per unknown if there are more: random sums of all equations.
_KEPT = 4
# Directions of the Hessian to compute at once.
_DIRECTIONS_AT_ONCE = 64
# Rounding of single precision; damping of linear equations, relative to the mean square of their singular values.
_ROUNDING, _DAMPING = 2.0**-24, 1e-12
# The search of a victim has converged if the linear equations predict a decrease of less than the first share of the
# loss. It is at a saddle if an eigenvalue, relative to the largest, is below minus the second number. Its activation
# pattern is wrong if more than the third share of the ReLUs differ.
_STILL, _SADDLE, _PATTERN = 1e-2, 1e-6, 1e-3
# A loss up to this many times that of the true images counts as equally good.
_AS_GOOD = 10.0


@dataclass
class Diagnosis:
    r"""Measurements on one victim; None if the victim was too large or the quantity does not exist.

    Attributes:
        victim: id of the victim.
        mse: MSE of each of its images.
        solved: whether all of its images were found.
        equations: number of equations, which is the number of the network's parameters.
        unknowns: number of unknowns, which is the number of pixels.
        level: :math:`\nu`, noise and rounding of the shared gradient, relative to its root mean square.
        loss_found: :math:`\lVert r \rVert^2` where the attack ended.
        loss_true: :math:`\lVert r \rVert^2` at the true images, due to noise and rounding.
        gradient_norm: norm of the loss' gradient where the attack ended.
        rank: of the Jacobian at the true images, at the rounding of double precision.
        condition: ratio of its largest to its smallest singular value.
        singular_values: eleven singular values, from the largest to the smallest, evenly spaced by rank.
        mse_floor: the MSE that noise and rounding of the shared gradient alone leave, linearised:
            :math:`\nu^2 / (M D) \sum_i s_i^{-2}`.
        promised: share of the loss where the attack ended that the linear equations there could still remove.
        lowest_eigenvalues: the three lowest eigenvalues of the loss' Hessian where the attack ended, relative to the
            largest.
        wrong_pattern: share of the ReLUs that are on for the true images and off for the found ones, or vice versa.
        sketched: whether rank, condition and ``mse_floor`` were computed from random sums of the equations.
        verdict: the conclusion, see :func:`verdict`.
    """

    victim: int
    mse: list[float]
    solved: bool
    equations: int
    unknowns: int
    level: float
    loss_found: float
    loss_true: float
    gradient_norm: float
    rank: int | None = None
    condition: float | None = None
    singular_values: list[float] | None = None
    mse_floor: float | None = None
    promised: float | None = None
    lowest_eigenvalues: list[float] | None = None
    wrong_pattern: float | None = None
    sketched: bool = False
    verdict: str = ""


def diagnose(
    shared: SharedGradient, victim: Victim, labels: Tensor, images: Tensor, found: Tensor, *, noise: float, half: bool
) -> Diagnosis:
    r"""Measure why the attack on one victim failed or succeeded.

    Args:
        shared: shared gradient of only this victim.
        victim: model and protocol.
        labels: ``(N,)``, true labels.
        images: ``(N, C, H, W)``, true images.
        found: ``(N, C, H, W)``, reconstructions, paired with the true images.
        noise: noise added to the gradient, relative to its root mean square.
        half: whether the gradient was rounded to float16.
    """
    shared = shared.to(device="cpu", dtype=torch.float64)
    images, found = images.cpu().double(), found.cpu().double()
    mse = (found - images).square().flatten(1).mean(1).nan_to_num(math.inf).tolist()
    residuals = _residuals(shared, victim, labels)
    truth, end = images.flatten(), found.flatten()
    size = sum(tensor.numel() for tensor in shared.gradients.values())
    one = Diagnosis(
        victim=int(shared.ids[0]),
        mse=mse,
        solved=max(mse) < FOUND,
        equations=size,
        unknowns=len(truth),
        level=math.hypot(noise, 2.0**-11 if half else _ROUNDING),
        loss_found=float(residuals(end).square().sum()),
        loss_true=float(residuals(truth).square().sum()),
        gradient_norm=float(grad(lambda point: residuals(point).square().sum())(end).norm()),
        wrong_pattern=wrong_pattern(victim.model, _state(shared), images, found),
    )
    if one.unknowns <= MOST_UNKNOWNS and size * 256 * 8 <= _MEMORY:
        one.sketched = size * one.unknowns * 8 > _MEMORY
        values = singular_values(
            _jacobian(_sketch(residuals, size, one.unknowns) if one.sketched else residuals, truth)
        )
        one.rank, one.condition, one.mse_floor = conditioning(values, equations=size, level=one.level)
        one.singular_values = values[torch.linspace(0, len(values) - 1, 11).round().long()].tolist()
        if not one.solved and all(map(math.isfinite, mse)):
            if not one.sketched:
                one.promised = promised(_jacobian(residuals, end), residuals(end))
            eigenvalues = torch.linalg.eigvalsh(_hessian(residuals, end))
            one.lowest_eigenvalues = (eigenvalues[:3] / eigenvalues[-1].clamp(min=1e-300)).tolist()
    one.verdict = verdict(one)
    return one


def verdict(one: Diagnosis) -> str:
    """Return the first conclusion that the measurements support, in one line."""
    if one.solved:
        return "solved"
    worst = max(one.mse)
    if not math.isfinite(worst):
        return "diverged"
    if one.unknowns > one.equations:
        return f"not determined: {one.equations} equations for {one.unknowns} unknowns"
    if one.rank is not None and one.rank < one.unknowns:
        return f"not determined: rank {one.rank} of {one.unknowns}"
    if one.mse_floor is not None and one.condition is not None and one.mse_floor >= FOUND:
        exact = one.mse_floor * (_ROUNDING / one.level) ** 2
        kind = "ill-conditioned" if exact >= FOUND else "noise"
        left = f"noise of {one.level:.0e} leaves an MSE of {one.mse_floor:.0e}"
        return f"{kind}: condition number {one.condition:.0e}, {left}"
    if one.loss_found <= _AS_GOOD * one.loss_true:
        return f"not unique: other images have the same gradient (loss {one.loss_found:.0e}, MSE {worst:.0e})"
    if one.wrong_pattern is not None and one.wrong_pattern > _PATTERN:
        return f"wrong activation pattern: {100 * one.wrong_pattern:.1f} % of the ReLUs"
    if one.promised is not None and one.promised > _STILL:
        return f"not converged: the linear equations promise {100 * one.promised:.0f} % of the loss"
    if one.lowest_eigenvalues is not None:
        kind = "saddle" if one.lowest_eigenvalues[0] < -_SADDLE else "local minimum"
        lowest = f"lowest eigenvalue {one.lowest_eigenvalues[0]:.0e} of the largest"
        return f"{kind}: loss {one.loss_found:.0e}, {lowest}"
    return f"not known: {one.unknowns} unknowns are too many for the Jacobian (loss {one.loss_found:.0e})"


def summarise(diagnoses: Sequence[Diagnosis]) -> str | None:
    """Return the most common verdict of failed victims and its count; None if none failed."""
    failed = [one.verdict for one in diagnoses if not one.solved]
    if not failed:
        return None
    kinds = Counter(text.split(":")[0] for text in failed)
    kind, count = kinds.most_common(1)[0]
    first = next(text for text in failed if text.split(":")[0] == kind)
    return first if len(failed) == 1 else f"{first} ({count} of {len(failed)} alike)"


def singular_values(jacobian: Tensor) -> Tensor:
    """Return all D singular values of a transposed Jacobian ``(D, M)``, largest first, padded with zeros."""
    unknowns, equations = jacobian.shape
    triangle = torch.linalg.qr(jacobian.mT, mode="r").R if equations > unknowns else jacobian
    return F.pad(torch.linalg.svdvals(triangle), (0, max(0, unknowns - equations)))


def conditioning(values: Tensor, *, equations: int, level: float) -> tuple[int, float, float]:
    r"""Return rank, condition number, and the MSE caused by noise of relative size ``level`` in the equations.

    Args:
        values: ``(D,)``, singular values, largest first.
        equations: M, the number of equations.
        level: relative noise level. The gradient has norm 1, so each equation has noise of standard deviation
            ``level`` / sqrt(M).
    """
    largest = float(values[0])
    rank = int((values > largest * max(equations, len(values)) * torch.finfo(values.dtype).eps).sum())
    if rank < len(values):
        return rank, math.inf, math.inf
    floor = level**2 / equations * float(values.pow(-2).mean())
    return rank, largest / float(values[-1]), floor


def promised(jacobian: Tensor, residual: Tensor) -> float:
    """Return the share, 0 to 1, of the squared norm of a residual ``(M,)`` in the range of its Jacobian.

    The Jacobian is transposed, ``(D, M)``.
    """
    normal, right = jacobian @ jacobian.mT, jacobian @ residual
    normal.diagonal().add_(_DAMPING * normal.diagonal().mean())
    solution = torch.linalg.solve(normal, right)
    return float(((solution @ right) / residual.square().sum()).clamp(0, 1))


def wrong_pattern(model: nn.Module, state: dict[str, Tensor], images: Tensor, found: Tensor) -> float | None:
    """Return the share of (leaky) ReLUs whose inputs differ in sign between two batches; None if there are none."""
    signs: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        signs.append((inputs[0] > 0).flatten())

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, nn.ReLU | nn.LeakyReLU)
    ]
    try:
        both = []
        for batch in (images, found):
            signs.clear()
            with torch.no_grad():
                functional_call(model, state, (batch,))
            both.append(torch.cat(signs) if signs else None)
    finally:
        for hook in hooks:
            hook.remove()
    if both[0] is None or both[1] is None:
        return None
    return float((both[0] != both[1]).double().mean())


def _state(shared: SharedGradient) -> dict[str, Tensor]:
    return {name: tensor[0] if shared.own_weights else tensor for name, tensor in shared.state.items()}


def _residuals(shared: SharedGradient, victim: Victim, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from the pixels ``(D,)`` of one victim to its residuals ``(M,)``."""
    state, protocol = _state(shared), shared.protocol
    targets = F.one_hot(labels.cpu().long(), protocol.num_classes).double()
    wanted = torch.cat([tensor[0].flatten() for tensor in shared.gradients.values()])
    size = wanted.norm() if bool(wanted.any()) else 1.0  # as in the attack
    shape = (protocol.num_images, *protocol.image_shape)

    def residuals(point: Tensor) -> Tensor:
        gradients = victim.gradients(state, point.reshape(shape), targets)
        return (torch.cat([gradients[name].flatten() for name in shared.gradients]) - wanted) / size

    return residuals


def _sketch(residuals: Callable[[Tensor], Tensor], equations: int, unknowns: int) -> Callable[[Tensor], Tensor]:
    """Return random sums of the equations, a few per unknown, that preserve norms on average."""
    generator = torch.Generator().manual_seed(0)
    kept = _KEPT * unknowns
    place = torch.randint(kept, (equations,), generator=generator)
    signs = torch.randint(0, 2, (equations,), generator=generator).double() * 2 - 1
    return lambda point: torch.zeros(kept, dtype=point.dtype).index_add(0, place, signs * residuals(point))


def _jacobian(residuals: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Return the transposed Jacobian ``(D, M)``."""
    equations: Equations = lambda points, lanes: vmap(residuals)(points)  # noqa: E731
    return dense_jacobian(equations, point[None], torch.zeros(1, dtype=torch.long), None)


def _hessian(residuals: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Return the Hessian of the squared norm, ``(D, D)``."""

    def along(direction: Tensor) -> Tensor:
        return jvp(grad(lambda at: residuals(at).square().sum()), (point,), (direction,))[1]

    basis = torch.eye(len(point), dtype=point.dtype)
    return torch.cat([vmap(along)(part) for part in basis.split(_DIRECTIONS_AT_ONCE)])
