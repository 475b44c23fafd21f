"""Victims whose last layer's inputs are known: the images themselves, or something fixed made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakage.clients.protocol import Protocol
from leakage.clients.victim import Victim
from leakage.labels import Auxiliary
from leakage.labels.last_layer import LastLayer


class Signed(nn.Module):
    """Features from -1 to 1."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * images.flatten(1) - 1


class Constant(nn.Module):
    """The same features for every image."""

    features: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, images: Tensor) -> Tensor:
        return self.features.expand(len(images), -1)


def linear(
    classes: int, width: int, *, before: nn.Module | None = None, bias: bool = True, scale: float = 1.0, seed: int = 0
) -> nn.Sequential:
    """A linear layer, by default on the pixels."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(width, classes, bias=bias)
    for parameter in layer.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return nn.Sequential(before or nn.Flatten(), layer)


def network(
    seed: int,
    *,
    classes: int,
    width: int = 16,
    bias: bool = True,
    activation: nn.Module | None = None,
    scale: float = 1,
) -> nn.Sequential:
    """Two layers for images of (3, 2, 2)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(12, width), activation or nn.Sigmoid(), nn.Linear(width, classes, bias=bias)
    model = nn.Sequential(nn.Flatten(), *layers)
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    return model


def images_and_labels(
    seed: int, victims: int, count: int, classes: int, shape: tuple[int, int, int] = (3, 2, 2)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(victims, count, *shape, generator=generator)
    return images, torch.randint(classes, (victims, count), generator=generator)


def auxiliary_images(seed: int, classes: int, each: int = 4, shape: tuple[int, int, int] = (3, 2, 2)) -> Auxiliary:
    images, _ = images_and_labels(seed, 1, classes * each, classes, shape)
    return Auxiliary(images[0], torch.arange(classes).repeat(each))


def counts_of(labels: Tensor, classes: int) -> Tensor:
    return torch.stack([row.bincount(minlength=classes) for row in labels])


def recall(counts: Tensor, labels: Tensor) -> float:
    """Instance recall."""
    truth = counts_of(labels, counts.shape[1])
    return (torch.minimum(counts, truth).sum() / truth.sum()).item()


def layer_of(probabilities: Tensor, features: Tensor, labels: Tensor) -> LastLayer:
    """Gradients from predictions ``(V, N, K)``, features ``(V, N, D)`` and labels ``(V, N)``, image by image."""
    victims, count, classes = probabilities.shape
    weight = torch.zeros(victims, classes, features.shape[2], dtype=features.dtype)
    bias = torch.zeros(victims, classes, dtype=features.dtype)
    for victim in range(victims):
        for image in range(count):
            error = probabilities[victim, image].clone()
            error[labels[victim, image]] -= 1
            bias[victim] += error / count
            weight[victim] += torch.outer(error, features[victim, image]) / count
    return LastLayer(
        weight_gradient=weight,
        bias_gradient=bias,
        weight=torch.full_like(weight[:1], torch.nan),  # not for rules that only read gradients
        bias=torch.full_like(bias[:1], torch.nan),
        features=lambda images: images.flatten(1)[None],
        protocol=Protocol((1, 1, features.shape[2]), classes, count),
        non_negative=bool((features >= 0).all()),
        own_weights=False,
    )


def victim_of(model: nn.Module, count: int, **options: object) -> Victim:
    return Victim(model, image_shape=(3, 2, 2), num_images=count, **options)  # type: ignore[arg-type]
