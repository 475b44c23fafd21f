"""Victims of a data set that is given by its name or its folder, as scripts are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from leakage.datamodules.benchmarks import (
    CIFAR10Victims,
    CIFAR100Victims,
    FashionMNISTVictims,
    MNISTVictims,
    SVHNVictims,
)
from leakage.datamodules.image_folder import ImageFolderVictims, LFWVictims
from leakage.datamodules.images import ImageVictims
from leakage.datamodules.sample import SampleVictims

# Names of data sets, as scripts take them.
DATASETS: dict[str, type[ImageVictims]] = {
    "mnist": MNISTVictims,
    "fashion_mnist": FashionMNISTVictims,
    "cifar10": CIFAR10Victims,
    "cifar100": CIFAR100Victims,
    "svhn": SVHNVictims,
    "lfw": LFWVictims,
    "sample": SampleVictims,
}


def victims_named(
    dataset: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    **options: Any,
) -> tuple[str, ImageVictims]:
    """What to call a data set, and victims of it.

    Args:
        dataset: one of :data:`DATASETS`, or a folder of images in ImageFolder layout.
        root: where the named data set lies; as the DataModule's own default if it is None.
        image_size: scale and crop a folder's images to this height and width.
        options: for the DataModule: ``victims``, ``seed``, ``batch_size`` and its further ones.

    Returns:
        The name, for a folder its own, and the DataModule.

    Raises:
        ValueError: no such name or folder, or an option that the data set does not take.

    Example:
        >>> victims_named("sample", victims=3)[1].victims
        3
    """
    known = DATASETS.get(dataset)
    folder = Path(dataset).expanduser()
    if known is None and not folder.is_dir():
        raise ValueError(
            f"Expected `dataset` to be one of {list(DATASETS)} or a folder of images, but got {dataset!r}."
        )
    takes = {
        "root": known is not None and known is not SampleVictims,
        "image_size": known is None or known is LFWVictims,
    }
    for name, value in (("root", root), ("image_size", image_size)):
        if value is None:
            continue
        if not takes[name]:
            raise ValueError(f"Expected no `{name}` with {dataset!r}, but got {value}.")
        options[name] = value
    if known is not None:
        return dataset, known(**options)
    return folder.resolve().name, ImageFolderVictims(folder, **options)
