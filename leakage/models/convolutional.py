"""Convolutions and one linear layer: the ConvNet, AlexNet and VGG11 of dataset condensation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from leakage.errors import check_choice, check_count, check_image_size
from leakage.models.layers import ACTIVATIONS, MAP_NORMS, NORMS, AveragePooling, ImageClassifier, make_norm

_POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "average": AveragePooling,
    "max": lambda: nn.MaxPool2d(2),
    "none": nn.Identity,
}
# Channels and kernel size of each convolution, and whether pooling follows.
_ALEXNET = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))
_VGG11 = (
    *((64, 3, True), (128, 3, True), (256, 3, False), (256, 3, True)),
    *((512, 3, False), (512, 3, True), (512, 3, False), (512, 3, True)),
)


class _Convolutional(ImageClassifier):
    """Blocks of convolution, norm, activation and optional pooling; the first pads sides of 28 pixels to 32."""

    def __init__(
        self,
        blocks: Sequence[tuple[int, int, bool]],
        channels: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        *,
        norm: str,
        norms: Iterable[str] = MAP_NORMS,
        activation: str = "relu",
        pooling: str = "max",
    ) -> None:
        super().__init__()
        check_count(channels=channels, num_classes=num_classes)
        check_choice("norm", norm, norms)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("pooling", pooling, _POOLINGS)
        height, width = check_image_size(image_size)
        more = 2 * (height == 28), 2 * (width == 28)
        height, width = height + 2 * more[0], width + 2 * more[1]
        smallest = 2 ** sum(pools for _, _, pools in blocks)
        if min(height, width) < smallest:
            raise ValueError(
                f"Expected `image_size` of at least {smallest} pixels a side for this network, but got {image_size}."
            )
        layers: list[nn.Module] = []
        for maps, kernel_size, pools in blocks:
            same = kernel_size // 2
            padding = same if layers else (same + more[0], same + more[1])
            layers.append(nn.Conv2d(channels, maps, kernel_size, padding=padding))
            normalise = make_norm(norm, maps, height, width)
            layers += [] if normalise is None else [normalise]
            layers.append(ACTIVATIONS[activation]())
            channels = maps
            if pools:
                layers.append(_POOLINGS[pooling]())
                height, width = height // 2, width // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * width, num_classes)


class ConvNet(_Convolutional):
    """ConvNet-3, the standard network for condensing data sets and for testing condensed ones.

    It has ``depth`` blocks of a 3x3 convolution with ``width`` channels, a norm, an activation and 2x2 pooling, then
    one linear layer. The first convolution pads sides of 28 pixels to 32. The defaults are those of the paper: 317,706
    parameters for images of (1, 28, 28) and 10 classes, 320,010 for (3, 32, 32). Weights are drawn by torch's defaults.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels: number of channels of the images.
        image_size: height and width in pixels; one number for square images.
        num_classes: number of logits.
        width: number of channels of each convolution.
        depth: number of blocks.
        norm: ``"instance"`` (each map of each image), ``"group"`` (4 groups of maps), ``"layer"``
            (all maps of an image), ``"batch"`` or ``"none"``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"gelu"``, ``"silu"``, ``"sigmoid"`` or ``"tanh"``.
        pooling: ``"average"``, ``"max"`` or ``"none"``.

    Raises:
        ValueError: a size or count is not a whole number of at least 1; the norm, activation or pooling is unknown; the
            images are too small for the poolings; or 4 groups do not divide the width.

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
        check_count(width=width, depth=depth)
        blocks = [(width, 3, pooling != "none")] * depth
        options = {"norm": norm, "activation": activation, "pooling": pooling}
        super().__init__(blocks, channels, image_size, num_classes, norms=NORMS, **options)


class AlexNet(_Convolutional):
    """AlexNet in the small form of dataset condensation: five convolutions, three poolings, one linear layer.

    The convolutions have 128, 192, 256, 192 and 192 channels (5x5, 5x5, then 3x3; stride 1), each followed by ReLU;
    2x2 max-pooling follows the first, second and fifth. The network has 1,865,802 parameters for images of (1, 28, 28)
    and 10 classes. Padding, weights and shapes are as in :class:`ConvNet`.

    Args:
        channels, image_size, num_classes: as for :class:`ConvNet`; sides of at least 8 pixels.
        norm: ``"none"`` as published, ``"instance"``, ``"group"`` (4 groups) or ``"batch"``.

    Raises:
        ValueError: a size or count is not a whole number of at least 1, images are below 8 pixels, or the norm is
            unknown.

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
        super().__init__(_ALEXNET, channels, image_size, num_classes, norm=norm)


class VGG11(_Convolutional):
    """VGG11 in the small form of dataset condensation: eight convolutions, five poolings, one linear layer.

    The 3x3 convolutions have 64, 128, twice 256 and four times 512 channels, each followed by norm and activation; 2x2
    max-pooling follows the first, second, fourth, sixth and eighth. The network has 9,229,962 parameters for images of
    (1, 28, 28) and 10 classes. Padding, weights and shapes are as in :class:`ConvNet`.

    Args:
        channels, image_size, num_classes: as for :class:`ConvNet`; sides of 28 or at least 32 pixels.
        norm: ``"instance"``, ``"group"`` (4 groups), ``"batch"`` or ``"none"``.
        activation: ``"relu"`` as published, ``"leaky_relu"``, ``"gelu"``, ``"silu"``, ``"sigmoid"`` or ``"tanh"``.

    Raises:
        ValueError: a size or count is not a whole number of at least 1, images are below 28 pixels, or the norm or
            activation is unknown.

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
        super().__init__(_VGG11, channels, image_size, num_classes, norm=norm, activation=activation)
