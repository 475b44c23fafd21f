"""The multilayer perceptron of dataset condensation."""

from __future__ import annotations

from torch import Tensor, nn

from leakage.errors import check_choice, check_count, check_image_size
from leakage.models.layers import ACTIVATIONS


class MLP(nn.Module):
    """A multilayer perceptron: linear layers with activations between them.

    By default, it has two hidden layers of 128 units, and 118,282 parameters for images of (1, 28, 28) and 10 classes.
    Weights are drawn by torch's defaults.

    Shapes: images ``(N, channels, *image_size)``, normalised; logits ``(N, num_classes)``.

    Args:
        channels, image_size, num_classes: as for :class:`ConvNet`.
        width: number of units of each hidden layer.
        depth: number of linear layers, including the one for the logits.
        activation: ``"relu"`` as published, ``"leaky_relu"``, ``"gelu"``, ``"silu"``, ``"sigmoid"`` or ``"tanh"``.

    Raises:
        ValueError: a size or count is not a whole number of at least 1, or the activation is unknown.

    References:
        Zhao, Mopuri, Bilen, *Dataset Condensation with Gradient Matching*, ICLR 2021, https://arxiv.org/abs/2006.05929.

    Example:
        >>> import torch
        >>> MLP(channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        *,
        width: int = 128,
        depth: int = 3,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        check_count(channels=channels, num_classes=num_classes, width=width, depth=depth)
        check_choice("activation", activation, ACTIVATIONS)
        height, breadth = check_image_size(image_size)
        units = channels * height * breadth
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [nn.Linear(units, width), ACTIVATIONS[activation]()]
            units = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(units, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, channels, *image_size)``."""
        logits: Tensor = self.classifier(self.features(images.flatten(1)))
        return logits
