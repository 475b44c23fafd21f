"""Initial images of a condensation."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.condensation.decoding import check_factor, encode
from leakage.condensation.kmeans import kmeans_images
from leakage.condensation.synthetic_set import random_images
from leakage.datamodules.labelled import LabelledImages
from leakage.seeds import derive_seed

_REAL = {"real": random_images, "kmeans": kmeans_images}


def start_images(
    data: LabelledImages, images_per_class: int, initialization: str, seed: int, factor: int = 1
) -> Tensor:
    """Return the normalised initial images ``(K * images_per_class, C, H, W)``, class by class.

    ``"noise"`` draws from N(0, 1), ``"real"`` takes random images of the class, and ``"kmeans"`` those of
    :func:`~leakage.condensation.kmeans_images`. With a ``factor`` above 1 each holds ``factor**2`` real images.
    """
    check_factor(factor, data.image_shape)
    start = derive_seed(seed, 0, "start")
    if initialization in _REAL:
        return encode(_REAL[initialization](data, images_per_class * factor**2, start).normalised(), factor)
    generator = torch.Generator().manual_seed(start)
    return torch.randn(data.num_classes * images_per_class, *data.image_shape, generator=generator)
