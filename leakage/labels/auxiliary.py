"""Images of the attacker's own, from which rules learn what gradients to expect."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.clients.protocol import Protocol
from leakage.labels.last_layer import LastLayer
from leakage.seeds import derive_seed

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Images of noise for a network that victims share, and for each of their own.
_NOISE, _NOISE_FOR_EACH = 1000, 128
# The most auxiliary images that are looked at by each network, where each victim has its own.
_IMAGES_FOR_EACH = 256
# Where labels are not known, images drawn for each class at the least.
_DRAWN_FOR_EACH = 20


@dataclass
class Auxiliary:
    """Images of the same kind as the victims', but never theirs.

    Labels are not needed: without them each class is given the images that the victims' network takes for it
    (:meth:`KnownFeatures.with_labels`).

    Attributes:
        images: ``(M, C, H, W)``, floats in [0, 1].
        labels: ``(M,)``, class indices; None if they are not known.

    Raises:
        ValueError: other shapes or ranges, or no images.

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
        """Raise a ``ValueError`` unless they fit what the clients did, and labels tell two images of every class."""
        if tuple(self.images.shape[1:]) != protocol.image_shape:
            raise ValueError(
                f"Expected `auxiliary` images of shape {protocol.image_shape}, as the victims', but got "
                f"{tuple(self.images.shape[1:])}."
            )
        if self.labels is None:
            if len(self) < 2:  # `auto` learns from some and tries on others
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
    """Images of the attacker's own as the last layers of W networks see them (1 that is shared)."""

    features: Tensor  # (W, M, D)
    predictions: Tensor  # (W, M, K), class probabilities
    labels: Tensor | None  # (M,)

    def __len__(self) -> int:
        return self.features.shape[1]

    def select(self, images: Tensor) -> KnownFeatures:
        """Some of the images, or some of them several times."""
        labels = None if self.labels is None else self.labels[images]
        return KnownFeatures(self.features[:, images], self.predictions[:, images], labels)

    def with_labels(self, seed: int) -> LabelledFeatures:
        r"""The same with labels; where there are none, with images drawn for every class.

        Class k gets images with probability proportional to their prediction :math:`p_k`. If the network is calibrated,
        this is what Bayes' rule says of images of class k: those that it is sure of, and those that it mistakes.
        """
        if self.labels is not None:
            return LabelledFeatures(self.features, self.predictions, self.labels)
        predictions = self.predictions.mean(0)
        each = max(_DRAWN_FOR_EACH, len(self) // predictions.shape[1])
        generator = torch.Generator().manual_seed(derive_seed(seed, 0, "images for every class"))
        weights = predictions.T.double().cpu() + 1e-30  # those of single precision may all be zero
        drawn = torch.multinomial(weights, each, replacement=True, generator=generator).to(predictions.device)
        some = self.select(drawn.flatten())
        labels = torch.arange(len(drawn), device=drawn.device).repeat_interleave(each)
        return LabelledFeatures(some.features, some.predictions, labels)

    def split(self, share: float, seed: int) -> tuple[KnownFeatures, KnownFeatures]:
        """Two disjoint parts, the first with about ``share`` of the images: of each class, where labels are known."""
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
    """The same with labels: every class has some."""

    labels: Tensor

    @property
    def one_hot(self) -> Tensor:
        """``(M, K)``."""
        return F.one_hot(self.labels, self.predictions.shape[2]).to(self.features)


def known_features(layer: LastLayer, auxiliary: Auxiliary | None, seed: int) -> KnownFeatures:
    """Auxiliary images, or else noise, as the victims' networks see them before any local step."""
    if auxiliary is None:
        count = _NOISE_FOR_EACH if layer.own_weights else _NOISE
        images = natural_noise(count, layer.protocol.image_shape, derive_seed(seed, 0, "natural noise"))
        auxiliary = Auxiliary(images)
    elif layer.own_weights and len(auxiliary) > _IMAGES_FOR_EACH:
        # Spread over all of them, which may come class by class.
        some = torch.linspace(0, len(auxiliary) - 1, _IMAGES_FOR_EACH).long()
        auxiliary = Auxiliary(auxiliary.images[some], None if auxiliary.labels is None else auxiliary.labels[some])
    features = layer.features(auxiliary.images).to(layer.weight)
    predictions = (features @ layer.weight.mT + layer.bias[:, None]).softmax(dim=2)
    labels = None if auxiliary.labels is None else auxiliary.labels.to(features.device).long()
    return KnownFeatures(features, predictions, labels)


def natural_noise(count: int, image_shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise whose amplitude falls with the spatial frequency, as in natural images; ``(count, C, H, W)`` in [0, 1]."""
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
