"""VGG11 for small images."""

from __future__ import annotations

from torch import nn

from leakage.errors import check_choice, check_count
from leakage.models.layers import (
    ACTIVATIONS,
    ImageClassifier,
    check_map_norm,
    convolutions,
)

# Channels and kernel size of each convolution, and whether pooling follows.
_BLOCKS = (
    *((64, 3, True), (128, 3, True), (256, 3, False), (256, 3, True)),
    *((512, 3, False), (512, 3, True), (512, 3, False), (512, 3, True)),
)


class VGG11(ImageClassifier):
    """VGG11 in the small form of dataset condensation: eight convolutions, five poolings, one linear layer.

    3x3 convolutions of 64, 128, twice 256 and four times 512 channels, each with norm and activation;
    2x2 max-pooling behind the first, second, fourth, sixth and eighth. Sides of 28 pixels are
    padded to 32 by the first convolution. 9,229,962 parameters for images of (1, 28, 28) and 10
    classes. Weights are drawn as torch draws those of each layer.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels: channels of the images.
        image_size: height and width in pixels, 28 or at least 32; one number for square images.
        num_classes: number of logits.
        norm: behind each convolution, ``"instance"``, ``"group"`` (4 groups), ``"batch"`` or ``"none"``.
        activation: ``"relu"`` as published, ``"leaky_relu"``, ``"sigmoid"`` or ``"silu"``.

    Raises:
        ValueError: a size or count that is not a whole number of at least 1, images below 28
            pixels, or an unknown norm or activation.

    References:
        Simonyan and Zisserman, *Very Deep Convolutional Networks for Large-Scale Image
        Recognition*, ICLR 2015, https://arxiv.org/abs/1409.1556; the small form: Zhao, Mopuri,
        Bilen, *Dataset Condensation with Gradient Matching*, ICLR 2021, https://arxiv.org/abs/2006.05929.

    Example:
        >>> import torch
        >>> VGG11(channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        *,
        norm: str = "instance",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        check_count(channels=channels, num_classes=num_classes)
        check_map_norm(norm)
        check_choice("activation", activation, ACTIVATIONS)
        self.features, features = convolutions(_BLOCKS, channels, image_size, norm=norm, activation=activation)
        self.classifier = nn.Linear(features, num_classes)
