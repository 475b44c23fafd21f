"""Labelled data sets in memory: batches of every class for training, the test images in order."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from leakage.datamodules.base import ConfiguredDataModule
from leakage.datamodules.images import digest
from leakage.errors import check_count
from leakage.seeds import derive_seed

# Test images in one batch.
_TEST_BATCH = 1000
# Training images, evenly spread, by which a checkpoint recognises a data set.
_RECOGNISED_BY = 100


@dataclass
class LabelledTensors:
    """A labelled data set in memory.

    Attributes:
        images: ``(M, C, H, W)``, uint8, 0 to 255.
        labels: ``(M,)``, int64, class indices from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ClassBatch:
    """Real images of every class, in the order of the classes.

    Attributes:
        images: ``(M, C, H, W)``, uint8, 0 to 255.
        labels: ``(M,)``, int64, ascending; every class occurs.
        step: which batch of the run this is, from 0.
    """

    images: Tensor
    labels: Tensor
    step: int


class LabelledDataModule(ConfiguredDataModule):
    r"""A labelled data set, seen by what trains on all of its classes at once.

    Training gives :class:`ClassBatch`\ es, ``batch_size`` real images *of each class*. Which images
    batch t of seed s holds depends on s and t alone, so that a run resumed at t goes on as if it had
    never stopped; within a class no image comes twice in a batch. Images stay uint8 in memory, and
    are normalised when they are used, on the device where they are.

    A subclass supplies :meth:`load_images` and :attr:`name`.

    Attributes:
        train: the training images, after ``setup``.
        test: the test images, after ``setup``.
        class_names: the names of the classes, in the order of their indices, after ``setup``.
        mean: per channel, of the training images in [0, 1], after ``setup``.
        std: as ``mean``.
        name: what the data set is called.
        statistics: published ``mean`` and ``std``; None to compute them from the training images.
        default_batch_size: used where ``batch_size`` is None; what trains sets it.
        batches_per_epoch: batches of one epoch; what trains sets it.
        first_batch: the batch at which the next epoch starts; what trains sets it.

    Args:
        batch_size: real images of each class in a batch; a class with fewer gives all it has. By default what
            trains decides: 256 in dataset condensation's published protocol.
        seed: decides which images each batch holds.

    Raises:
        ValueError: at construction, a ``batch_size`` or ``seed`` that is no such count; at ``setup``,
            fewer than two classes, a class without training images (the message names it), labels
            outside the range, or training images that are all of one colour.

    References:
        Zhao et al., *Dataset Condensation with Gradient Matching*, ICLR 2021,
        https://arxiv.org/abs/2006.05929.
    """

    train: LabelledTensors
    test: LabelledTensors
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]] | None] = None

    def __init__(self, *, batch_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if batch_size is not None:
            check_count(batch_size=batch_size)
        check_count(0, seed=seed)
        self.batch_size = batch_size
        self.seed = seed
        self.default_batch_size = 256
        self.batches_per_epoch = 1
        self.first_batch = 0

    @abstractmethod
    def load_images(self) -> tuple[LabelledTensors, LabelledTensors, tuple[str, ...]]:
        """The training images, the test images and the names of the classes."""

    def setup(self, stage: str | None = None) -> None:
        """Load the images; later calls do nothing."""
        if hasattr(self, "train"):
            return
        train, test, class_names = self.load_images()
        if len(class_names) < 2:
            raise ValueError(f"Expected at least two classes in '{self.name}', but got only {list(class_names)}.")
        self._check(train, "training", class_names)
        self._check(test, "test", class_names)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise ValueError(
                f"Expected training and test images of '{self.name}' of one size, but got "
                f"{tuple(train.images.shape[1:])} and {tuple(test.images.shape[1:])}."
            )
        by_class = [(train.labels == label).nonzero().flatten() for label in range(len(class_names))]
        empty = [name for name, members in zip(class_names, by_class, strict=True) if len(members) == 0]
        if empty:
            raise ValueError(f"Expected training images of every class of '{self.name}', but got none of {empty}.")
        self.mean, self.std = self.statistics or channel_statistics(train.images)
        if min(self.std) == 0:
            raise ValueError(
                f"Expected training images of '{self.name}' that can be normalised, but got the same value in "
                f"every pixel of channel {self.std.index(0)}."
            )
        self._by_class = by_class
        self.class_names = class_names
        self.train, self.test = train, test

    @property
    def num_classes(self) -> int:
        """The number of classes, after ``setup``."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of every image, after ``setup``."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def class_batch(self, step: int) -> ClassBatch:
        """Batch ``step`` of the run: for each class ``batch_size`` of its training images, drawn without replacement.

        Args:
            step: from 0.

        Raises:
            ValueError: a ``step`` that is no whole number of at least 0.
        """
        check_count(0, step=step)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, "class batch"))
        drawn = torch.cat([self._draw(members, generator) for members in self._by_class])
        return ClassBatch(images=self.train.images[drawn], labels=self.train.labels[drawn], step=step)

    def normalise(self, images: Tensor) -> Tensor:
        r"""What networks are given: :math:`(x - \mu_c) / \sigma_c` for each channel c.

        Args:
            images: ``(..., C, H, W)``, uint8 from 0 to 255, or floats where 0 is black and 1 white.

        Returns:
            float32 of the same shape, on the same device.

        Raises:
            ValueError: another number of channels.
        """
        if images.dim() < 3 or images.shape[-3] != len(self.mean):
            raise ValueError(
                f"Expected `images` of shape (..., {len(self.mean)}, H, W), but got {tuple(images.shape)}."
            )
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (in_unit_range(images) - mean) / std

    def train_dataloader(self) -> DataLoader[ClassBatch]:
        """The batches from ``first_batch`` up to the next multiple of ``batches_per_epoch``."""
        # Nothing is drawn, but a loader without a generator of its own advances the global one.
        return DataLoader(_ClassBatches(self), batch_size=None, generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """All test images in order: float32 in [0, 1], not normalised, and their labels."""
        return DataLoader(_TestBatches(self.test), batch_size=None, generator=torch.Generator())

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """All that decides which images the batches hold, as plain numbers and words."""
        self.setup("fit")
        some = self.train.images[:: math.ceil(len(self.train) / _RECOGNISED_BY)]
        return {
            "data": type(self).__name__,
            "name": self.name,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "classes": list(self.class_names),
            "images": len(self.train),
            "image_shape": list(self.image_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "content": digest({"images": some, "labels": self.train.labels}),
        }

    def _draw(self, members: Tensor, generator: torch.Generator) -> Tensor:
        batch_size = self.batch_size or self.default_batch_size
        if len(members) <= batch_size:
            return members
        return members[torch.randperm(len(members), generator=generator)[:batch_size]]

    def _check(self, data: LabelledTensors, split: str, class_names: tuple[str, ...]) -> None:
        if data.images.dtype != torch.uint8 or data.images.dim() != 4:
            raise ValueError(
                f"Expected {split} images of '{self.name}' as uint8 (M, C, H, W), but got {data.images.dtype} "
                f"{tuple(data.images.shape)}."
            )
        if len(data.images) != len(data.labels) or len(data) == 0:
            raise ValueError(
                f"Expected {split} images of '{self.name}', each with a label, but got {len(data.images)} images "
                f"and {len(data.labels)} labels."
            )
        outside = data.labels[(data.labels < 0) | (data.labels >= len(class_names))]
        if len(outside):
            raise ValueError(
                f"Expected labels from 0 to {len(class_names) - 1} in the {split} images of '{self.name}', but got "
                f"{int(outside[0])}."
            )


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1].

    Args:
        images: ``(M, C, H, W)``, uint8.

    Example:
        >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2))
        ((0.5,), (0.5,))
    """
    # Counting values is exact, and needs no copy of the images as floats.
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(images.shape[1])])
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * values).sum(dim=1, keepdim=True)
    std = (share * (values - mean).square()).sum(dim=1).sqrt()
    return tuple(mean.flatten().tolist()), tuple(std.tolist())


def in_unit_range(images: Tensor) -> Tensor:
    """Images as float32 where 0 is black and 1 white; floats are in that scale already.

    Args:
        images: any shape, uint8 from 0 to 255 or floats.
    """
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class _ClassBatches(IterableDataset[ClassBatch]):
    def __init__(self, datamodule: LabelledDataModule) -> None:
        self.datamodule = datamodule

    def __iter__(self) -> Iterator[ClassBatch]:
        data = self.datamodule
        last = data.batches_per_epoch * (data.first_batch // data.batches_per_epoch + 1)
        return map(data.class_batch, range(data.first_batch, last))


class _TestBatches(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: LabelledTensors) -> None:
        self.data = data

    def __len__(self) -> int:
        return math.ceil(len(self.data) / _TEST_BATCH)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        batch = slice(index * _TEST_BATCH, (index + 1) * _TEST_BATCH)
        return in_unit_range(self.data.images[batch]), self.data.labels[batch]
