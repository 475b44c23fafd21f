"""Labelled images of the attacker's own, from which rules learn what gradients to expect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.labels.last_layer import LastLayer
from leakage.seeds import derive_seed
from leakage.shared_gradient import Protocol

# Images of noise that show how features vary.
_DUMMIES = 128


@dataclass
class Auxiliary:
    """Labelled images of the same kind as the victims', but never theirs.

    Attributes:
        images: ``(M, C, H, W)``, floats in [0, 1].
        labels: ``(M,)``, class indices.

    Raises:
        ValueError: other shapes or ranges, or no images.

    Example:
        >>> auxiliary = Auxiliary(torch.rand(20, 1, 28, 28), torch.arange(20) % 10)
        >>> len(auxiliary)
        20
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise ValueError(
                f"Expected `auxiliary` images as floats (M, C, H, W), but got {images.dtype} {tuple(images.shape)}."
            )
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"Expected `auxiliary` images in [0, 1], but got {images.min().item():g} to {images.max().item():g}."
            )
        if tuple(labels.shape) != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"Expected `auxiliary` labels as whole numbers ({len(images)},), but got {labels.dtype} "
                f"{tuple(labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def check(self, protocol: Protocol) -> None:
        """Raise a ``ValueError`` unless they fit what the clients did, with at least two images of every class."""
        if tuple(self.images.shape[1:]) != protocol.image_shape:
            raise ValueError(
                f"Expected `auxiliary` images of shape {protocol.image_shape}, as the victims', but got "
                f"{tuple(self.images.shape[1:])}."
            )
        outside = self.labels[(self.labels < 0) | (self.labels >= protocol.num_classes)]
        if len(outside):
            raise ValueError(
                f"Expected `auxiliary` labels from 0 to {protocol.num_classes - 1}, but got {int(outside[0])}."
            )
        rare = (self.labels.bincount(minlength=protocol.num_classes) < 2).nonzero().flatten().tolist()
        if rare:
            raise ValueError(
                "Expected at least two `auxiliary` images of every class, but got fewer of "
                f"{rare[:10]}{', ...' if len(rare) > 10 else ''}."
            )


@dataclass
class KnownFeatures:
    """Images whose labels are known, as the last layer sees them.

    Attributes:
        features: ``(W, M, D)`` with W the networks, 1 if they are shared.
        labels: ``(M,)``, on the same device.
        predictions: ``(W, M, K)``, class probabilities.
    """

    features: Tensor
    labels: Tensor
    predictions: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, images: Tensor) -> KnownFeatures:
        """Some of the images."""
        return KnownFeatures(self.features[:, images], self.labels[images], self.predictions[:, images])

    @property
    def one_hot(self) -> Tensor:
        """``(M, K)``."""
        return F.one_hot(self.labels, self.predictions.shape[2]).to(self.features)


def known_features(layer: LastLayer, images: Tensor, labels: Tensor) -> KnownFeatures:
    """Features and predictions of images with the victims' networks, or the one that they share.

    Predictions are those of the weights that were given, before any local step.
    """
    features = layer.features(images).to(layer.weight)
    logits = features @ layer.weight.mT + layer.bias[:, None]
    return KnownFeatures(features, labels.to(features.device).long(), logits.softmax(dim=2))


def dummies(layer: LastLayer, seed: int) -> KnownFeatures:
    """Noise with the spectrum of natural images in place of auxiliary ones; its labels mean nothing."""
    images = natural_noise(_DUMMIES, layer.protocol.image_shape, derive_seed(seed, 0, "dummy images"))
    return known_features(layer, images, torch.arange(_DUMMIES) % layer.num_classes)


def natural_noise(count: int, image_shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise whose amplitude falls with the spatial frequency, as in natural images; ``(count, C, H, W)`` in [0, 1].

    Brightness and contrast vary from image to image; colours vary less than brightness.
    """
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(seed)
    down, across = torch.fft.fftfreq(height, 1 / height)[:, None], torch.fft.rfftfreq(width, 1 / width)
    amplitude = 1 / torch.hypot(down, across).clamp(min=1)

    def draw(maps: int) -> Tensor:
        white = torch.fft.rfft2(torch.randn(count, maps, height, width, generator=generator))
        noise = torch.fft.irfft2(white * amplitude, s=(height, width))
        return noise / noise.std().clamp(min=1e-6) if noise.numel() > 1 else noise

    noise = draw(1) + (0.4 * draw(channels) if channels > 1 else 0)
    brightness = 0.5 + 0.15 * torch.randn(count, 1, 1, 1, generator=generator)
    images: Tensor = (brightness + 0.25 * noise).clamp(0, 1)
    return images
