"""The ConvNet of dataset condensation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from leakage.errors import check_choice, check_count
from leakage.models.layers import ACTIVATIONS, NORMS, AveragePooling, ImageClassifier, convolutions

_POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "average": AveragePooling,
    "max": lambda: nn.MaxPool2d(2),
    "none": nn.Identity,
}


class ConvNet(ImageClassifier):
    """ConvNet-3: the network that images are condensed with, and judged by.

    ``depth`` blocks of a 3x3 convolution with ``width`` channels, a norm, an activation and 2x2
    pooling, then one linear layer. Sides of 28 pixels are padded to 32 by the first convolution.
    The defaults are the paper's: 317,706 parameters for images of (1, 28, 28) and 10 classes,
    320,010 for (3, 32, 32). Weights are drawn as torch draws those of each layer.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels: channels of the images.
        image_size: height and width in pixels; one number for square images.
        num_classes: number of logits.
        width: channels of each convolution.
        depth: number of blocks.
        norm: ``"instance"`` (each map of each image), ``"group"`` (4 groups of maps), ``"layer"``
            (all maps of an image), ``"batch"`` or ``"none"``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"sigmoid"`` or ``"silu"``.
        pooling: ``"average"``, ``"max"`` or ``"none"``.

    Raises:
        ValueError: a size or count that is not a whole number of at least 1, an unknown norm,
            activation or pooling, images that the pooling leaves nothing of, or a width that
            4 groups do not divide.

    References:
        Zhao, Mopuri, Bilen, *Dataset Condensation with Gradient Matching*, ICLR 2021,
        https://arxiv.org/abs/2006.05929; Gidaris and Komodakis, *Dynamic Few-Shot Visual Learning
        without Forgetting*, CVPR 2018, https://arxiv.org/abs/1804.09458.

    Example:
        >>> import torch
        >>> model = ConvNet(channels=1, image_size=28, num_classes=10)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in model.parameters())
        317706
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        *,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        activation: str = "relu",
        pooling: str = "average",
    ) -> None:
        super().__init__()
        check_count(channels=channels, num_classes=num_classes, width=width, depth=depth)
        check_choice("norm", norm, NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("pooling", pooling, _POOLINGS)
        blocks = [(width, 3, pooling != "none")] * depth
        self.features, features = convolutions(
            blocks, channels, image_size, norm=norm, activation=activation, pooling=_POOLINGS[pooling]
        )
        self.classifier = nn.Linear(features, num_classes)
