"""Embeddings of images, the inputs of a network's last linear layer, and their means by class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakage.clients.activations import recorded
from leakage.clients.inspection import inspect_model
from leakage.clients.protocol import Protocol
from leakage.condensation.matching import REAL_AT_ONCE_ON_CPU, SYNTHETIC_AT_ONCE_ON_CPU, Transform


def embedding_layer(network: nn.Module, image_shape: tuple[int, ...]) -> str:
    """Return the name of the last linear layer, whose inputs are the embedding.

    Raises:
        ValueError: the logits are not the output of a linear layer.
    """
    name, origin, _ = inspect_model(copy.deepcopy(network).eval(), Protocol(image_shape, 1, 2))
    if not name:
        raise ValueError(
            "Expected a `network` whose logits are the output of an nn.Linear layer (its inputs are the embedding of "
            f"an image), but got {type(network).__name__} with logits from {origin}."
        )
    return name


def embed(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Return the inputs ``(N, D)`` of the layer for images ``(N, C, H, W)``, in the precision of its weights."""
    with recorded(network, [layer]) as found:
        network(images)
    weight = network.get_parameter(f"{layer}.weight")
    return found[layer].inputs.to(weight.dtype)


@torch.no_grad()
def embed_real(network: nn.Module, layer: str, images: Tensor, prepare: Transform) -> Tensor:
    """Return the inputs ``(N, D)`` of the layer without a graph, for many images, which ``prepare`` normalises."""
    at_once = REAL_AT_ONCE_ON_CPU if images.device.type == "cpu" else len(images)
    return torch.cat([embed(network, layer, prepare(some)) for some in torch.split(images, at_once)])


@dataclass(frozen=True)
class Embeddings:
    r"""Matches the mean embedding of each class by its squared Euclidean distance.

    .. math:: L_c(x_c) = \left\lVert \frac{1}{M} \sum_{i=1}^M f(x_{c,i}) - f^*_c \right\rVert_2^2, \qquad
        f^*_c = \frac{1}{M_c} \sum_{i=1}^{M_c} f(r_{c,i})

    Attributes:
        layer: the layer whose inputs are the embedding f, see :func:`embedding_layer`.
    """

    layer: str

    def targets(self, network: nn.Module, classes: Sequence[Tensor], prepare: Sequence[Transform]) -> dict[str, Tensor]:
        """Return the mean embeddings ``(K, D)`` of real images, by the name of the layer."""
        means = [
            embed_real(network, self.layer, images, transform).mean(0)
            for images, transform in zip(classes, prepare, strict=True)
        ]
        return {self.layer: torch.stack(means)}

    def match(
        self, network: nn.Module, targets: dict[str, Tensor], images: Tensor, transforms: Sequence[Transform] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the distances ``(K,)`` of the synthetic images' mean embeddings, and their derivatives."""
        count = images.shape[1]
        at_once = len(images)
        if images.device.type == "cpu":
            at_once = max(1, SYNTHETIC_AT_ONCE_ON_CPU // count)
        distances: list[Tensor] = []
        derivatives: list[Tensor] = []
        for labels in torch.split(torch.arange(len(images)), at_once):
            leaf = images[labels].detach().requires_grad_()
            seen = leaf
            if transforms is not None:
                chosen = [transforms[label] for label in labels.tolist()]
                seen = torch.stack([transform(own) for transform, own in zip(chosen, leaf, strict=True)])
            means = embed(network, self.layer, seen.flatten(0, 1)).view(len(labels), count, -1).mean(1)
            found = (means - targets[self.layer][labels]).square().sum(1)
            derivatives += torch.autograd.grad(found.sum(), leaf)
            distances.append(found.detach())
        return torch.cat(distances), torch.cat(derivatives)
