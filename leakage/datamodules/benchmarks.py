"""The data sets that torchvision downloads, and the bundled sample."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

# The bundled sample: one row per class, one column per image; see fashion_mnist_sample.LICENSE.txt.
_SHEET = Path(__file__).with_name("fashion_mnist_sample.png")


@dataclass(frozen=True)
class Benchmark:
    """A torchvision data set, with the mean and standard deviation per channel that papers normalise with."""

    kind: Callable[..., Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


BENCHMARKS = {
    "mnist": Benchmark(datasets.MNIST, (0.1307,), (0.3081,)),
    "fashion_mnist": Benchmark(datasets.FashionMNIST, (0.2861,), (0.3530,)),
    "cifar10": Benchmark(datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Benchmark(datasets.CIFAR100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Benchmark(datasets.SVHN, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


def data_folder(root: str | os.PathLike[str] | None) -> Path:
    """Return ``root``, else the environment variable ``LEAKAGE_DATA``, else ``~/.cache/leakage``."""
    return Path(root or os.environ.get("LEAKAGE_DATA") or "~/.cache/leakage").expanduser()


def open_split(kind: Callable[..., Any], root: Path, split: str, **options: Any) -> Any:
    """Open the ``"train"`` or ``"test"`` split of a torchvision data set of class ``kind`` in the folder ``root``.

    Raises:
        FileNotFoundError: the data set is missing, damaged, or could not be downloaded.
    """
    which = {"split": split} if kind is datasets.SVHN else {"train": split == "train"}
    try:
        return kind(root, **which, **options)
    except Exception as error:  # torchvision raises many kinds, down to AssertionError for a damaged file
        raise FileNotFoundError(
            f"Expected the {split} split of {kind.__name__} in '{root}', but got: {error}. "
            "Give the folder of the data set with `root` or the environment variable LEAKAGE_DATA, or download it "
            "with `download=True`, which needs a network connection (the bundled sample needs neither)."
        ) from error


def fetch_split(kind: Callable[..., Any], root: Path, split: str) -> None:
    """Download a torchvision data set unless it is present; arguments and errors are those of :func:`open_split`."""
    with suppress(FileNotFoundError):
        open_split(kind, root, split)
        return
    open_split(kind, root, split, download=True)


def images_in_memory(opened: Any) -> Tensor:
    """Return all images as uint8 ``(M, C, H, W)``: MNIST has (M, H, W), CIFAR (M, H, W, C), SVHN (M, C, H, W)."""
    images = torch.as_tensor(opened.data)
    if images.dim() == 3:
        return images[:, None]
    return images.permute(0, 3, 1, 2) if images.shape[3] == 3 else images


def read_sheet() -> Tensor:
    """Read the bundled images, class by class, as uint8 ``(10, 100, 1, 28, 28)``."""
    with Image.open(_SHEET) as sheet:
        images: Tensor = pil_to_tensor(sheet)
    return images.unfold(1, 28, 28).unfold(2, 28, 28).reshape(10, 100, 1, 28, 28)
