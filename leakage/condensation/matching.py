"""Gradients of real and synthetic images by class, and the derivatives that reduce their distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn import functional as F

from leakage.objectives import DISTANCES

# Real images whose gradient is computed at once on a CPU, so that their activations stay in its cache.
REAL_AT_ONCE_ON_CPU = 8
# Synthetic images at once on a CPU: small classes are computed together, large ones each alone.
SYNTHETIC_AT_ONCE_ON_CPU = 10
# A class of at least this many images is faster alone, without `torch.func`: by a fifth for ten images.
_LARGE_CLASS = 3

Transform = Callable[[Tensor], Tensor]


class Matching(Protocol):
    """A statistic of a network that is matched between real and synthetic images of each class."""

    def targets(self, network: nn.Module, classes: Sequence[Tensor], prepare: Sequence[Transform]) -> dict[str, Tensor]:
        """Return the statistics of real images, ``(K, *shape)`` by name.

        Images of class c are ``(M_c, C, H, W)``, not normalised; ``prepare`` normalises and augments them.
        """

    def match(
        self, network: nn.Module, targets: dict[str, Tensor], images: Tensor, transforms: Sequence[Transform] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the distances ``(K,)`` of synthetic images to the targets, and the derivatives of their sum.

        Images are ``(K, M, C, H, W)``, normalised, M of each class; ``transforms`` augment the images of each class.
        The derivatives are with respect to the images.
        """


@dataclass(frozen=True)
class Gradients:
    """Matches the mean gradient of each class, with :func:`real_gradients` and :func:`match`.

    Attributes:
        names: names of the matched parameters.
        distance: a key of :data:`leakage.objectives.DISTANCES`.
        in_turn: see :func:`match`.
    """

    names: Sequence[str]
    distance: str
    in_turn: bool = False

    def targets(self, network: nn.Module, classes: Sequence[Tensor], prepare: Sequence[Transform]) -> dict[str, Tensor]:
        """Return the gradients of real images, ``(K, *shape)`` by the name of the parameter."""
        return real_gradients(network, self.names, classes, prepare)

    def match(
        self, network: nn.Module, targets: dict[str, Tensor], images: Tensor, transforms: Sequence[Transform] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the distances ``(K,)`` of the synthetic images' gradients, and their derivatives."""
        return match(network, targets, images, distance=self.distance, transforms=transforms, in_turn=self.in_turn)


def matched_parameters(network: nn.Module, distance: str) -> list[str]:
    """Return the names of the parameters that the distance compares: all, or those of at least two dimensions."""
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    return [name for name, parameter in trainable.items() if distance != "row_cosine" or parameter.ndim > 1]


def real_gradients(
    network: nn.Module,
    names: Sequence[str],
    classes: Sequence[Tensor],
    prepare: Sequence[Transform],
) -> dict[str, Tensor]:
    r"""Compute the mean gradient of the cross-entropy over the real images of each class.

    .. math:: g^*_c = \frac{1}{M_c} \sum_{i=1}^{M_c} \nabla_\theta \ell(x_{c,i}, c)

    Images of class c are ``(M_c, C, H, W)``, not normalised; ``prepare`` normalises and augments them. The gradients
    are ``(K, *shape)`` by the name of the parameter.
    """
    parameters = dict(network.named_parameters())
    wanted = [parameters[name] for name in names]
    at_once = REAL_AT_ONCE_ON_CPU if wanted[0].device.type == "cpu" else None
    gradients = [torch.zeros(len(classes), *parameter.shape).to(parameter) for parameter in wanted]
    for label, (images, transform) in enumerate(zip(classes, prepare, strict=True)):
        for chunk in torch.split(images, at_once or len(images)):
            logits = network(transform(chunk))
            loss = F.cross_entropy(logits, torch.full((len(chunk),), label, device=logits.device), reduction="sum")
            # Zero for unused weights, such as those of an auxiliary head.
            found = torch.autograd.grad(loss / len(images), wanted, materialize_grads=True)
            for total, gradient in zip(gradients, found, strict=True):
                total[label] += gradient
    return dict(zip(names, gradients, strict=True))


def match(
    network: nn.Module,
    targets: dict[str, Tensor],
    images: Tensor,
    *,
    distance: str,
    transforms: Sequence[Transform] | None = None,
    in_turn: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Compute the distances between the gradients of synthetic and real images, and their derivatives.

    .. math:: L_c(x_c) = D\left(\frac{1}{M} \sum_{i=1}^M \nabla_\theta \ell(x_{c,i}, c), \; g^*_c\right)

    Images are ``(K, M, C, H, W)``, normalised, M of each class; ``targets`` come from :func:`real_gradients`, and
    ``transforms`` augment the images of each class. The distances are ``(K,)``; the derivatives of their sum with
    respect to the images have the shape of the images. ``in_turn`` processes classes one after another where that is
    faster: on the CPU, unless they are small. The result is the same up to rounding.
    """
    if in_turn and images.device.type == "cpu" and images.shape[1] >= _LARGE_CLASS:
        return _match_in_turn(network, targets, images, distance, transforms)
    state = {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    weights = {name: state[name] for name in targets}

    def objective(images: Tensor, label: Tensor, targets: dict[str, Tensor]) -> Tensor:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            logits = functional_call(network, {**state, **weights}, (images,))
            return F.cross_entropy(logits, label.expand(len(images)))

        return DISTANCES[distance]()(grad(loss)(weights), targets)

    at_once = None
    if images.device.type == "cpu":
        at_once = max(1, SYNTHETIC_AT_ONCE_ON_CPU // images.shape[1])
    evaluate = vmap(grad_and_value(objective), chunk_size=at_once)
    labels = torch.arange(len(images), device=images.device)
    if transforms is None:
        derivatives, distances = evaluate(images.detach(), labels, targets)
        return distances.detach(), derivatives.detach()
    # `vmap` can't run a different transform for each class, so the transforms are differentiated separately.
    leaf = images.detach().requires_grad_()
    augmented = torch.stack([transform(part) for transform, part in zip(transforms, leaf, strict=True)])
    outer, distances = evaluate(augmented.detach(), labels, targets)
    (derivatives,) = torch.autograd.grad(augmented, leaf, outer)
    return distances.detach(), derivatives


def _match_in_turn(
    network: nn.Module,
    targets: dict[str, Tensor],
    images: Tensor,
    distance: str,
    transforms: Sequence[Transform] | None,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`match` does, class by class."""
    parameters = dict(network.named_parameters())
    weights = [parameters[name] for name in targets]
    distances, derivatives = [], []
    for label, own in enumerate(images):
        leaf = own.detach().requires_grad_()
        logits = network(leaf if transforms is None else transforms[label](leaf))
        loss = F.cross_entropy(logits, torch.full((len(own),), label, device=images.device))
        gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        goal = {name: target[label] for name, target in targets.items()}
        found = DISTANCES[distance]()(dict(zip(targets, gradients, strict=True)), goal)
        derivatives += torch.autograd.grad(found, leaf)
        distances.append(found.detach())
    return torch.stack(distances), torch.stack(derivatives)
