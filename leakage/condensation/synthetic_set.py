"""A small set of synthetic images that replaces a whole training set, and its files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from leakage.condensation.decoding import check_factor, decode
from leakage.condensation.recipe import Recipe
from leakage.errors import check_count
from leakage.files.tensors import header_value, read_safetensors, shorten, write_safetensors
from leakage.plots import new_figure, to_pixels
from leakage.seeds import derive_seed

if TYPE_CHECKING:
    from leakage.datamodules.labelled import LabelledImages

_FORMAT = "leakage.SyntheticSet"
# Sizes in the figure, in inches: an image, a letter of a class name.
_CELL, _LETTER = 0.6, 0.085


@dataclass
class SyntheticSet:
    """A set of images and labels on which a network is trained in place of a whole data set.

    Attributes:
        images: ``(M, C, H, W)``, float32 in the data's scale: 0 is black and 1 is white. Condensation does not clamp,
            so values may be outside this range.
        labels: ``(M,)``, int64 class indices from 0 to K - 1, ascending.
        mean: mean per channel of the data set in [0, 1]; networks are given ``(image - mean) / std``.
        std: standard deviation per channel of the data set, above 0.
        class_names: names of the K classes, in the order of the labels.
        dataset: name of the data set.
        recipe: how the set was made and what it scored, or None if that is not known.
        factor: each image holds ``factor**2`` smaller ones (:func:`~leakage.condensation.decode`), and networks are
            trained on the images of :meth:`decoded`. 1 for whole images.

    Raises:
        ValueError: shapes do not match, a tensor has another type, labels are outside the range or not ascending, the
            factor does not divide the size, an image is not finite, or there are no images.

    Example:
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])
        >>> synthetic = SyntheticSet(images, labels, mean=(0.5,), std=(0.25,), class_names=("cat", "dog"))
        >>> len(synthetic), synthetic.num_classes, synthetic.image_shape
        (4, 2, (1, 8, 8))
        >>> synthetic.save("set.safetensors")                      # doctest: +SKIP
        >>> SyntheticSet.load("set.safetensors").class_names       # doctest: +SKIP
        ('cat', 'dog')
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    dataset: str = ""
    recipe: Recipe | None = None
    factor: int = 1

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        self.class_names = tuple(self.class_names)
        images, labels = self.images, self.labels
        if images.ndim != 4 or not images.numel() or images.dtype != torch.float32:
            raise ValueError(
                "Expected `images` of shape (M, C, H, W) with at least one image, as float32 in the data's scale, but "
                f"got {tuple(images.shape)}, {images.dtype}."
            )
        check_factor(self.factor, images.shape[1:])
        if tuple(labels.shape) != (len(images),) or labels.dtype != torch.int64:
            raise ValueError(
                f"Expected `labels` of shape ({len(images)},) as int64, but got {tuple(labels.shape)}, {labels.dtype}."
            )
        if not bool(torch.isfinite(images).all()):
            bad = labels[~torch.isfinite(images).flatten(1).all(1)]
            raise ValueError(
                f"Expected finite `images`, but got NaN or inf in classes {sorted(set(bad.tolist()))[:5]}."
            )
        if int(labels.min()) < 0 or int(labels.max()) >= len(self.class_names) or bool((labels.diff() < 0).any()):
            raise ValueError(
                f"Expected `labels` from 0 to {len(self.class_names) - 1}, the indices of `class_names`, in ascending "
                f"order, but got {int(labels.min())} to {int(labels.max())}, beginning with {labels[:5].tolist()}. "
                "Sort images and labels by class."
            )
        for name, values, least in (("mean", self.mean, -math.inf), ("std", self.std, 0)):
            if len(values) != images.shape[1] or not all(least < value < math.inf for value in values):
                raise ValueError(
                    f"Expected `{name}` with a finite number{' above 0' * (least == 0)} for each of {images.shape[1]} "
                    f"channels, but got {values}."
                )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of each image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def images_per_class(self) -> Tensor:
        """Number of images of each class, ``(K,)``."""
        return self.labels.bincount(minlength=self.num_classes)

    def decoded(self) -> SyntheticSet:
        """Return the set of decoded images, ``factor**2`` from each image; the set itself if the factor is 1."""
        if self.factor == 1:
            return self
        labels = self.labels.repeat_interleave(self.factor**2)
        return replace(self, images=decode(self.images, self.factor), labels=labels, factor=1)

    def normalised(self) -> Tensor:
        """Return the images ``(M, C, H, W)`` normalised for a network: ``(image - mean) / std``."""
        mean, std = (self.images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (self.images - mean) / std

    def to_dataset(self) -> TensorDataset:
        """Return pairs of a decoded image ``(C, H, W)``, in the data's scale and not normalised, and its label."""
        decoded = self.decoded()
        return TensorDataset(decoded.images, decoded.labels)

    def check(self, data: LabelledImages) -> None:
        """Raise a ``ValueError`` unless the set has the image shape, the classes and the statistics of a data set.

        Args:
            data: the data set, after its ``setup()``.
        """
        self.check_name(data)
        origin = f" (of {self.dataset!r})" if self.dataset else ""
        for name in ("image_shape", "num_classes", "class_names", "mean", "std"):
            ours, theirs = getattr(self, name), getattr(data, name)
            # A header may hold fewer digits than the statistics computed from the data set.
            if ours != theirs and not (name in ("mean", "std") and np.allclose(ours, theirs, rtol=0, atol=1e-4)):
                raise ValueError(
                    f"Expected a synthetic set with the {name} {shorten(theirs)} of {data.name!r}, but got "
                    f"{shorten(ours)}{origin}. Give the data set, and the share of its images, that it was made from."
                )

    def check_name(self, data: LabelledImages) -> None:
        """Raise a ``ValueError`` if the recipe names another data set; ``data`` need not be set up."""
        if self.recipe is not None and self.dataset != data.name:
            raise ValueError(
                f"Expected the data set that the recipe of the synthetic set names, {self.dataset!r}, but got "
                f"{data.name!r}."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to a safetensors file. A failed write leaves no partial file.

        Raises:
            OSError: the file can't be written.
        """
        header = {name: json.dumps(getattr(self, name)) for name in ("mean", "std", "class_names", "dataset")}
        if self.recipe is not None:
            header["recipe"] = json.dumps(self.recipe.to_json())
        if self.factor != 1:
            header["factor"] = json.dumps(self.factor)
        write_safetensors(path, _FORMAT, {"images": self.images, "labels": self.labels}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyntheticSet:
        """Read a set from a file written by :meth:`save` or another program. No code in the file is run.

        The file holds the tensors ``images (M, C, H, W)`` (float32) and ``labels (M,)`` (int64). Its header has the
        entries ``format`` (``leakage.SyntheticSet``), ``version`` (``1``), and as JSON ``mean``, ``std``,
        ``class_names``, ``dataset`` and optionally ``recipe`` (:class:`Recipe`) and ``factor`` (1 if missing).

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is of another kind, is truncated, or has a wrong header or wrong tensors.
        """
        header, tensors = read_safetensors(path, _FORMAT)
        if tensors.keys() != {"images", "labels"}:
            raise ValueError(
                f"Expected tensors 'images' and 'labels' in '{path}', but got {shorten(sorted(tensors)[:5])}."
            )
        try:
            mean, std = ([float(value) for value in header_value(header, name)] for name in ("mean", "std"))
            names, dataset = (header_value(header, name) for name in ("class_names", "dataset"))
            if not (isinstance(names, list) and all(isinstance(name, str) for name in [*names, dataset])):
                raise TypeError(f"class_names={names!r}, dataset={dataset!r}")
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"Expected 'mean', 'std', 'class_names' and 'dataset' in the header of '{path}', but got: "
                f"{shorten(error)}"
            ) from error
        try:
            recipe = Recipe.from_json(header_value(header, "recipe")) if "recipe" in header else None
            factor = header_value(header, "factor") if "factor" in header else 1
            about = tuple(mean), tuple(std), tuple(names), dataset, recipe, factor
            return cls(tensors["images"], tensors["labels"], *about)
        except ValueError as error:
            raise ValueError(f"Expected a synthetic set in '{path}', but got: {shorten(error)}") from error

    def save_images(self, folder: str | os.PathLike[str]) -> None:
        """Write the decoded images as PNG files in torchvision's ``ImageFolder`` layout: ``<class>/<number>.png``.

        Values are clipped to [0, 1] and rounded to 8 bits, so a network trained on the files differs slightly;
        :meth:`save` keeps the images exactly. Folders have the names of the classes. If sorting the names would change
        the order of the classes, they begin with the class's number.

        Raises:
            FileExistsError: the folder holds files that this set would not replace.
            ValueError: the images have neither one nor three channels.
            OSError: a file can't be written.
        """
        folder = Path(folder)
        if self.factor != 1:
            self.decoded().save_images(folder)
            return
        if self.image_shape[0] not in (1, 3):
            raise ValueError(f"Expected images of 1 or 3 channels to write as PNG, but got {self.image_shape[0]}.")
        names = self._folder_names()
        digits = len(str(int(self.images_per_class.max()) - 1))
        counts = enumerate(self.images_per_class.tolist())
        paths = [folder / names[k] / f"{number:0{digits}d}.png" for k, count in counts for number in range(count)]
        stale = sorted(set(folder.glob("*/*")) - set(paths))
        if stale:
            raise FileExistsError(
                "Expected an empty folder or that of an earlier set of this size, but got "
                f"'{folder}' with '{stale[0]}'."
            )
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, self.images, strict=True):
            Image.fromarray(to_pixels(image)).save(path)

    def _folder_names(self) -> list[str]:
        """Return folder names whose sorted order is that of the classes 0 to K - 1."""
        # Class names such as "T-shirt/top" are not valid folder names.
        names = [re.sub(r"[^\w\-. ]+", "_", name).strip(". ") for name in self.class_names]
        if all(names) and len({name.lower() for name in names}) == len(names) and names == sorted(names):
            return names
        digits = len(str(self.num_classes - 1))
        return [f"{k:0{digits}d}_{name}" if name else f"{k:0{digits}d}" for k, name in enumerate(names)]

    def figure(self, images_per_class: int = 10, title: str = "") -> Figure:
        """Draw one row of images per class, with the name of the class. Values outside [0, 1] are clipped.

        Args:
            images_per_class: the most images shown of each class.
            title: title above the images.

        Raises:
            ValueError: ``images_per_class`` is below 1.
        """
        check_count(images_per_class=images_per_class)
        columns = min(images_per_class, int(self.images_per_class.max()))
        width = _CELL * columns + _LETTER * max(len(name) for name in self.class_names) + 0.3
        height = _CELL * self.num_classes + (0.4 if title else 0.1)
        figure = new_figure(max(width, 0.11 * len(title) + 0.3), height)
        figure.set_layout_engine("constrained")
        # A single picture of all images: separate axes for each image take a hundred times as long.
        axes = figure.subplots()
        grid = self._grid(columns)
        axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        rows = (np.arange(self.num_classes) + 0.5) * len(grid) / self.num_classes
        axes.set_yticks(rows, self.class_names, fontsize=9, color="#222222")
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.set_frame_on(False)
        if title:
            figure.suptitle(title, fontsize=11, color="#222222")
        return figure

    def _grid(self, columns: int) -> NDArray[np.uint8]:
        """Arrange the first images of each class in rows, as pixels from 0 to 255, with white gaps."""
        height, width = self.image_shape[1:]
        gap = max(1, height // 16)
        high, wide = height + gap, width + gap
        colours = (3,) if self.image_shape[0] == 3 else ()
        grid = np.full((self.num_classes * high, columns * wide, *colours), 255, np.uint8)
        for k in range(self.num_classes):
            for j, image in enumerate(self.images[self.labels == k][:columns]):
                grid[k * high : k * high + height, j * wide : j * wide + width] = to_pixels(image)
        return grid


def random_images(data: LabelledImages, images_per_class: int, seed: int = 0) -> SyntheticSet:
    """Draw random real training images, the same number of each class: the baseline of synthetic sets.

    Args:
        data: the data set; prepared (``prepare_data``, ``setup``) if necessary.
        images_per_class: images of each class, drawn without replacement.
        seed: seed of the draw.

    Raises:
        ValueError: a class has fewer than ``images_per_class`` images.

    Example:
        >>> from leakage.datamodules import LabelledImages
        >>> random_images(LabelledImages("sample"), images_per_class=3).images_per_class.tolist()
        [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    """
    check_count(0, seed=seed)

    def choose(members: Tensor, label: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, label, "random images"))
        return members[torch.randperm(len(members), generator=generator)[:images_per_class]]

    return real_set(data, images_per_class, choose)


def real_set(data: LabelledImages, images_per_class: int, choose: Callable[[Tensor, int], Tensor]) -> SyntheticSet:
    """Return the set of the training images chosen by ``choose``, which takes the indices and label of a class.

    Raises:
        ValueError: a class has fewer than ``images_per_class`` images.
    """
    check_count(images_per_class=images_per_class)
    make_ready(data)
    chosen = []
    for label, name in enumerate(data.class_names):
        members = (data.train.labels == label).nonzero().flatten()
        if len(members) < images_per_class:
            raise ValueError(
                f"Expected `images_per_class` of at most {len(members)}, the number of training images of class "
                f"{label} ({name}) of {data.name!r}, but got {images_per_class}."
            )
        chosen.append(choose(members, label))
    indices = torch.cat(chosen)
    return SyntheticSet(
        data.train.images[indices].float() / 255,
        data.train.labels[indices],
        mean=data.mean,
        std=data.std,
        class_names=data.class_names,
        dataset=data.name,
    )


def make_ready(data: LabelledImages) -> None:
    """Prepare and set up the data, unless they already are."""
    if not hasattr(data, "test"):
        data.prepare_data()
        data.setup("fit")
