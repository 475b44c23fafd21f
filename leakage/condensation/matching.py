"""Gradients of real and of synthetic images, class by class, and how the synthetic images lower their distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn import functional as F

from leakage.objectives import DISTANCES

# Real images whose gradient is taken at once on a CPU: what they leave in memory then stays in its cache.
REAL_AT_ONCE_ON_CPU = 8
# The same for synthetic images: small classes together, large ones each alone.
SYNTHETIC_AT_ONCE_ON_CPU = 10
# From so many images on a class is faster alone, without `torch.func`: by a fifth for ten.
_LARGE_CLASS = 3

Transform = Callable[[Tensor], Tensor]


class Matching(Protocol):
    """What real and synthetic images of a class shall have in common, as a network sees it."""

    def targets(self, network: nn.Module, classes: Sequence[Tensor], prepare: Sequence[Transform]) -> dict[str, Tensor]:
        """What real images say, ``(K, *shape)`` by name.

        Images of class c are ``(M_c, C, H, W)`` as the data set has them; ``prepare`` normalises and augments them.
        """

    def match(
        self, network: nn.Module, targets: dict[str, Tensor], images: Tensor, transforms: Sequence[Transform] | None
    ) -> tuple[Tensor, Tensor]:
        """The distances ``(K,)`` of synthetic images to the targets, and the derivatives of their sum by the images.

        Images are ``(K, M, C, H, W)``, normalised, M of each class; ``transforms`` augment those of each class.
        """


@dataclass(frozen=True)
class Gradients:
    """The mean gradient of each class: :func:`real_gradients` and :func:`match`.

    Attributes:
        names: of the parameters.
        distance: a key of :data:`leakage.objectives.DISTANCES`.
        in_turn: see :func:`match`.
    """

    names: Sequence[str]
    distance: str
    in_turn: bool = False

    def targets(self, network: nn.Module, classes: Sequence[Tensor], prepare: Sequence[Transform]) -> dict[str, Tensor]:
        """The gradients of real images."""
        return real_gradients(network, self.names, classes, prepare)

    def match(
        self, network: nn.Module, targets: dict[str, Tensor], images: Tensor, transforms: Sequence[Transform] | None
    ) -> tuple[Tensor, Tensor]:
        """Distances of the synthetic images' gradients, and their derivatives."""
        return match(network, targets, images, distance=self.distance, transforms=transforms, in_turn=self.in_turn)


def matched_parameters(network: nn.Module, distance: str) -> list[str]:
    """Names of the parameters whose gradients the distance looks at: all, or those of at least two dimensions."""
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    return [name for name, parameter in trainable.items() if distance != "row_cosine" or parameter.ndim > 1]


def real_gradients(
    network: nn.Module,
    names: Sequence[str],
    classes: Sequence[Tensor],
    prepare: Sequence[Transform],
) -> dict[str, Tensor]:
    r"""The mean gradient of the cross-entropy over the real images of each class.

    .. math:: g^*_c = \frac{1}{M_c} \sum_{i=1}^{M_c} \nabla_\theta \ell(x_{c,i}, c)

    Images of class c are ``(M_c, C, H, W)`` as the data set has them; ``prepare`` normalises and augments them. The
    gradients are ``(K, *shape)`` by the name of the parameter.
    """
    parameters = dict(network.named_parameters())
    wanted = [parameters[name] for name in names]
    at_once = REAL_AT_ONCE_ON_CPU if wanted[0].device.type == "cpu" else None
    gradients = [torch.zeros(len(classes), *parameter.shape).to(parameter) for parameter in wanted]
    for label, (images, transform) in enumerate(zip(classes, prepare, strict=True)):
        for chunk in torch.split(images, at_once or len(images)):
            logits = network(transform(chunk))
            loss = F.cross_entropy(logits, torch.full((len(chunk),), label, device=logits.device), reduction="sum")
            # Zero for weights that are not used, such as those of a head for training.
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
    r"""Distances between the gradients of synthetic and real images, and their derivatives by the images.

    .. math:: L_c(x_c) = D\left(\frac{1}{M} \sum_{i=1}^M \nabla_\theta \ell(x_{c,i}, c), \; g^*_c\right)

    Images are ``(K, M, C, H, W)``, normalised, M of each class; ``targets`` are what :func:`real_gradients` gives, and
    ``transforms`` augment the images of each class. The distances are ``(K,)``, the derivatives of their sum have the
    shape of the images. ``in_turn`` takes classes one after another where that is faster: on the CPU, unless they are
    small; the same up to rounding.
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
    # A transform of its own for each class can't be run by `vmap`: differentiated apart.
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
    """:func:`match`, class by class."""
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
