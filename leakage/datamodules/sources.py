"""Where labelled images come from: a data set of a paper by its name, a folder, or any map-style Dataset."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

from leakage.datamodules.benchmarks import (
    BENCHMARKS,
    data_folder,
    fetch_split,
    images_in_memory,
    open_split,
    read_sheet,
)
from leakage.datamodules.folders import find_faces, open_folder, parts_of
from leakage.errors import check_count, check_image_size

# A name, the path of a folder, or items (image, label).
AnySource: TypeAlias = str | os.PathLike[str] | Dataset[Any]

DATASETS = (*BENCHMARKS, "lfw", "sample")
"""Names that :class:`~leakage.datamodules.Victims` knows."""
LABELLED_DATASETS = (*BENCHMARKS, "sample")
"""Those with images to learn from and images to test with: most persons of LFW have a single one."""
_FACES_SIZE = (32, 32)


@dataclass
class LabelledTensors(Dataset[tuple[Tensor, int]]):
    """A labelled data set in memory.

    Attributes:
        images: ``(M, C, H, W)``, uint8, 0 to 255.
        labels: ``(M,)``, int64, class indices from 0.
        classes: their names, where they have any.

    Example:
        >>> images = LabelledTensors(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 0]))
        >>> len(images), images[0][1]
        (2, 1)
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Source:
    """A data set with the options to open it, which are checked at once; it is not yet read.

    Args:
        dataset: one of :data:`DATASETS`, the path of a folder in ImageFolder layout, or a map-style Dataset.
        root, download, image_size, channels, num_classes: as for :class:`~leakage.datamodules.Victims`.

    Attributes:
        kind: ``"benchmark"`` for a data set of torchvision, ``"lfw"``, ``"sample"``, ``"folder"`` or ``"own"``.
        name: what to call it: its name, that of the folder, or that of the Dataset's class.
        parts: whether there are training and test images, told apart by whoever published them.
        statistics: mean and standard deviation per channel that papers normalise by, where there are any.

    Raises:
        FileNotFoundError: a ``dataset`` that is neither a name nor a folder.
        ValueError: what is no data set, or an option that the data set does not take.

    Example:
        >>> images = Source("sample").open()
        >>> len(images), images.num_classes, images[0][0].shape
        (1000, 10, torch.Size([1, 28, 28]))
    """

    def __init__(
        self,
        dataset: AnySource,
        *,
        root: str | os.PathLike[str] | None = None,
        download: bool = True,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.benchmark = BENCHMARKS.get(str(dataset)) if isinstance(dataset, str) else None
        self.folder, self.folders = Path(), dict[str, Path]()
        if not isinstance(dataset, str | os.PathLike):
            mapping = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
            if not mapping or isinstance(dataset, IterableDataset | list | tuple):
                raise ValueError(
                    f"Expected `dataset` to be one of {list(DATASETS)}, a folder of images, or a Dataset with "
                    f"`__len__` and `__getitem__`, but got {type(dataset).__name__}."
                )
            self.kind, self.name = "own", type(dataset).__name__
        elif dataset in DATASETS:
            self.name = str(dataset)
            self.kind = "benchmark" if self.benchmark else self.name
        else:
            self.folder = Path(dataset).expanduser()
            if not self.folder.is_dir():
                raise FileNotFoundError(
                    f"Expected `dataset` to be one of {list(DATASETS)} or a folder of images, but got no folder "
                    f"'{dataset}'."
                )
            self.kind, self.name = "folder", self.folder.resolve().name
            self.folders = parts_of(self.folder)
        for option, value, users in (
            ("root", root, ("benchmark", "lfw")),
            ("image_size", image_size, ("lfw", "folder")),
            ("channels", channels, ("lfw", "folder")),
            ("num_classes", num_classes, ("own",)),
        ):
            if value is not None and self.kind not in users:
                mend = " Give it a transform." if self.kind == "own" and option != "root" else ""
                raise ValueError(f"Expected no `{option}` with {self.name!r}, but got {value}.{mend}")
        if channels not in (None, 1, 3):
            raise ValueError(f"Expected `channels` to be 1 or 3, but got {channels!r}.")
        if num_classes is not None:
            check_count(2, num_classes=num_classes)
        if self.kind == "lfw" and image_size is None:
            image_size = _FACES_SIZE
        self.root, self.download, self.num_classes = root, download, num_classes
        self.image_size = check_image_size(image_size) if image_size is not None else None
        self.channels = (channels or 3) if self.kind in ("lfw", "folder") else None
        self.parts = self.benchmark is not None or bool(self.folders)
        self.statistics = (self.benchmark.mean, self.benchmark.std) if self.benchmark else None

    def fetch(self, *splits: str) -> None:
        """Download these parts, ``"train"`` and ``"test"``, of a data set of torchvision unless they are there.

        Raises:
            FileNotFoundError: they could not be downloaded.
        """
        if self.benchmark and self.download:
            for split in splits:
                fetch_split(self.benchmark.kind, data_folder(self.root), split)

    def open(self, split: str = "train") -> OpenSource:
        """The images of one of the :attr:`parts`; all images where there are none.

        Raises:
            FileNotFoundError: no such data set, or a folder without class folders or images.
            ValueError: links in circles, fewer than two classes, or a Dataset whose ``num_classes`` must be told.
        """
        if self.benchmark:
            opened = open_split(self.benchmark.kind, data_folder(self.root), split)
            # SVHN has no names: its classes are the digits.
            names = getattr(opened, "classes", None) or [str(digit) for digit in range(10)]
            labels = opened.labels if hasattr(opened, "labels") else opened.targets
            labels = torch.as_tensor(labels, dtype=torch.int64)
            images: Any = LabelledTensors(images_in_memory(opened), labels, tuple(names))
        elif self.kind == "sample":
            names = datasets.FashionMNIST.classes
            images = LabelledTensors(read_sheet().flatten(0, 1), torch.arange(10).repeat_interleave(100), tuple(names))
        elif self.kind in ("lfw", "folder"):
            folder = find_faces(self.root) if self.kind == "lfw" else self.folders.get(split, self.folder)
            images = open_folder(folder, image_size=self.image_size, channels=self.channels or 3)
        else:
            images = self.dataset
        return OpenSource(images, self.name, self.num_classes)

    @property
    def configuration(self) -> dict[str, Any]:
        """By what a checkpoint recognises it, wherever it lies."""
        name = "ImageFolder" if self.kind == "folder" else self.name
        return {"dataset": name, "image_size": self.image_size, "channels": self.channels}


class OpenSource(Dataset[tuple[Tensor, int]]):
    """Items ``(image, label)``, each decoded and checked when it is asked for: float32 ``(C, H, W)`` in [0, 1]."""

    def __init__(self, dataset: Any, name: str, num_classes: int | None = None) -> None:
        self.dataset, self.name = dataset, name
        names = _classes_of(dataset)
        known = self._known_labels = _labels_of(dataset)
        self.named = names is not None
        if num_classes is None and names is None and (known is None or not len(known)):
            raise ValueError(
                f"Expected `num_classes` for {name!r}, which has neither `classes` nor whole numbers as `targets` or "
                "`labels`, but got None."
            )
        if num_classes is None:
            num_classes = len(names) if names is not None else int(known.max()) + 1  # type: ignore[union-attr]
        if num_classes < 2:
            raise ValueError(
                f"Expected at least two classes in {name!r}, but got {num_classes}: with one class every gradient is "
                "zero."
            )
        self.num_classes = num_classes
        self.class_names = names if names and len(names) == num_classes else tuple(map(str, range(num_classes)))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.item(index)
        return in_unit_range(image), label

    @cached_property
    def labels(self) -> Tensor:
        """``(M,)``, int64; of a Dataset that does not hold them in ``targets`` or ``labels``, item by item."""
        if self._known_labels is not None:
            return self._known_labels
        return torch.tensor([self.item(index)[1] for index in range(len(self))])

    def item(self, index: int) -> tuple[Tensor, int]:
        """The image as it is held, uint8 or float32, and its label."""
        item = self.dataset[index]
        if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
            raise ValueError(f"Expected items (image, label) of {self.name!r}, but got {type(item).__name__}.")
        image, label = item
        if isinstance(image, Image.Image) and image.mode in ("L", "RGB"):
            image = pil_to_tensor(image)
        sound = isinstance(image, Tensor) and (image.dtype == torch.uint8 or image.is_floating_point())
        if not sound or image.ndim != 3:
            got = type(image).__name__
            if isinstance(image, Image.Image):
                got = f"a PIL image of mode {image.mode!r}"
            elif isinstance(image, Tensor):
                got = f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(
                f"Expected images as PIL images of mode 'L' or 'RGB', or as tensors (C, H, W) of uint8 or of floats in "
                f"[0, 1], but got {got} in {self.place(index)}."
            )
        if image.is_floating_point():
            image = image.float()
            if not bool(((image >= 0) & (image <= 1)).all()):
                raise ValueError(
                    f"Expected floats in [0, 1], 0 for black and 1 for white, but got {image.min().item():.4g} to "
                    f"{image.max().item():.4g} in {self.place(index)}. Networks that were trained on normalised images "
                    "are wrapped: `nn.Sequential(torchvision.transforms.Normalize(mean, std), model)`."
                )
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < self.num_classes:
            raise ValueError(
                f"Expected labels from 0 to {self.num_classes - 1}, but got {label!r} in {self.place(index)}."
            )
        return image, number

    def place(self, index: int) -> str:
        """What to call an image: its file, or its number."""
        if isinstance(self.dataset, datasets.ImageFolder):
            return f"'{self.dataset.samples[index][0]}'"
        return f"image {index} of {self.name!r}"

    def check_size(self, image: Tensor, image_shape: Sequence[int], index: int) -> None:
        """Raise a ``ValueError`` naming the image unless it has ``image_shape``, that of the first."""
        if tuple(image.shape) != tuple(image_shape):
            raise ValueError(
                f"Expected images of one size, but got {tuple(image_shape)} and {tuple(image.shape)} in "
                f"{self.place(index)}. Set `image_size`, or for a Dataset of your own its transform."
            )


def in_unit_range(images: Tensor) -> Tensor:
    """Images of any shape, uint8 from 0 to 255 or floats, as float32 from 0 for black to 1 for white."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _classes_of(dataset: Any) -> tuple[str, ...] | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return tuple(map(str, names)) if isinstance(names, list | tuple) and names else None


def _labels_of(dataset: Any) -> Tensor | None:
    """The labels ``(M,)`` that a data set holds apart from its images, None if it holds none that items surely have."""
    if isinstance(dataset, Subset):
        whole = _labels_of(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(np.asarray(dataset.indices, dtype=np.int64))]
    held = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if isinstance(dataset, TensorDataset):
        held = dataset.tensors[-1]
    if getattr(dataset, "target_transform", None) is not None:  # which makes others of them
        return None
    try:
        labels = torch.as_tensor(held)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole_numbers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.long() if whole_numbers and labels.shape == (len(dataset),) else None
