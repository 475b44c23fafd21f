"""Sources of labelled images: a named data set, a folder, or any map-style Dataset."""

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
from leakage.errors import check_count, check_image_size, show_shape

# A name, the path of a folder, or items (image, label).
AnySource: TypeAlias = str | os.PathLike[str] | Dataset[Any]

DATASETS = (*BENCHMARKS, "lfw", "sample")
"""Names of the data sets that :class:`~leakage.datamodules.Victims` accepts."""
LABELLED_DATASETS = (*BENCHMARKS, "sample")
"""Names of the data sets with training and test images in every class: most persons of LFW have a single image."""
_FACES_SIZE = (32, 32)


@dataclass
class LabelledTensors(Dataset[tuple[Tensor, int]]):
    """A labelled data set in memory.

    Attributes:
        images: ``(M, C, H, W)``, uint8, 0 to 255.
        labels: ``(M,)``, int64, class indices from 0.
        classes: the names of the classes, or None.

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
    """A data set and the options to open it. The options are checked at construction, the data are read later.

    Args:
        dataset: one of :data:`DATASETS`, the path of a folder in ImageFolder layout, or a map-style Dataset.
        root, download, image_size, channels, num_classes: as for :class:`~leakage.datamodules.Victims`.

    Attributes:
        kind: ``"benchmark"`` for a torchvision data set, ``"lfw"``, ``"sample"``, ``"folder"`` or ``"own"``.
        name: the name of the data set, of the folder, or of the Dataset's class.
        parts: whether the data set comes with separate training and test images.
        statistics: mean and standard deviation per channel that papers normalise with, or None.

    Raises:
        FileNotFoundError: ``dataset`` is a string or path, but neither a known name nor a folder.
        ValueError: ``dataset`` is not a data set, or does not take one of the options.

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
                advice = " Give the Dataset a transform." if self.kind == "own" and option != "root" else ""
                raise ValueError(f"Expected no `{option}` with {self.name!r}, but got {value}.{advice}")
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
        """Download these splits, ``"train"`` or ``"test"``, of a torchvision data set unless they are present.

        Raises:
            FileNotFoundError: a split could not be downloaded.
        """
        if self.benchmark and self.download:
            for split in splits:
                fetch_split(self.benchmark.kind, data_folder(self.root), split)

    def open(self, split: str = "train", *, soft: bool = False) -> OpenSource:
        """Open the images of a split, or all images if the data set has no :attr:`parts`.

        Args:
            split: ``"train"`` or ``"test"``.
            soft: whether labels are tensors ``(K,)`` instead of classes.

        Raises:
            FileNotFoundError: the data set does not exist, or is a folder without class folders or images.
            ValueError: links lead to the same folder twice, there are fewer than two classes, or ``num_classes`` is
                needed but was not given.
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
        return OpenSource(images, self.name, self.num_classes, soft=soft)

    @property
    def configuration(self) -> dict[str, Any]:
        """What a checkpoint recognises the data set by, in whatever folder it is."""
        name = "ImageFolder" if self.kind == "folder" else self.name
        return {"dataset": name, "image_size": self.image_size, "channels": self.channels}


class OpenSource(Dataset[tuple[Tensor, Any]]):
    """Items ``(image, label)``, decoded and checked on access. Images are float32 ``(C, H, W)`` in [0, 1].

    Labels are classes, or with ``soft`` float32 tensors ``(K,)``.
    """

    def __init__(self, dataset: Any, name: str, num_classes: int | None = None, *, soft: bool = False) -> None:
        self.dataset, self.name, self.soft, self.num_classes = dataset, name, soft, 0
        if soft:
            self.num_classes = len(self.item(0)[1])
            self.named, self.class_names = False, tuple(map(str, range(self.num_classes)))
            return
        names = _classes_of(dataset)
        known = self._known_labels = _labels_of(dataset)
        self.named = names is not None
        if num_classes is None and names is None and (known is None or not len(known)):
            raise ValueError(
                f"Expected `num_classes` for {name!r}, which has neither `classes` nor whole numbers in `targets` or "
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

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.item(index)
        return in_unit_range(image), label

    @cached_property
    def labels(self) -> Tensor:
        """The labels ``(M,)``, int64. If they are not in ``targets`` or ``labels``, every item is read for them."""
        if self._known_labels is not None:
            return self._known_labels
        return torch.tensor([self.item(index)[1] for index in range(len(self))])

    def item(self, index: int) -> tuple[Tensor, Any]:
        """Return the image in its own type, uint8 or float32, and its label."""
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
                    f"{image.max().item():.4g} in {self.place(index)}. Wrap a network that was trained on normalised "
                    "images: `nn.Sequential(torchvision.transforms.Normalize(mean, std), model)`."
                )
        if self.soft:
            return image, self._soft_label(label, index)
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < self.num_classes:
            raise ValueError(
                f"Expected labels from 0 to {self.num_classes - 1}, but got {label!r} in {self.place(index)}."
            )
        return image, number

    def _soft_label(self, label: Any, index: int) -> Tensor:
        if isinstance(label, Tensor) and label.is_floating_point() and label.ndim == 1:
            known = self.num_classes or max(1, len(label))
            if len(label) == known:
                return label.float()
        got = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else repr(label)
        raise ValueError(
            f"Expected labels as floating-point tensors of shape {show_shape(self.num_classes or 'K')}, but got {got} "
            f"in {self.place(index)}. For labels that are classes, leave `label_kind` out."
        )

    def place(self, index: int) -> str:
        """Return a name of an image for error messages: its file, or its number."""
        if isinstance(self.dataset, datasets.ImageFolder):
            return f"'{self.dataset.samples[index][0]}'"
        return f"image {index} of {self.name!r}"

    def check_size(self, image: Tensor, image_shape: Sequence[int], index: int) -> None:
        """Raise a ``ValueError`` that names the image unless it has the ``image_shape`` of the first one."""
        if tuple(image.shape) != tuple(image_shape):
            raise ValueError(
                f"Expected images of one size, but got {tuple(image_shape)} and {tuple(image.shape)} in "
                f"{self.place(index)}. Set `image_size`, or for your own Dataset its transform."
            )


def in_unit_range(images: Tensor) -> Tensor:
    """Convert images of any shape to float32 from 0 (black) to 1 (white): uint8 is divided by 255, floats are not."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _classes_of(dataset: Any) -> tuple[str, ...] | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return tuple(map(str, names)) if isinstance(names, list | tuple) and names else None


def _labels_of(dataset: Any) -> Tensor | None:
    """Return the labels ``(M,)`` that a data set holds apart from its items, or None if they may differ from those."""
    if isinstance(dataset, Subset):
        whole = _labels_of(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(np.asarray(dataset.indices, dtype=np.int64))]
    held = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if isinstance(dataset, TensorDataset):
        held = dataset.tensors[-1]
    if getattr(dataset, "target_transform", None) is not None:  # the items have other labels
        return None
    try:
        labels = torch.as_tensor(held)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole_numbers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.long() if whole_numbers and labels.shape == (len(dataset),) else None
