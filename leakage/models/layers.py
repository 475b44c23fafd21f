"""Layers and options that the networks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}

NORMS = ("batch", "group", "instance", "layer", "none")
# Norms that scale whole maps, which work with any image size.
MAP_NORMS = ("batch", "group", "instance", "none")

# Groups of `norm="group"`, as in the papers on dataset condensation.
_GROUPS = 4

# Where the matrix product is faster: its cost grows with the width, and doubles in double precision.
_WIDEST_PRODUCT = 128
_PRODUCT_DTYPES = (torch.float32, torch.bfloat16)


class AveragePooling(nn.Module):
    """Average pooling over non-overlapping 2x2 patches, equal to ``F.avg_pool2d(maps, 2)`` up to rounding.

    On the CPU, maps of even height and width that are at most 128 wide are multiplied with a constant matrix, which is
    about twice as fast (even faster in bfloat16). A pixel that is not finite then spoils its whole row of patches.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Return the pooled maps."""
        height, width = maps.shape[-2:]
        fits = height % 2 == 0 and width % 2 == 0 and 0 < width <= _WIDEST_PRODUCT
        if not fits or maps.device.type != "cpu" or maps.dtype not in _PRODUCT_DTYPES:
            return F.avg_pool2d(maps, 2)
        # Two rows of the image are one row of the product. Building the matrix takes microseconds; a stored one would
        # have to follow the module's device and precision, and the torch modes in which it was built.
        halves = torch.eye(width // 2, dtype=maps.dtype) / 4
        matrix = halves.repeat_interleave(2, 0).repeat(2, 1)
        with torch.autocast("cpu", enabled=False):  # in the precision of the maps, like torch's pooling
            return maps.reshape(*maps.shape[:-2], height // 2, 2 * width) @ matrix


class ImageClassifier(nn.Module):
    """Base class of networks that compute features of the images and apply one linear layer."""

    features: nn.Sequential
    classifier: nn.Linear

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, channels, *image_size)``."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def make_norm(norm: str, channels: int, height: int, width: int) -> nn.Module | None:
    """Create a layer that normalises, scales and shifts maps ``(N, channels, height, width)``; None for ``"none"``.

    Raises:
        ValueError: for ``"group"``, the channels are not a multiple of 4; for ``"instance"``, the maps are single
            pixels, which it would set to zero.
    """
    if norm == "none":
        return None
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return nn.LayerNorm((channels, height, width))
    if norm == "group":
        if channels % _GROUPS:
            raise ValueError(f"Expected a multiple of {_GROUPS} channels for norm='group', but got {channels}.")
        return nn.GroupNorm(_GROUPS, channels)
    if height * width == 1:
        raise ValueError(
            "Expected `image_size` to leave more than one pixel to normalise for norm='instance', but got one. "
            "Use larger images or another norm."
        )
    return nn.GroupNorm(channels, channels)
