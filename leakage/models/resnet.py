"""ResNet-18 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from leakage.errors import check_choice, check_count, check_image_size
from leakage.models.draw import reset
from leakage.models.layers import ACTIVATIONS, MAP_NORMS, make_norm


class ResNet18(nn.Module):
    """ResNet-18 in the small form of dataset condensation: torchvision's blocks behind a stem for small images.

    The first convolution is 3x3 with stride 1, and no pooling follows it; the four stages of two
    blocks halve the maps three times, and the means over the last ones go into one linear layer.
    Images of any size fit. 11,172,810 parameters for images of one channel and 10 classes. Weights
    are drawn as torch draws those of each layer, not as torchvision does.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels, image_size, num_classes: as for :class:`ConvNet`.
        norm: behind each convolution, ``"instance"``, ``"group"`` (4 groups), ``"batch"`` or ``"none"``.
        activation: ``"relu"`` as published, ``"leaky_relu"``, ``"sigmoid"`` or ``"silu"``.

    Raises:
        ValueError: a size or count that is not a whole number of at least 1, an unknown norm or activation, or images
            of at most 8 x 8 pixels with ``norm="instance"``, whose last maps are one pixel.

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
        super().__init__()
        check_count(channels=channels, num_classes=num_classes)
        check_choice("norm", norm, MAP_NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        # of the last maps: if these can be normalised, the larger ones can
        height, width = (-(-side // 8) for side in check_image_size(image_size))

        def normalise(channels: int) -> nn.Module:
            return make_norm(norm, channels, height, width) or nn.Identity()  # the blocks call it in any case

        from torchvision.models.resnet import BasicBlock, ResNet  # here: it takes a second, and `leakage` imports us

        network = ResNet(BasicBlock, [2, 2, 2, 2], norm_layer=normalise)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            normalise(64),
            ACTIVATIONS[activation](),
            *(network.layer1, network.layer2, network.layer3, network.layer4),
        )
        self.classifier = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, BasicBlock):
                module.relu = ACTIVATIONS[activation]()  # torchvision's works in place
        self.apply(reset)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, channels, *image_size)``."""
        logits: Tensor = self.classifier(self.features(images).mean((-2, -1)))
        return logits
