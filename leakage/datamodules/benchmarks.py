"""The data sets that torchvision downloads."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torchvision import datasets
from torchvision.transforms.functional import to_tensor

from leakage.datamodules.images import ImageVictims, LabelledImages, data_folder
from leakage.errors import check_choice


class BenchmarkVictims(ImageVictims):
    """Victims of a torchvision data set; a subclass names it.

    Args:
        root: the folder that torchvision calls ``root``; by default the environment variable
            ``LEAKAGE_DATA``, else ``~/.cache/leakage``.
        split: ``"train"`` or ``"test"``.
        download: fetch the data set if it is not there.
        **kwargs: as for :class:`~leakage.datamodules.images.ImageVictims`.

    Raises:
        ValueError: an unknown split, and as :class:`~leakage.datamodules.images.ImageVictims`.
        FileNotFoundError: the data set is not there, and could not be downloaded.
    """

    dataset: ClassVar[Callable[..., Any]]
    num_classes: ClassVar[int] = 10

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] | None = None,
        split: str = "train",
        download: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("split", split, ("train", "test"))
        self.root = data_folder(root)
        self.split = split
        self.download = download

    def prepare_data(self) -> None:
        """Download what is not there yet."""
        if self.download:
            fetch_split(type(self).dataset, self.root, self.split)

    def open_images(self) -> tuple[LabelledImages, int]:
        """The images as torchvision reads them, and the number of classes."""
        return open_split(type(self).dataset, self.root, self.split, transform=to_tensor), self.num_classes

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """As in the base class, with the split."""
        return super().configuration | {"split": self.split}


class MNISTVictims(BenchmarkVictims):
    """Handwritten digits, 60,000 training and 10,000 test images of (1, 28, 28), 10 classes.

    Args:
        **kwargs: as for :class:`BenchmarkVictims`.

    References:
        LeCun et al., *Gradient-Based Learning Applied to Document Recognition*, 1998.

    Example:
        >>> data = MNISTVictims(victims=1000, seed=0)
        >>> data.victims
        1000
    """

    dataset = datasets.MNIST


class FashionMNISTVictims(BenchmarkVictims):
    """Clothes, 60,000 training and 10,000 test images of (1, 28, 28), 10 classes.

    Args:
        **kwargs: as for :class:`BenchmarkVictims`.

    References:
        Xiao et al., *Fashion-MNIST*, 2017, https://arxiv.org/abs/1708.07747.
    """

    dataset = datasets.FashionMNIST


class CIFAR10Victims(BenchmarkVictims):
    """Small photographs, 50,000 training and 10,000 test images of (3, 32, 32), 10 classes.

    Args:
        **kwargs: as for :class:`BenchmarkVictims`.

    References:
        Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """

    dataset = datasets.CIFAR10


class CIFAR100Victims(BenchmarkVictims):
    """Small photographs, 50,000 training and 10,000 test images of (3, 32, 32), 100 classes.

    Args:
        **kwargs: as for :class:`BenchmarkVictims`.

    References:
        Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """

    dataset = datasets.CIFAR100
    num_classes = 100


class SVHNVictims(BenchmarkVictims):
    """House numbers, 73,257 training and 26,032 test images of (3, 32, 32), 10 classes.

    Args:
        **kwargs: as for :class:`BenchmarkVictims`.

    References:
        Netzer et al., *Reading Digits in Natural Images with Unsupervised Feature Learning*, 2011.
    """

    dataset = datasets.SVHN


def open_split(dataset: Callable[..., Any], root: Path, split: str, **options: Any) -> Any:
    """A data set of torchvision.

    Args:
        dataset: its class.
        root: the folder that torchvision calls ``root``.
        split: ``"train"`` or ``"test"``.
        options: for the class, such as ``transform`` or ``download``.

    Raises:
        FileNotFoundError: it is not there, is damaged, or could not be downloaded.
    """
    which = {"split": split} if dataset is datasets.SVHN else {"train": split == "train"}
    try:
        return dataset(root, **which, **options)
    except Exception as error:  # torchvision raises many kinds, down to AssertionError for a damaged file
        raise FileNotFoundError(
            f"Expected the {split} split of {dataset.__name__} in '{root}', but got: {error}. "
            "Say where the data set lies with `root` or the environment variable LEAKAGE_DATA, or let "
            "`download=True` fetch it where there is a network (the bundled sample needs neither)."
        ) from error


def fetch_split(dataset: Callable[..., Any], root: Path, split: str) -> None:
    """Download a data set of torchvision unless it is there.

    Args:
        dataset: as for :func:`open_split`.
        root: as for :func:`open_split`.
        split: as for :func:`open_split`.

    Raises:
        FileNotFoundError: it could not be downloaded.
    """
    with suppress(FileNotFoundError):
        open_split(dataset, root, split)
        return
    open_split(dataset, root, split, download=True)
