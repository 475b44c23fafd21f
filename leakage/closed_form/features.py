"""Separation of the features of every image in a batch from the gradient of the last linear layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn import functional as F

from leakage.clients.losses import LOSSES
from leakage.clients.low_rank import row_space
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_count
from leakage.precision import full_precision
from leakage.seeds import derive_seed
from leakage.solvers.linear import select_lanes
from leakage.solvers.normal_equations import judge_steps

# Number of starts per victim in each round; victims whose equations hold to rounding need no further round.
_ROUNDS = (2, 6, 24)
# Equations hold to rounding if the error is below the first number, in units of rounding (the third number is the limit
# of float64), or below the second number if two starts agree on the error: a probability near one has lost digits that
# the equations can't recover.
_ROUNDING, _AGREEING, _LEAST = 16.0, 50.0, 1e-12
# A search ends after this many steps, or after this many slow steps in a row; a step is slow if it leaves more than
# this share of the error.
_STEPS, _SLOW_STEPS, _SLOW_SHARE = 200, 8, 1 - 1e-3
# Bytes for the normal equations of all searches that run at once, and for the gradients of all victims.
_MEMORY = 2**28


@dataclass
class SeparatedFeatures:
    """The features and logit gradients of each image of V victims, in float64.

    Attributes:
        features: ``(V, N, D)``, any real values, the inputs of the last linear layer. Row n belongs to label n; images
            of the same label, whose order the gradient does not reveal, are in a fixed order.
        logit_gradients: ``(V, N, K)``, the gradient of each image's own loss by its logits, not divided by N; for
            cross-entropy, the probabilities minus the one-hot label.
        residual: ``(V,)``, at least 0, the distance between the gradient that follows from these features and labels
            and the shared gradient, relative to the norm of the latter: 1e-8 to 1e-5 if features and labels are right
            and gradients are in float32. It does not measure how accurately rounding allows the features to be known.
    """

    features: Tensor
    logit_gradients: Tensor
    residual: Tensor


def check_separable(victim: Victim) -> None:
    """Raise a ``ValueError`` unless :func:`separate_features` can separate the images of such victims.

    Raises:
        ValueError: victims take several local steps or have a secret learning rate, the logits are not the output of a
            linear layer, the weights of the last layer share no gradient, or there are more images than this gradient
            can tell apart.
    """
    protocol = victim.protocol
    if protocol.learning_rate is not None:
        raise ValueError(
            "Expected victims of one local step, whose gradient is computed at known weights, but got `local_steps` "
            f"{protocol.local_steps} and `learning_rate` {protocol.learning_rate!r}."
        )
    if not victim.classifier:
        raise ValueError(
            "Expected logits that are the output of an nn.Linear layer, whose gradient holds the features, "
            f"but got logits from {victim.logits_from}."
        )
    if f"{victim.classifier}.weight" not in victim.trainable:
        raise ValueError(
            f"Expected the weights of the last layer {victim.classifier!r} to share their gradient, "
            "but got weights that are frozen or belong to another layer too."
        )
    count, classes = protocol.num_images, protocol.num_classes
    has_bias = f"{victim.classifier}.bias" in victim.trainable
    width = victim.state[f"{victim.classifier}.weight"].shape[1]
    # Gradients of the cross-entropy by the logits sum to zero, so there is one equation less for each feature. Without
    # a bias, there would be only as many equations as unknowns, and several solutions.
    most = min(classes - (protocol.loss == "cross_entropy") - (not has_bias), width)
    if count > most:
        raise ValueError(
            f"Expected at most {most} images, as the last layer's gradient ({classes} classes, {width} features, loss "
            f"{protocol.loss!r}, {'with' if has_bias else 'without'} a bias) can't tell more apart, but got {count}."
        )


@torch.no_grad()
@full_precision()
def separate_features(shared: SharedGradient, victim: Victim, labels: Tensor, *, seed: int = 0) -> SeparatedFeatures:
    r"""Recover the inputs of the last linear layer of **every** image of a batch, to rounding.

    With logits :math:`z_n = W h_n + b` and :math:`\delta_n = \partial \ell(z_n, y_n) / \partial z_n`, the last layer
    shares (without 1/N if the loss is a sum)

    .. math:: g_W = \frac{1}{N} \sum_n \delta_n h_n^\top, \qquad g_b = \frac{1}{N} \sum_n \delta_n .

    For one image, :math:`h = g_W^\top g_b / \lVert g_b \rVert^2`. For N images, the rows of :math:`g_W` span all
    features. With an orthonormal basis R, ``(N, D)``, of this space, :math:`h_n = R^\top a_n`. Only the :math:`N^2`
    numbers A are unknown, and there are K (N + 1) equations for them,

    .. math:: \sum_n \delta_n(a_n) \, a_n^\top = N g_W R^\top, \qquad \sum_n \delta_n(a_n) = N g_b .

    They are solved by Levenberg-Marquardt with geodesic acceleration, from random starts around the batch's mean
    feature; the result whose equations hold best is returned. As the rounding of a gradient is relative, the equations
    of each class are divided by the norm of its row of :math:`g_W`, which also makes the basis far more accurate.

    The deltas of N images must be linearly independent. N must therefore be below the number of classes with
    cross-entropy, and at most this number with mean squared error; one fewer without a bias. With mean squared error,
    whose delta is linear, images of repeated labels can be rotated among themselves, so only one pair of equal labels
    is allowed. If deltas are nearly dependent, as with many images of one label on an untrained network, rounding
    limits the accuracy of the features. If labels are wrong, the equations have no solution, and ``residual`` is far
    above rounding. This method is new in this library.

    Args:
        shared: the gradients of V victims.
        victim: their model and protocol.
        labels: ``(V, N)``, class indices, known or inferred (:func:`leakage.labels.infer_labels`), in any order. With
            one image and a bias, only ``residual`` depends on them.
        seed: seed of the random starts.

    Raises:
        ValueError: :func:`check_separable` refuses the victims; gradients don't fit them; or labels have another shape
            or range or, with mean squared error, contain more than one pair of equal labels.

    References:
        Levenberg-Marquardt with geodesic acceleration: Transtrum and Sethna, *Improvements to the
        Levenberg-Marquardt algorithm for nonlinear least-squares minimization*, 2012, https://arxiv.org/abs/1201.5885.

    Example:
        >>> from leakage.models import LeNet
        >>> from leakage.clients.victim import Victim
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28), num_images=2)
        >>> labels = torch.tensor([[3, 3], [8, 1], [0, 5]])
        >>> images = torch.rand(3, 2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        >>> separated = separate_features(victim.share(images, labels), victim, labels)
        >>> separated.features.shape, bool((separated.residual < 1e-5).all())
        (torch.Size([3, 2, 588]), True)
    """
    check_separable(victim)
    victim.check(dataclasses.replace(shared, labels=labels))
    check_count(0, seed=seed)
    _check_repeated(labels, shared)
    at_once = max(1, _MEMORY // shared.gradients[f"{victim.classifier}.weight"][0].numel() // 32)
    victims = torch.split(torch.arange(len(shared)), at_once)
    parts = [vars(_separate(shared.select(part), victim, labels[part], seed)) for part in victims]
    return SeparatedFeatures(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _separate(shared: SharedGradient, victim: Victim, labels: Tensor, seed: int) -> SeparatedFeatures:
    """Do :func:`separate_features` for as many victims as fit into memory."""
    equations, basis, gradient = _equations(shared, victim, labels)
    known = shared.protocol.num_images == 1 and equations.has_bias
    unknowns = equations.mean[:, None] if known else _solve(equations, shared, seed)
    unknowns = _in_order(unknowns, labels)
    deltas = equations.deltas(unknowns)
    features = unknowns * equations.size[:, None, None] @ basis
    length = gradient.norm(dim=(1, 2)).clamp(min=torch.finfo(gradient.dtype).tiny)
    residual = (deltas.mT @ features - gradient).norm(dim=(1, 2)) / length
    if known:  # the shared gradient itself, whatever the labels
        deltas = equations.target[:, None, :, -1]
    return SeparatedFeatures(features, deltas, residual)


@dataclass
class _Equations:
    r"""The equations of L searches: :math:`\omega_k (\sum_n \delta_{nk} [a_n, 1] - G_k) = 0` for each class k."""

    weight: Tensor  # (L, K, N), W in the coordinates of the features
    bias: Tensor  # (L, K)
    labels: Tensor  # (L, N, K), one-hot
    target: Tensor  # (L, K, N) or, with a bias, (L, K, N + 1): G, the gradients, not divided by N
    row_weights: Tensor  # (L, K), omega
    mean: Tensor  # (L, N), the batch's mean feature, of norm about 1
    strengths: Tensor  # (L, N), singular values of the gradient, from 1 downwards
    size: Tensor  # (L,), the norm of the mean feature, by which all coordinates are divided
    loss: str

    def __getitem__(self, searches: Tensor) -> _Equations:
        return select_lanes(self, searches)

    @property
    def has_bias(self) -> bool:
        return self.target.shape[-1] > self.weight.shape[-1]

    def deltas(self, unknowns: Tensor) -> Tensor:
        """Return ``(L, N, K)``, the gradients of each image's loss by its logits."""
        return self._by_logits(unknowns @ self.weight.mT + self.bias[:, None])

    def _by_logits(self, logits: Tensor) -> Tensor:
        gradient: Tensor = grad(lambda logits: LOSSES[self.loss](logits, self.labels).sum())(logits)
        return gradient

    def errors(self, unknowns: Tensor) -> Tensor:
        """Return ``(L, K, N)`` or ``(L, K, N + 1)``, the errors of the equations relative to the gradient's norm."""
        made = self.deltas(unknowns).mT @ self._with_bias(unknowns)
        return (made - self.target) * self.row_weights[..., None]

    def _with_bias(self, unknowns: Tensor) -> Tensor:
        return F.pad(unknowns, (0, 1), value=1.0) if self.has_bias else unknowns

    def normal(self, unknowns: Tensor) -> Tensor:
        r"""Return ``(L, N * N, N * N)``, :math:`J^\top J`, without building the Jacobian J of the errors.

        If image n moves by x, the errors change by :math:`E_n x a_n^\top + \delta_n x^\top`, where E are the
        derivatives of delta by the features. Products of two such terms are therefore products of small matrices.
        """
        searches, count, width = unknowns.shape
        logits = unknowns @ self.weight.mT + self.bias[:, None]

        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            tangent = direction[:, None].expand_as(logits)
            moved: tuple[Tensor, Tensor] = jvp(self._by_logits, (logits,), (tangent,))  # type: ignore[assignment]
            return moved

        deltas, derivatives = vmap(along, in_dims=2, out_dims=(0, 3))(self.weight)
        deltas = deltas[0] * self.row_weights[:, None]
        derivatives = (derivatives * self.row_weights[:, None, :, None]).transpose(1, 2).flatten(2)  # (L, K, N N)
        inputs = self._with_bias(unknowns)
        product = (derivatives.mT @ derivatives).view(searches, count, width, count, width)
        product = product * (inputs @ inputs.mT)[:, :, None, :, None]
        mixed = (deltas @ derivatives).view(searches, count, count, width)
        mixed = torch.einsum("lmni,lnj->lnimj", mixed, unknowns)
        product += mixed + mixed.permute(0, 3, 4, 1, 2)
        product.diagonal(dim1=2, dim2=4).add_((deltas @ deltas.mT)[..., None])
        return product.reshape(searches, count * width, count * width)


def _equations(shared: SharedGradient, victim: Victim, labels: Tensor) -> tuple[_Equations, Tensor, Tensor]:
    """Return the equations of all victims, the basis ``(V, N, D)`` of their features, and g_W summed over images."""
    protocol, layer = shared.protocol, victim.classifier
    scale = protocol.num_images if protocol.reduction == "mean" else 1
    gradient = shared.gradients[f"{layer}.weight"].double() * scale
    push = shared.gradients.get(f"{layer}.bias")
    weight = shared.state[f"{layer}.weight"].double()
    bias = shared.state.get(f"{layer}.bias", torch.zeros_like(weight[..., 0])).double()
    if not shared.own_weights:
        weight, bias = weight.expand_as(gradient), bias.expand_as(gradient[..., 0])
    targets = F.one_hot(labels.to(gradient.device).long(), protocol.num_classes).double()
    smallest = torch.finfo(gradient.dtype).tiny
    lengths = gradient.norm(dim=2)
    row_weights = torch.where(lengths > 0, 1 / lengths.clamp(min=smallest), 0.0)
    rows = gradient * row_weights[..., None]
    strengths, basis = row_space(rows, protocol.num_images)
    basis = basis * torch.where(basis.sum(2, keepdim=True) < 0, -1.0, 1.0)  # fix the sign of each vector
    # The mean feature: each row is an entry of g_b times it, up to differences between images. Without a bias, deltas
    # of zero features replace g_b.
    if push is None:
        zeros = bias[:, None].expand_as(targets)
        total = grad(lambda logits: LOSSES[protocol.loss](logits, targets).sum())(zeros).sum(1)
    else:
        total = push.double() * scale
    weighted = total * row_weights
    mean = torch.einsum("vk,vkd->vd", weighted, rows) / weighted.square().sum(1, keepdim=True).clamp(min=smallest)
    mean = torch.einsum("vd,vnd->vn", mean, basis)
    size = mean.norm(dim=1).clamp(min=smallest)
    size = torch.where(mean.any(1), size, 1.0)
    target = gradient @ basis.mT / size[:, None, None]
    if push is not None:
        target = torch.cat([target, total[..., None]], dim=2)
    total_length = (target * row_weights[..., None]).norm(dim=(1, 2))
    equations = _Equations(
        weight=weight @ basis.mT * size[:, None, None],
        bias=bias,
        labels=targets,
        target=target,
        row_weights=row_weights / total_length.clamp(min=smallest)[:, None],
        mean=mean / size[:, None],
        strengths=strengths / strengths[:, :1].clamp(min=smallest),
        size=size,
        loss=protocol.loss,
    )
    return equations, basis, gradient


def _solve(equations: _Equations, shared: SharedGradient, seed: int) -> Tensor:
    """Return ``(V, N, N)``, the coordinates of all features, from the start whose equations hold best."""
    victims, count = equations.mean.shape
    precision = _precision(torch.cat([tensor.flatten(1) for tensor in shared.gradients.values()], dim=1))
    enough = (_ROUNDING * precision).clamp(min=_LEAST)
    at_once = max(1, _MEMORY // (32 * count**4))
    best = equations.mean.new_zeros(victims, count, count)
    least = equations.mean.new_full((victims,), torch.inf)
    solved = torch.zeros_like(least, dtype=torch.bool)
    first = 0
    for starts in _ROUNDS:
        (unsolved,) = torch.where(~solved)
        if not len(unsolved):
            break
        for part in torch.split(unsolved, max(1, at_once // starts)):
            some = equations[part.repeat_interleave(starts)]
            begin = [
                _start(equations[victim], derive_seed(seed, int(shared.ids[victim]), f"features {first + index}"))
                for victim in part
                for index in range(starts)
            ]
            found = [
                _search(some[lanes], torch.stack(begin)[lanes])
                for lanes in torch.split(torch.arange(len(begin), device=part.device), at_once)
            ]
            unknowns = torch.cat([unknowns for unknowns, _ in found]).view(len(part), starts, count, count)
            errors = torch.cat([errors for _, errors in found]).view(len(part), starts)
            errors, order = torch.where(errors.isfinite(), errors, torch.inf).sort(dim=1)
            agree = (errors[:, 1] < 1.01 * errors[:, 0]) & (errors[:, 0] < enough[part] * _AGREEING / _ROUNDING)
            errors, chosen = errors[:, 0], order[:, 0]
            solved[part] = (errors < enough[part]) | agree
            (better,) = torch.where(errors < least[part])
            best[part[better]] = unknowns[better, chosen[better]]
            least[part[better]] = errors[better]
        first += starts
    return best


def _precision(gradients: Tensor) -> Tensor:
    """Return ``(V,)``, the rounding of the coarsest format that holds each victim's numbers ``(V, M)`` exactly."""
    found = gradients.new_full((len(gradients),), torch.finfo(torch.float64).eps, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16):
        exact = (gradients.to(dtype).to(gradients.dtype) == gradients).all(dim=1)
        found = torch.where(exact, torch.finfo(dtype).eps, found)
    return found


def _start(victim: _Equations, seed: int) -> Tensor:
    """Return ``(N, N)``, the mean feature plus noise, in part with the gradient's spread; rescaled without a bias."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2 * victim.mean.shape, generator=generator, dtype=torch.float64).to(victim.mean)
    spread, power, stretch = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    scale = 1.0 if victim.has_bias else 3 ** (2 * stretch - 1)
    start: Tensor = scale * (victim.mean + 10**-spread * noise * victim.strengths ** (power / 2))
    return start


def _search(equations: _Equations, unknowns: Tensor) -> tuple[Tensor, Tensor]:
    """Run Levenberg-Marquardt with geodesic acceleration in L searches; return unknowns and final errors ``(L,)``."""
    unknowns = unknowns.clone()
    costs = equations.errors(unknowns).square().sum((1, 2))
    damping, slow = torch.full_like(costs, 0.1), torch.zeros_like(costs)
    active = torch.arange(len(costs), device=costs.device)
    for _ in range(_STEPS):
        some, at = equations[active], unknowns[active]
        errors, pull = vjp(some.errors, at)  # type: ignore[misc]
        normal = some.normal(at)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += (damping[active, None] + torch.finfo(at.dtype).eps) * diagonal.mean(1, keepdim=True)
        factor, failed = torch.linalg.cholesky_ex(normal)

        def solve(right: Tensor, factor: Tensor = factor) -> Tensor:
            return torch.cholesky_solve(right.flatten(1)[..., None], factor).view_as(right)

        step = -solve(pull(errors)[0])
        # First and second derivative of the errors along the step, and the correction by the second derivative.
        change, bend = jvp(  # type: ignore[misc]
            lambda at, some=some, step=step: jvp(some.errors, (at,), (step,))[1], (at,), (step,)
        )
        turn = -solve(pull(bend)[0]) / 2
        small = turn.norm(dim=(1, 2)) < 0.375 * step.norm(dim=(1, 2))
        moved = at + step + torch.where(small[:, None, None], turn, 0.0)
        reached = torch.where(failed == 0, some.errors(moved).square().sum((1, 2)), torch.inf)
        promised = -(change * (2 * errors + change)).sum((1, 2))
        judged = judge_steps(costs[active], reached, promised, damping[active], slow[active], slow_share=_SLOW_SHARE)
        damping[active], slow[active] = judged.damping, judged.slow
        unknowns[active] = torch.where(judged.accepted[:, None, None], moved, at)
        costs[active] = torch.where(judged.accepted, reached, costs[active])
        ended = (costs[active] <= 1e-30) | (judged.slow >= _SLOW_STEPS) | judged.hopeless
        active = active[~ended]
        if not len(active):
            break
    return unknowns, costs.sqrt()


def _in_order(unknowns: Tensor, labels: Tensor) -> Tensor:
    """Sort images of the same label by their first coordinate, so that the order does not depend on the start."""
    labels = labels.to(unknowns.device)
    by_size = unknowns[..., 0].argsort(dim=1, stable=True)
    found = by_size.gather(1, labels.gather(1, by_size).argsort(dim=1, stable=True))
    given = labels.argsort(dim=1, stable=True)
    return torch.empty_like(unknowns).scatter_(
        1, given[..., None].expand_as(unknowns), unknowns.gather(1, found[..., None].expand_as(unknowns))
    )


def _check_repeated(labels: Tensor, shared: SharedGradient) -> None:
    repeated = (labels.sort(dim=1).values.diff(dim=1) == 0).sum(1)
    if shared.protocol.loss == "mean_squared_error" and bool((repeated > 1).any()):
        several = shared.ids[(repeated > 1).cpu()].tolist()
        raise ValueError(
            "Expected `labels` with at most one pair of equal labels, as with loss 'mean_squared_error' many other "
            f"features would give the same gradient, but got more (victims {several[:5]})."
        )
