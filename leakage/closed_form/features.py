"""Separation of the features of every image in a batch from the gradient of the last linear layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from leakage.clients.losses import LOSSES
from leakage.clients.low_rank import row_space
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form.feature_search import MOST_DIRECT, ROUNDS, ROUNDS_OF_MANY, FeatureEquations, solve
from leakage.errors import check_count
from leakage.precision import full_precision
from leakage.seeds import derive_seed

# What works without features.
_INSTEAD = (
    "Without features, use labels as they are inferred and an attack that searches for all images together, such as "
    "InvertingGradientsAttack."
)
# Bytes for the gradients of all victims that are processed at once.
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
        ValueError: victims take several local steps, have a secret learning rate or labels that are not classes, the
            logits are not the output of a linear layer, the weights of the last layer share no gradient, or there are
            more images than this gradient can tell apart.
    """
    protocol = victim.protocol
    if protocol.learning_rate is not None:
        raise ValueError(
            "Expected victims of one local step, whose gradient is computed at known weights, but got `local_steps` "
            f"{protocol.local_steps} and `learning_rate` {protocol.learning_rate!r}. {_INSTEAD}"
        )
    if protocol.label_kind != "classes":
        raise ValueError(f"Expected victims whose labels are classes, but got {protocol.label_kind!r}. {_INSTEAD}")
    if not victim.classifier:
        raise ValueError(
            "Expected logits that are the output of an nn.Linear layer, whose gradient holds the features, "
            f"but got logits from {victim.logits_from}. {_INSTEAD}"
        )
    if f"{victim.classifier}.weight" not in victim.trainable:
        raise ValueError(
            f"Expected the weights of the last layer {victim.classifier!r} to share their gradient, "
            f"but got weights that are frozen or belong to another layer too. {_INSTEAD}"
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
            f"{protocol.loss!r}, {'with' if has_bias else 'without'} a bias) can't tell more apart, but got {count}. "
            f"{_INSTEAD}"
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

    They are solved by Levenberg-Marquardt with geodesic acceleration, by conjugate gradients for more than 16 images.
    Starts are the solution with the deltas of the batch's mean feature, and random features around this mean; the
    result whose equations hold best is returned. As the rounding of a gradient is relative, the equations
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
    equations, basis, gradient = feature_equations(shared, victim, labels)
    known = shared.protocol.num_images == 1 and equations.has_bias
    seeds = [derive_seed(seed, victim, "features") for victim in shared.ids.tolist()]
    rounds = ROUNDS if shared.protocol.num_images <= MOST_DIRECT else ROUNDS_OF_MANY
    unknowns = equations.mean[:, None] if known else solve(equations, seeds, rounds)[0]
    unknowns = _in_order(unknowns, labels)
    deltas = equations.deltas(unknowns)
    features = unknowns * equations.size[:, None, None] @ basis
    length = gradient.norm(dim=(1, 2)).clamp(min=torch.finfo(gradient.dtype).tiny)
    residual = (deltas.mT @ features - gradient).norm(dim=(1, 2)) / length
    if known:  # the shared gradient itself, whatever the labels
        deltas = equations.target[:, None, :, -1]
    return SeparatedFeatures(features, deltas, residual)


def feature_equations(
    shared: SharedGradient, victim: Victim, labels: Tensor
) -> tuple[FeatureEquations, Tensor, Tensor]:
    """Return the equations of all victims, the basis ``(V, N, D)`` of their features, and g_W summed over images."""
    protocol, layer = shared.protocol, victim.classifier
    scale = protocol.num_images if protocol.reduction == "mean" else 1
    gradient = shared.gradients[f"{layer}.weight"].double() * scale
    push = shared.gradients.get(f"{layer}.bias")
    weight = shared.state[f"{layer}.weight"].double()
    bias = shared.state.get(f"{layer}.bias", torch.zeros_like(weight[..., 0])).double()
    if not shared.own_weights:
        weight, bias = weight.expand_as(gradient), bias.expand_as(gradient[..., 0])
    targets = protocol.targets(labels.to(gradient.device), torch.float64)
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
    equations = FeatureEquations(
        weight=weight @ basis.mT * size[:, None, None],
        bias=bias,
        labels=targets,
        target=target,
        row_weights=row_weights / total_length.clamp(min=smallest)[:, None],
        mean=mean / size[:, None],
        strengths=strengths / strengths[:, :1].clamp(min=smallest),
        size=size,
        precision=_precision(torch.cat([tensor.flatten(1) for tensor in shared.gradients.values()], dim=1)),
        loss=protocol.loss,
    )
    return equations, basis, gradient


def _precision(gradients: Tensor) -> Tensor:
    """Return ``(V,)``, the rounding of the coarsest format that holds each victim's numbers ``(V, M)`` exactly."""
    found = gradients.new_full((len(gradients),), torch.finfo(torch.float64).eps, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16):
        exact = (gradients.to(dtype).to(gradients.dtype) == gradients).all(dim=1)
        found = torch.where(exact, torch.finfo(dtype).eps, found)
    return found


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
