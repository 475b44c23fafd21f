"""ResNets for small images: a stem of one convolution, followed by torchvision's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from leakage.errors import check_choice, check_count, check_image_size
from leakage.models.draw import reset
from leakage.models.layers import ACTIVATIONS, MAP_NORMS, make_norm


class _ResNet(nn.Module):
    """A 3x3 convolution, stages of blocks, each with twice the channels and half the side, and one linear layer."""

    def __init__(
        self,
        stages: Sequence[int],
        width: int,
        channels: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        norm: str,
        activation: str,
    ) -> None:
        super().__init__()
        check_count(channels=channels, num_classes=num_classes, width=width)
        check_choice("norm", norm, MAP_NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        # Sides of the last maps: if these can be normalised, larger ones can be too.
        halved = 2 ** (len(stages) - 1)
        last = [-(-side // halved) for side in check_image_size(image_size)]

        def normalise(channels: int) -> nn.Module:
            return make_norm(norm, channels, *last) or nn.Identity()  # the blocks always call a norm

        from torchvision.models.resnet import BasicBlock  # imported here, as it takes a second

        layers = [nn.Conv2d(channels, width, 3, padding=1, bias=False), normalise(width), ACTIVATIONS[activation]()]
        inputs, outputs = width, width
        for stage, count in enumerate(stages):
            blocks = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False), normalise(outputs)
                changed = stride != 1 or inputs != outputs
                downsample = nn.Sequential(*shortcut) if changed else None
                blocks.append(BasicBlock(inputs, outputs, stride, downsample, norm_layer=normalise))
                blocks[-1].relu = ACTIVATIONS[activation]()  # torchvision's works in place
                inputs = outputs
            layers.append(nn.Sequential(*blocks))
            outputs *= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)
        self.apply(reset)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, channels, *image_size)``."""
        logits: Tensor = self.classifier(self.features(images).mean((-2, -1)))
        return logits


class ResNet18(_ResNet):
    """ResNet-18 in the small form of dataset condensation: torchvision's blocks after a stem for small images.

    The first convolution is 3x3 with stride 1, without pooling after it. The four stages of two blocks halve the maps
    three times, and the means over the last maps go into one linear layer. Images of any size are accepted. The network
    has 11,172,810 parameters for images of one channel and 10 classes. Weights are drawn by torch's defaults, not by
    torchvision's.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels, image_size, num_classes: as for :class:`ConvNet`.
        norm: after each convolution, ``"instance"``, ``"group"`` (4 groups), ``"batch"`` or ``"none"``.
        activation: ``"relu"`` as published, ``"leaky_relu"``, ``"gelu"``, ``"silu"``, ``"sigmoid"`` or ``"tanh"``.

    Raises:
        ValueError: a size or count is not a whole number of at least 1, the norm or activation is unknown, or images
            are at most 8 x 8 pixels with ``norm="instance"``, where the last maps are one pixel.

    References:
        He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016,
        https://arxiv.org/abs/1512.03385; the small form: Zhao, Mopuri, Bilen, *Dataset
        Condensation with Gradient Matching*, ICLR 2021, https://arxiv.org/abs/2006.05929.

    Example:
        >>> import torch
        >>> ResNet18(channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape
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
        super().__init__((2, 2, 2, 2), 64, channels, image_size, num_classes, norm, activation)


class ResNet20(_ResNet):
    """ResNet-20, the small network of the ResNet paper for CIFAR: three stages of three blocks.

    With ``width=64`` it is the ResNet20-4 of Inverting Gradients. Where a stage changes the shape, the shortcut is a
    1x1 convolution, as in that paper; He et al. pad the channels with zeros. The network has 272,474 parameters for
    images of three channels and 10 classes, and 4,327,754 with ``width=64``. Weights are drawn by torch's defaults.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels, image_size, num_classes: as for :class:`ConvNet`.
        width: channels of the first stage; the others have two and four times as many.
        norm: after each convolution, ``"batch"`` as published, ``"instance"``, ``"group"`` (4 groups) or ``"none"``.
        activation: ``"relu"`` as published, ``"leaky_relu"``, ``"gelu"``, ``"silu"``, ``"sigmoid"`` or ``"tanh"``.

    Raises:
        ValueError: a size or count is not a whole number of at least 1, the norm or activation is unknown, or images
            are at most 4 x 4 pixels with ``norm="instance"``, where the last maps are one pixel.

    References:
        He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016,
        https://arxiv.org/abs/1512.03385; Geiping et al., *Inverting Gradients*, NeurIPS 2020,
        https://arxiv.org/abs/2003.14053.

    Example:
        >>> import torch
        >>> ResNet20(channels=3, image_size=32).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        *,
        width: int = 16,
        norm: str = "batch",
        activation: str = "relu",
    ) -> None:
        super().__init__((3, 3, 3), width, channels, image_size, num_classes, norm, activation)
