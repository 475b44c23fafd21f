"""The labelled data sets that torchvision downloads."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torchvision import datasets

from leakage.datamodules.benchmarks import fetch_split, open_split
from leakage.datamodules.images import data_folder
from leakage.datamodules.labelled import LabelledDataModule, LabelledTensors


class LabelledBenchmark(LabelledDataModule):
    """A data set of torchvision with its published training and test images; a subclass names it.

    Args:
        root: the folder that torchvision calls ``root``; by default the environment variable
            ``LEAKAGE_DATA``, else ``~/.cache/leakage``.
        download: fetch the data set if it is not there.
        batch_size: as for :class:`LabelledDataModule`.
        seed: as for :class:`LabelledDataModule`.

    Raises:
        ValueError: as :class:`LabelledDataModule`.
        FileNotFoundError: the data set is not there, and could not be downloaded.
    """

    dataset: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] | None = None,
        download: bool = True,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.root = data_folder(root)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is not there yet."""
        if self.download:
            for split in ("train", "test"):
                fetch_split(type(self).dataset, self.root, split)

    def load_images(self) -> tuple[LabelledTensors, LabelledTensors, tuple[str, ...]]:
        """All images as torchvision holds them, without decoding any."""
        train, test = (open_split(type(self).dataset, self.root, split) for split in ("train", "test"))
        # SVHN has no names: its classes are the digits.
        names = getattr(train, "classes", None) or [str(digit) for digit in range(10)]
        return _in_memory(train), _in_memory(test), tuple(names)


class MNIST(LabelledBenchmark):
    """Handwritten digits, 60,000 training and 10,000 test images of (1, 28, 28), 10 classes.

    Args:
        **kwargs: as for :class:`LabelledBenchmark`.

    References:
        LeCun et al., *Gradient-Based Learning Applied to Document Recognition*, 1998.

    Example:
        >>> MNIST(batch_size=64, seed=1).batch_size
        64
    """

    name = "mnist"
    dataset = datasets.MNIST
    statistics = ((0.1307,), (0.3081,))


class FashionMNIST(LabelledBenchmark):
    """Clothes, 60,000 training and 10,000 test images of (1, 28, 28), 10 classes.

    Args:
        **kwargs: as for :class:`LabelledBenchmark`.

    References:
        Xiao et al., *Fashion-MNIST*, 2017, https://arxiv.org/abs/1708.07747.
    """

    name = "fashion_mnist"
    dataset = datasets.FashionMNIST
    statistics = ((0.2861,), (0.3530,))


class CIFAR10(LabelledBenchmark):
    """Small photographs, 50,000 training and 10,000 test images of (3, 32, 32), 10 classes.

    Args:
        **kwargs: as for :class:`LabelledBenchmark`.

    References:
        Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """

    name = "cifar10"
    dataset = datasets.CIFAR10
    statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


class CIFAR100(LabelledBenchmark):
    """Small photographs, 50,000 training and 10,000 test images of (3, 32, 32), 100 classes.

    Args:
        **kwargs: as for :class:`LabelledBenchmark`.

    References:
        Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """

    name = "cifar100"
    dataset = datasets.CIFAR100
    statistics = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))


class SVHN(LabelledBenchmark):
    """House numbers, 73,257 training and 26,032 test images of (3, 32, 32), 10 classes.

    Args:
        **kwargs: as for :class:`LabelledBenchmark`.

    References:
        Netzer et al., *Reading Digits in Natural Images with Unsupervised Feature Learning*, 2011.
    """

    name = "svhn"
    dataset = datasets.SVHN
    statistics = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


def _in_memory(opened: Any) -> LabelledTensors:
    """A data set of torchvision as tensors: MNIST holds (M, H, W), CIFAR (M, H, W, C), SVHN (M, C, H, W)."""
    images = torch.as_tensor(opened.data)
    if images.dim() == 3:
        images = images[:, None]
    elif images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = opened.labels if hasattr(opened, "labels") else opened.targets
    return LabelledTensors(images=images.contiguous(), labels=torch.as_tensor(labels, dtype=torch.int64))
