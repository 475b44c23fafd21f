"""The bundled sample."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from leakage.datamodules.images import ImageVictims, LabelledImages

# One row per class, one column per image; see fashion_mnist_sample.LICENSE.txt.
_SHEET = Path(__file__).with_name("fashion_mnist_sample.png")


class SampleVictims(ImageVictims):
    """The bundled sample: 1,000 FashionMNIST test images of (1, 28, 28), the first 100 of each class.

    Needs no network and no data folder.

    Args:
        **kwargs: as for :class:`~leakage.datamodules.images.ImageVictims`.

    References:
        Xiao et al., *Fashion-MNIST*, 2017, https://arxiv.org/abs/1708.07747.

    Example:
        >>> data = SampleVictims(victims=3)
        >>> data.setup("fit")
        >>> shared = data.share(range(3))
        >>> len(shared), shared.labels
        (3, None)
    """

    def open_images(self) -> tuple[LabelledImages, int]:
        """The images of the sheet, class by class."""
        images = read_sheet().flatten(0, 1).float() / 255
        return TensorDataset(images, torch.arange(10).repeat_interleave(100)), 10


def read_sheet() -> Tensor:
    """The bundled images class by class, uint8 ``(10, 100, 1, 28, 28)``."""
    with Image.open(_SHEET) as sheet:
        images: Tensor = pil_to_tensor(sheet)
    return images.unfold(1, 28, 28).unfold(2, 28, 28).reshape(10, 100, 1, 28, 28)
