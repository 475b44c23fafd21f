"""The attacker's own images, from which rules learn what gradients to expect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.clients.protocol import Protocol
from leakage.labels.last_layer import LastLayer
from leakage.seeds import derive_seed

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Number of noise images: for a network that all victims share, and for each network if victims have their own.
_NOISE, _NOISE_FOR_EACH = 1000, 128
# Maximum number of auxiliary images per network, where each victim has its own network.
_IMAGES_FOR_EACH = 256
# Minimum number of images drawn for each class, where labels are not known.
_DRAWN_FOR_EACH = 20


@dataclass
class Auxiliary:
    """The attacker's own images, of the same kind as the victims' images but disjoint from them.

    Labels are optional. Without them, each class gets the images that the victims' network predicts to belong to it
    (:meth:`KnownFeatures.with_labels`).

    Attributes:
        images: ``(M, C, H, W)``, floats in [0, 1].
        labels: ``(M,)``, class indices, or None if they are not known.

    Raises:
        ValueError: there are no images, or a shape, type or value range is wrong.

    Example:
        >>> auxiliary = Auxiliary(torch.rand(20, 1, 28, 28), torch.arange(20) % 10)
        >>> len(auxiliary)
        20
    """

    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        for name, tensor in (("images", images), ("labels", labels)):
            if not isinstance(tensor, Tensor) and (name == "images" or tensor is not None):
                raise ValueError(f"Expected `auxiliary` {name} as a tensor, but got {type(tensor).__name__}.")
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise ValueError(
                f"Expected `auxiliary` images as floats (M, C, H, W), but got {images.dtype} {tuple(images.shape)}."
            )
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"Expected `auxiliary` images in [0, 1], but got {images.min().item():g} to {images.max().item():g}."
            )
        if labels is None:
            return
        if tuple(labels.shape) != (len(images),) or labels.dtype not in _WHOLE:
            raise ValueError(
                f"Expected `auxiliary` labels as whole numbers ({len(images)},), but got {labels.dtype} "
                f"{tuple(labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def check(self, protocol: Protocol) -> None:
        """Raise a ``ValueError`` if the images do not fit the protocol or a class has fewer than two labelled ones."""
        if tuple(self.images.shape[1:]) != protocol.image_shape:
            raise ValueError(
                f"Expected `auxiliary` images of shape {protocol.image_shape}, as the victims', but got "
                f"{tuple(self.images.shape[1:])}."
            )
        if self.labels is None:
            if len(self) < 2:  # `auto` learns from some images and tests on others
                raise ValueError("Expected at least two `auxiliary` images, but got one.")
            return
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
    """The attacker's images as inputs of the last layers of W networks; W is 1 if victims share one network."""

    features: Tensor  # (W, M, D)
    predictions: Tensor  # (W, M, K), class probabilities
    labels: Tensor | None  # (M,)

    def __len__(self) -> int:
        return self.features.shape[1]

    def select(self, images: Tensor) -> KnownFeatures:
        """Return the images with these indices; an index may occur several times."""
        labels = None if self.labels is None else self.labels[images]
        return KnownFeatures(self.features[:, images], self.predictions[:, images], labels)

    def with_labels(self, seed: int) -> LabelledFeatures:
        r"""Return these features with labels. If there are no labels, images are drawn for every class.

        An image is drawn for class k with probability proportional to its prediction :math:`p_k`. If the network is
        calibrated, Bayes' rule says that these images are distributed like images of class k, including those that the
        network misclassifies.
        """
        if self.labels is not None:
            return LabelledFeatures(self.features, self.predictions, self.labels)
        predictions = self.predictions.mean(0)
        each = max(_DRAWN_FOR_EACH, len(self) // predictions.shape[1])
        generator = torch.Generator().manual_seed(derive_seed(seed, 0, "images for every class"))
        weights = predictions.T.double().cpu() + 1e-30  # single-precision predictions may all be zero
        drawn = torch.multinomial(weights, each, replacement=True, generator=generator).to(predictions.device)
        some = self.select(drawn.flatten())
        labels = torch.arange(len(drawn), device=drawn.device).repeat_interleave(each)
        return LabelledFeatures(some.features, some.predictions, labels)

    def split(self, share: float, seed: int) -> tuple[KnownFeatures, KnownFeatures]:
        """Split into two disjoint parts, the first with about ``share`` of the images (of each class, if known)."""
        generator = torch.Generator().manual_seed(derive_seed(seed, 0, "images held out"))
        classes = torch.zeros(len(self), dtype=torch.long) if self.labels is None else self.labels.cpu()
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for label in sorted(set(classes.tolist())):
            members = (classes == label).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=generator)]
            size = max(1, round(share * len(members)))
            parts[0].append(members[:size])
            parts[1].append(members[size:])
        first, second = (self.select(torch.cat(part).to(self.features.device)) for part in parts)
        return first, second


@dataclass
class LabelledFeatures(KnownFeatures):
    """Known features with labels; every class has at least one image."""

    labels: Tensor

    @property
    def one_hot(self) -> Tensor:
        """One-hot labels, ``(M, K)``."""
        return F.one_hot(self.labels, self.predictions.shape[2]).to(self.features)


def known_features(layer: LastLayer, auxiliary: Auxiliary | None, seed: int) -> KnownFeatures:
    """Return the features of the auxiliary images, or of noise if there are none, before any local step."""
    if auxiliary is None:
        count = _NOISE_FOR_EACH if layer.own_weights else _NOISE
        images = natural_noise(count, layer.protocol.image_shape, derive_seed(seed, 0, "natural noise"))
        auxiliary = Auxiliary(images)
    elif layer.own_weights and len(auxiliary) > _IMAGES_FOR_EACH:
        # Take images at even spacing, because they may be sorted by class.
        some = torch.linspace(0, len(auxiliary) - 1, _IMAGES_FOR_EACH).long()
        auxiliary = Auxiliary(auxiliary.images[some], None if auxiliary.labels is None else auxiliary.labels[some])
    features = layer.features(auxiliary.images).to(layer.weight)
    predictions = (features @ layer.weight.mT + layer.bias[:, None]).softmax(dim=2)
    labels = None if auxiliary.labels is None else auxiliary.labels.to(features.device).long()
    return KnownFeatures(features, predictions, labels)


def natural_noise(count: int, image_shape: tuple[int, ...], seed: int) -> Tensor:
    """Return noise with a 1/f amplitude spectrum, as natural images have; ``(count, C, H, W)`` in [0, 1]."""
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(seed)
    down, across = torch.fft.fftfreq(height, 1 / height)[:, None], torch.fft.rfftfreq(width, 1 / width)
    amplitude = 1 / torch.hypot(down, across).clamp(min=1)

    def draw(maps: int) -> Tensor:
        white = torch.fft.rfft2(torch.randn(count, maps, height, width, generator=generator))
        noise: Tensor = torch.fft.irfft2(white * amplitude, s=(height, width))
        return noise / noise.std().clamp(min=1e-6) if noise.numel() > 1 else noise

    noise = draw(1) + (0.4 * draw(channels) if channels > 1 else 0)
    brightness = 0.5 + 0.15 * torch.randn(count, 1, 1, 1, generator=generator)
    return torch.clamp(brightness + 0.25 * noise, 0, 1)
