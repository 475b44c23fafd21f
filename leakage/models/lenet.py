"""The LeNet of DLG and iDLG."""

from __future__ import annotations

import math

import torch
from torch import nn

from leakage.errors import check_choice, check_count, check_image_size
from leakage.models.layers import ACTIVATIONS, ImageClassifier


class LeNet(ImageClassifier):
    """The LeNet of DLG and iDLG: small, smooth and easy to invert.

    Three 5x5 convolutions of ``width`` channels (padding 2; strides 2, 2, 1), each followed by a sigmoid, then one
    linear layer. Every weight and bias is drawn from the uniform distribution on ``[-0.5, 0.5]``. The sigmoid matters:
    the attacks differentiate the gradient, and a ReLU's second derivative is zero almost everywhere. With an unbounded
    activation, the same weights give far larger features, and so far larger logits and gradients.

    Shapes: images ``(N, channels, *image_size)``, values in [0, 1]; logits ``(N, num_classes)``.

    Args:
        channels, image_size, num_classes: as for :class:`ConvNet`.
        width: channels of each convolution.
        activation: ``"sigmoid"`` as published, ``"relu"``, ``"leaky_relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.

    Raises:
        ValueError: a size or count is not a whole number of at least 1, or the activation is unknown.

    References:
        Zhu et al., *Deep Leakage from Gradients*, NeurIPS 2019, https://arxiv.org/abs/1906.08935;
        Zhao et al., *iDLG*, 2020, https://arxiv.org/abs/2001.02610.

    Example:
        >>> LeNet(channels=3, image_size=32)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        num_classes: int = 10,
        width: int = 12,
        *,
        activation: str = "sigmoid",
    ) -> None:
        super().__init__()
        check_count(channels=channels, num_classes=num_classes, width=width)
        check_choice("activation", activation, ACTIVATIONS)
        height, breadth = check_image_size(image_size)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            ACTIVATIONS[activation](),
            nn.Conv2d(width, width, 5, stride=2, padding=2),
            ACTIVATIONS[activation](),
            nn.Conv2d(width, width, 5, stride=1, padding=2),
            ACTIVATIONS[activation](),
        )
        self.classifier = nn.Linear(width * math.ceil(height / 4) * math.ceil(breadth / 4), num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every weight and bias anew from the uniform distribution on [-0.5, 0.5]."""
        for parameter in self.parameters():
            parameter.uniform_(-0.5, 0.5)
