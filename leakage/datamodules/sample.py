"""The bundled sample."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

# One row per class, one column per image; see fashion_mnist_sample.LICENSE.txt.
_SHEET = Path(__file__).with_name("fashion_mnist_sample.png")


def read_sheet() -> Tensor:
    """The bundled images class by class, uint8 ``(10, 100, 1, 28, 28)``."""
    with Image.open(_SHEET) as sheet:
        images: Tensor = pil_to_tensor(sheet)
    return images.unfold(1, 28, 28).unfold(2, 28, 28).reshape(10, 100, 1, 28, 28)
