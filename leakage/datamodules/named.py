"""A data set that is given by its name or its folder, as scripts are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from leakage.datamodules.benchmarks import (
    CIFAR10Victims,
    CIFAR100Victims,
    FashionMNISTVictims,
    MNISTVictims,
    SVHNVictims,
)
from leakage.datamodules.image_folder import ImageFolderVictims, LFWVictims
from leakage.datamodules.images import ImageVictims
from leakage.datamodules.labelled import LabelledDataModule
from leakage.datamodules.labelled_benchmarks import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from leakage.datamodules.labelled_folder import ImageFolder, Sample
from leakage.datamodules.sample import SampleVictims

DataModule = TypeVar("DataModule", ImageVictims, LabelledDataModule)

# Names of data sets, as scripts take them: victims of them,
DATASETS: dict[str, type[ImageVictims]] = {
    "mnist": MNISTVictims,
    "fashion_mnist": FashionMNISTVictims,
    "cifar10": CIFAR10Victims,
    "cifar100": CIFAR100Victims,
    "svhn": SVHNVictims,
    "lfw": LFWVictims,
    "sample": SampleVictims,
}
# and all of their images. (Most persons of LFW have a single image, so none to learn from and one to test with.)
LABELLED_DATASETS: dict[str, type[LabelledDataModule]] = {
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "svhn": SVHN,
    "sample": Sample,
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
        options: for the DataModule: ``victims``, ``seed``, ``lanes`` and its further ones.

    Returns:
        The name, for a folder its own, and the DataModule.

    Raises:
        ValueError: no such name or folder, or an option that the data set does not take.

    Example:
        >>> victims_named("sample", victims=3)[1].victims
        3
    """
    return _named(dataset, DATASETS, ImageFolderVictims, {"root": root, "image_size": image_size}, options)


def images_named(
    dataset: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    **options: Any,
) -> tuple[str, LabelledDataModule]:
    """What to call a data set, and all of its images with their labels.

    Args:
        dataset: one of :data:`LABELLED_DATASETS`, or a folder of images in ImageFolder layout.
        root: as for :func:`victims_named`.
        image_size: as for :func:`victims_named`.
        options: for the DataModule: ``batch_size``, ``seed`` and its further ones.

    Returns:
        The name, for a folder its own, and the DataModule.

    Raises:
        ValueError: as :func:`victims_named`.

    Example:
        >>> images_named("sample", batch_size=8)[1].batch_size
        8
    """
    return _named(dataset, LABELLED_DATASETS, ImageFolder, {"root": root, "image_size": image_size}, options)


def _named(
    dataset: str,
    known: Mapping[str, type[DataModule]],
    of_folder: Callable[..., DataModule],
    place_and_size: dict[str, Any],
    options: dict[str, Any],
) -> tuple[str, DataModule]:
    folder = Path(dataset).expanduser()
    is_folder = dataset not in known
    if is_folder and not folder.is_dir():
        raise ValueError(f"Expected `dataset` to be one of {list(known)} or a folder of images, but got {dataset!r}.")
    takes = {"root": not is_folder and dataset != "sample", "image_size": is_folder or dataset == "lfw"}
    for name, value in place_and_size.items():
        if value is None:
            continue
        if not takes[name]:
            raise ValueError(f"Expected no `{name}` with {dataset!r}, but got {value}.")
        options[name] = value
    if is_folder:
        return folder.resolve().name, of_folder(folder, **options)
    return dataset, known[dataset](**options)
