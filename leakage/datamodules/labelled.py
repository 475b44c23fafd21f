"""Labelled data sets in memory: training batches with images of every class, and test images in order."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from leakage.datamodules.base import ConfiguredDataModule
from leakage.datamodules.benchmarks import BENCHMARKS
from leakage.datamodules.memory import in_memory
from leakage.datamodules.sources import LABELLED_DATASETS, AnySource, LabelledTensors, Source, in_unit_range
from leakage.errors import check_choice, check_count, check_share
from leakage.pieces import digest
from leakage.seeds import derive_seed

# Test images in one batch.
_TEST_BATCH = 1000
# Training images, evenly spaced, whose hash identifies a data set in a checkpoint.
_RECOGNISED_BY = 100


@dataclass
class ClassBatch:
    """Real images of every class, in the order of the classes.

    Attributes:
        images: ``(M, C, H, W)``, uint8, 0 to 255.
        labels: ``(M,)``, int64, ascending; every class occurs.
        step: the number of the batch in the run, from 0.
    """

    images: Tensor
    labels: Tensor
    step: int


class LabelledImages(ConfiguredDataModule):
    r"""A labelled data set in memory, for training on all of its classes at once.

    Training batches are of the type :class:`ClassBatch`, with ``batch_size`` real images *of each class*. Batch t of
    seed s depends on s and t alone, so a run resumed at t continues as if it had never stopped. No image occurs twice
    in a batch. Images are decoded at ``setup``, kept in memory as uint8 (floats are rounded), and normalised when they
    are used, on their device.

    Torchvision data sets and folders with ``train/`` and ``test/`` inside have their own test images. From other data
    sets :math:`\min(\max(\mathrm{round}(\text{test\_share} \cdot n_c), 1), n_c - 1)` of the :math:`n_c` images of
    class c are held out as test images, independent of the seed; from the bundled sample the last 20 of each class.

    Attributes:
        train: the training images, after ``setup``.
        test: the test images, after ``setup``.
        class_names: the names of the classes, in the order of their indices, after ``setup``.
        mean: mean per channel of images in [0, 1], after ``setup``: the published one for a torchvision data set, else
            that of the training images.
        std: standard deviation per channel, from the same source as ``mean``.
        name: the name of the data set.
        default_batch_size: used if ``batch_size`` is None; set by the module that trains.
        batches_per_epoch: batches of one epoch; set by the module that trains.
        first_batch: the batch at which the next epoch starts; set by the module that trains.

    Args:
        dataset: as for :class:`~leakage.datamodules.Victims`, except ``"lfw"``, where most persons have a single
            image; or a pair of data sets, for training and test images.
        batch_size: real images of each class in a batch; a class with fewer images contributes all of them. By default
            the module that trains decides: 256 in the published protocol of dataset condensation.
        seed: determines which images each batch holds.
        test_share: share of the images of each class that are held out as test images, above 0 and below 1; by default
            0.2. Only for a data set without its own test images.
        benchmark: the torchvision data set that a folder holds. Its name is used, and images are normalised with its
            published mean and standard deviation.
        root, download, image_size, channels, num_classes: as for :class:`~leakage.datamodules.Victims`.
        num_workers: processes that decode images; 0 decodes in this one, which is faster for small images.

    Raises:
        ValueError: at construction, an option is out of range or not accepted by the data set; at ``setup``, an image
            can't be used (the message names it), images differ in size, training and test images have different
            classes, there are fewer than two classes, a class has no training images or too few to hold one out,
            labels are outside the range, or the training images have the same value in every pixel of a channel.
        FileNotFoundError: as for :class:`~leakage.datamodules.Victims`.

    References:
        Zhao et al., *Dataset Condensation with Gradient Matching*, ICLR 2021,
        https://arxiv.org/abs/2006.05929.

    Example:
        >>> data = LabelledImages("sample", batch_size=8)
        >>> data.setup("fit")
        >>> len(data.train), len(data.test), data.image_shape
        (800, 200, (1, 28, 28))
        >>> data.class_batch(0).labels.bincount().tolist()
        [8, 8, 8, 8, 8, 8, 8, 8, 8, 8]
    """

    train: LabelledTensors
    test: LabelledTensors
    class_names: tuple[str, ...]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        dataset: AnySource | tuple[AnySource, AnySource],
        *,
        batch_size: int | None = None,
        seed: int = 0,
        test_share: float | None = None,
        benchmark: str | None = None,
        root: str | os.PathLike[str] | None = None,
        download: bool = True,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size is not None:
            check_count(batch_size=batch_size)
        check_count(0, seed=seed, num_workers=num_workers)
        if isinstance(dataset, str) and dataset == "lfw":
            raise ValueError(
                f"Expected `dataset` to be one of {list(LABELLED_DATASETS)}, a folder of images or a Dataset, but got "
                "'lfw', where most persons have only one image, too few for training and test."
            )
        pair = list(dataset) if isinstance(dataset, tuple | list) else [dataset]
        if len(pair) not in (1, 2):
            raise ValueError(f"Expected `dataset` as one data set or as a pair, but got {len(pair)}.")
        options: dict[str, Any] = {"root": root, "download": download, "image_size": image_size, "channels": channels}
        self.sources = [Source(each, num_classes=num_classes, **options) for each in pair]
        first = self.sources[0]
        self.name, self._statistics = first.name, first.statistics
        if benchmark is not None:
            check_choice("benchmark", benchmark, BENCHMARKS)
            if first.kind != "folder":
                raise ValueError(
                    f"Expected no `benchmark` with {self.name!r}, which is not a folder, but got {benchmark!r}."
                )
            self.name, self._statistics = benchmark, (BENCHMARKS[benchmark].mean, BENCHMARKS[benchmark].std)
        self.test_share = test_share
        if len(pair) == 2 or first.parts or first.kind == "sample":
            if test_share is not None:
                raise ValueError(
                    f"Expected no `test_share` with {self.name!r}, which has test images, but got {test_share!r}."
                )
        elif test_share is None:
            self.test_share = 0.2
        else:
            check_share(test_share=test_share)
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.default_batch_size = 256
        self.batches_per_epoch = 1
        self.first_batch = 0

    def prepare_data(self) -> None:
        """Download the data set unless it is present."""
        for source in self.sources:
            source.fetch("train", "test")

    def setup(self, stage: str | None = None) -> None:
        """Load the images. Later calls do nothing."""
        if hasattr(self, "train"):
            return
        train, test, class_names = self._load()
        self._check(train, "training", class_names)
        self._check(test, "test", class_names)
        if train.images.shape[1:] != test.images.shape[1:]:
            raise ValueError(
                f"Expected training and test images of '{self.name}' of one size, but got "
                f"{tuple(train.images.shape[1:])} and {tuple(test.images.shape[1:])}."
            )
        by_class = _by_class(train.labels, len(class_names))
        empty = [name for name, members in zip(class_names, by_class, strict=True) if len(members) == 0]
        if empty:
            raise ValueError(f"Expected training images of every class of '{self.name}', but got none of {empty}.")
        self.mean, self.std = self._statistics or channel_statistics(train.images)
        if min(self.std) == 0:
            raise ValueError(
                f"Expected training images of '{self.name}' that can be normalised, but got the same value in "
                f"every pixel of channel {self.std.index(0)}."
            )
        self._by_class = by_class
        self.class_names = class_names
        self.train, self.test = train, test

    def _load(self) -> tuple[LabelledTensors, LabelledTensors, tuple[str, ...]]:
        """Load the training images, the test images and the names of the classes."""
        first = self.sources[0]
        train = first.open("train")
        if len(self.sources) == 1 and not first.parts:
            if self.test_share is None:  # the bundled sample: 100 images of each class, class by class
                held_out = torch.arange(len(train.labels)) % 100 >= 80
            else:
                held_out = self._held_out(train.labels, train.class_names, self.test_share)
            data = in_memory(train, self.num_workers)
            parts = [LabelledTensors(data.images[which], data.labels[which]) for which in (~held_out, held_out)]
            return parts[0], parts[1], train.class_names
        test = self.sources[-1].open("test")
        if train.named and test.named and train.class_names != test.class_names:
            mine, others = set(train.class_names), set(test.class_names)
            raise ValueError(
                f"Expected test images of the classes of '{self._where}', but got further classes "
                f"{sorted(others - mine)}, and no images of {sorted(mine - others)}."
            )
        # The labels of one part may lack the last classes.
        class_names = max((train, test), key=lambda part: part.num_classes).class_names
        return in_memory(train, self.num_workers), in_memory(test, self.num_workers), class_names

    @property
    def _where(self) -> str:
        """The data set as error messages name it: a folder by its path."""
        first = self.sources[0]
        return str(first.folder) if first.kind == "folder" else self.name

    def _held_out(self, labels: Tensor, class_names: tuple[str, ...], share: float) -> Tensor:
        """Choose the images to hold out: a bool ``(M,)`` for each image."""
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for label, (name, members) in enumerate(zip(class_names, _by_class(labels, len(class_names)), strict=True)):
            if len(members) < 2:
                raise ValueError(
                    f"Expected at least two images of class {name!r} in '{self._where}', to hold one out as test "
                    f"image, but got {len(members)}. Add some, or give training and test images as a pair."
                )
            generator = torch.Generator().manual_seed(derive_seed(0, label, "held-out images"))
            count = min(max(round(share * len(members)), 1), len(members) - 1)
            held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
        return held_out

    def hold_out(self, share: float) -> LabelledImages:
        """Return the same data set with some training images held out, in place of its test images.

        Use it to choose or monitor anything by accuracy without the test images. The images held out depend on the
        share alone, by the formula of ``test_share``. Mean and standard deviation do not change.

        Args:
            share: share of the training images of each class to hold out, above 0 and below 1.

        Raises:
            ValueError: the share is outside its range, or a class has a single image.

        Example:
            >>> data = LabelledImages("sample")
            >>> data.setup("fit")
            >>> watched = data.hold_out(0.1)
            >>> len(watched.train), len(watched.test)
            (720, 80)
        """
        check_share(share=share)
        self.setup("fit")
        held_out = self._held_out(self.train.labels, self.class_names, share)
        other = copy.copy(self)
        other.__dict__.pop("configuration", None)  # cached for the whole data set
        other.train, other.test = (
            LabelledTensors(self.train.images[which], self.train.labels[which], self.train.classes)
            for which in (~held_out, held_out)
        )
        other._by_class = _by_class(other.train.labels, self.num_classes)
        return other

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
        """Draw batch ``step`` of the run: ``batch_size`` training images of each class, without replacement.

        Args:
            step: the number of the batch, from 0.

        Raises:
            ValueError: ``step`` is not a whole number of at least 0.
        """
        check_count(0, step=step)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, "class batch"))
        drawn = torch.cat([self._draw(members, generator) for members in self._by_class])
        return ClassBatch(images=self.train.images[drawn], labels=self.train.labels[drawn], step=step)

    def normalise(self, images: Tensor) -> Tensor:
        r"""Normalise images for a network: :math:`(x - \mu_c) / \sigma_c` for each channel c.

        Args:
            images: ``(..., C, H, W)``, uint8 from 0 to 255, or floats from 0 (black) to 1 (white).

        Returns:
            float32 of the same shape, on the same device.

        Raises:
            ValueError: the images have another number of channels.
        """
        if images.dim() < 3 or images.shape[-3] != len(self.mean):
            raise ValueError(
                f"Expected `images` of shape (..., {len(self.mean)}, H, W), but got {tuple(images.shape)}."
            )
        mean, std = (torch.tensor(each, device=images.device).view(-1, 1, 1) for each in (self.mean, self.std))
        return (in_unit_range(images) - mean) / std

    def train_dataloader(self) -> DataLoader[ClassBatch]:
        """Load the batches from ``first_batch`` up to the next multiple of ``batches_per_epoch``."""
        # Nothing is drawn, but a loader without its own generator advances the global one.
        return DataLoader(_ClassBatches(self), batch_size=None, generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Load all test images in order, float32 in [0, 1] and not normalised, with their labels."""
        return DataLoader(_TestBatches(self.test), batch_size=None, generator=torch.Generator())

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """What determines the batches, with a hash of some images and all labels."""
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
            "test_share": self.test_share,
        }

    def _draw(self, members: Tensor, generator: torch.Generator) -> Tensor:
        batch_size = self.batch_size or self.default_batch_size
        if len(members) <= batch_size:
            return members
        return members[torch.randperm(len(members), generator=generator)[:batch_size]]

    def _check(self, data: LabelledTensors, split: str, class_names: tuple[str, ...]) -> None:
        if data.images.dtype != torch.uint8 or data.images.dim() != 4 or len(data.images) != len(data.labels):
            raise ValueError(
                f"Expected {split} images of '{self.name}' as uint8 (M, C, H, W), each with a label, but got "
                f"{data.images.dtype} {tuple(data.images.shape)} and {len(data.labels)} labels."
            )
        if len(data) == 0:
            raise ValueError(f"Expected {split} images of '{self.name}', but got none.")
        outside = data.labels[(data.labels < 0) | (data.labels >= len(class_names))]
        if len(outside):
            raise ValueError(
                f"Expected labels from 0 to {len(class_names) - 1} in the {split} images of '{self.name}', but got "
                f"{int(outside[0])}."
            )


def _by_class(labels: Tensor, num_classes: int) -> list[Tensor]:
    """Return the indices of the images of each class."""
    return [(labels == label).nonzero().flatten() for label in range(num_classes)]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images ``(M, C, H, W)``, for pixels scaled to [0, 1]."""
    # Counting values is exact, and needs no float copy of the images.
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(images.shape[1])])
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * values).sum(dim=1, keepdim=True)
    std = (share * (values - mean).square()).sum(dim=1).sqrt()
    return tuple(mean.flatten().tolist()), tuple(std.tolist())


class _ClassBatches(IterableDataset[ClassBatch]):
    def __init__(self, datamodule: LabelledImages) -> None:
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
