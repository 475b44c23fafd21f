"""AlexNet for small images."""

from __future__ import annotations

from torch import nn

from leakage.errors import check_count
from leakage.models.layers import ImageClassifier, check_map_norm, convolutions

# Channels and kernel size of each convolution, and whether pooling follows.
_BLOCKS = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))


class AlexNet(ImageClassifier):
    """AlexNet in the small form of dataset condensation: five convolutions, three poolings, one linear layer.

    Convolutions of 128, 192, 256, 192 and 192 channels (5x5, 5x5, then 3x3; stride 1), ReLU, 2x2
    max-pooling behind the first, second and fifth. Sides of 28 pixels are padded to 32 by the
    first convolution. 1,865,802 parameters for images of (1, 28, 28) and 10 classes. Weights are
    drawn as torch draws those of each layer.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels: channels of the images.
        image_size: height and width in pixels, at least 8; one number for square images.
        num_classes: number of logits.
        norm: behind each convolution, ``"none"`` as published, ``"instance"``, ``"group"``
            (4 groups) or ``"batch"``.

    Raises:
        ValueError: a size or count that is not a whole number of at least 1, images below 8
            pixels, or an unknown norm.

    References:
        Krizhevsky, Sutskever, Hinton, *ImageNet Classification with Deep Convolutional Neural
        Networks*, NeurIPS 2012; the small form: Zhao, Mopuri, Bilen, *Dataset Condensation with
        Gradient Matching*, ICLR 2021, https://arxiv.org/abs/2006.05929.

    Example:
        >>> import torch
        >>> AlexNet(channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        *,
        norm: str = "none",
    ) -> None:
        super().__init__()
        check_count(channels=channels, num_classes=num_classes)
        check_map_norm(norm)
        self.features, features = convolutions(_BLOCKS, channels, image_size, norm=norm)
        self.classifier = nn.Linear(features, num_classes)
