"""Labelled folders of images, and the bundled sample."""

from __future__ import annotations

import os
import sys
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

from leakage.datamodules.image_folder import check_same_size, check_size_and_channels, open_folder
from leakage.datamodules.labelled import LabelledDataModule, LabelledTensors
from leakage.datamodules.sample import read_sheet
from leakage.errors import check_count
from leakage.seeds import derive_seed

# Seconds of decoding after which a bar is shown.
_PATIENCE = 3.0
# Seconds between two updates of the bar in a file or a pipe, in which no update replaces the one before.
_PAUSE_IN_A_FILE = 30.0
# Images that a worker decodes before it hands them over.
_DECODED_AT_ONCE = 64


class ImageFolder(LabelledDataModule):
    r"""Any folder in ImageFolder layout, ``root/<class>/<image>``, decoded into memory at ``setup``.

    Classes are numbered in the order of their folders' names. Without a ``test_root``, of the
    :math:`n_c` images of class c :math:`\min(\max(\mathrm{round}(\text{test\_share} \cdot n_c), 1), n_c - 1)`
    are held out as test images, the same whatever the seed. Mean and standard deviation are
    those of the training images.

    Args:
        root: the folder of the class folders.
        test_root: another such folder, with the same class folders, of test images.
        test_share: share of the images of each class in ``root`` that are held out as test images,
            above 0 and below 1; by default 0.2. Not together with ``test_root``.
        image_size: height and width in pixels, one number for square images; images are scaled
            (bilinear, with antialiasing) and cropped around the centre to fit. By default
            they stay as they are, and must all be of one size.
        channels: 3 for RGB or 1 for grey, converted where needed.
        num_workers: processes that decode images; 0 decodes in this one, faster for small images.
        batch_size: as for :class:`~leakage.datamodules.labelled.LabelledDataModule`.
        seed: as for :class:`~leakage.datamodules.labelled.LabelledDataModule`.

    Raises:
        ValueError: at construction, options out of range; at ``setup``, a corrupt image (the message
            names the file), images of different sizes, fewer than two classes, classes of ``test_root``
            that are not those of ``root``, a class with too few images to hold one out, and as
            :class:`~leakage.datamodules.labelled.LabelledDataModule`.
        FileNotFoundError: no such folder, or one without class folders or images.

    Example:
        >>> data = ImageFolder("photos", image_size=32, test_share=0.1)
        >>> data.name
        'photos'
        >>> data.setup("fit")  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        test_root: str | os.PathLike[str] | None = None,
        test_share: float | None = None,
        image_size: int | tuple[int, int] | None = None,
        channels: int = 3,
        num_workers: int = 0,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        check_count(0, num_workers=num_workers)
        if test_root is not None and test_share is not None:
            raise ValueError(f"Expected `test_root` or `test_share`, but got both: '{test_root}' and {test_share!r}.")
        share = 0.2 if test_share is None else test_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"Expected `test_share` to be above 0 and below 1, but got {share!r}.")
        self.root = Path(root).expanduser()
        self.test_root = None if test_root is None else Path(test_root).expanduser()
        self.test_share = share
        self.image_size, self.channels = check_size_and_channels(image_size, channels)
        self.num_workers = num_workers
        self.name = self.root.resolve().name

    def load_images(self) -> tuple[LabelledTensors, LabelledTensors, tuple[str, ...]]:
        """The images of both folders, or those of one in two parts."""
        folder = self._open(self.root, "root")
        if self.test_root is None:
            held_out = self._hold_out(folder)
            images = self._decode_all(folder)
            return _select(images, ~held_out), _select(images, held_out), tuple(folder.classes)
        test_folder = self._open(self.test_root, "test_root")
        if folder.classes != test_folder.classes:
            raise ValueError(
                f"Expected the class folders of '{self.root}' in '{self.test_root}', but got "
                f"{sorted(set(test_folder.classes) - set(folder.classes))} besides, and none of "
                f"{sorted(set(folder.classes) - set(test_folder.classes))}."
            )
        return self._decode_all(folder), self._decode_all(test_folder), tuple(folder.classes)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """As in the base class, with what decides which images are held out."""
        return super().configuration | {"test_share": None if self.test_root else self.test_share}

    def _open(self, folder: Path, argument: str) -> datasets.ImageFolder:
        return open_folder(
            folder, image_size=self.image_size, channels=self.channels, transform=pil_to_tensor, argument=argument
        )

    def _hold_out(self, folder: datasets.ImageFolder) -> Tensor:
        """``(M,)``, whether an image is held out."""
        labels = torch.tensor(folder.targets)
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for label, name in enumerate(folder.classes):
            members = (labels == label).nonzero().flatten()
            if len(members) < 2:
                raise ValueError(
                    f"Expected at least two images of class {name!r} in '{self.root}', to hold one out as test "
                    f"image, but got {len(members)}. Add some, or say where test images are with `test_root`."
                )
            generator = torch.Generator().manual_seed(derive_seed(0, label, "held-out images"))
            count = min(max(round(self.test_share * len(members)), 1), len(members) - 1)
            held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
        return held_out

    def _decode_all(self, folder: datasets.ImageFolder) -> LabelledTensors:
        loader = DataLoader(
            folder,
            batch_size=_DECODED_AT_ONCE if self.num_workers else 1,
            num_workers=self.num_workers,
            collate_fn=_images_alone,  # of sizes that may differ, so that the message can name the file
            generator=torch.Generator(),  # else the loader advances the global one
        )
        images = torch.empty(0)
        pause = 0.1 if sys.stderr.isatty() else _PAUSE_IN_A_FILE
        with Tqdm(
            total=len(folder), desc=f"Decoding {folder.root}", unit=" images", delay=_PATIENCE, mininterval=pause
        ) as bar:
            for index, image in enumerate(chain.from_iterable(loader)):
                if index == 0:
                    images = self._room_for(len(folder), image)
                check_same_size(image, tuple(images.shape[1:]), folder.samples[index][0])
                images[index] = image
                bar.update()
        return LabelledTensors(images=images, labels=torch.tensor(folder.targets))

    def _room_for(self, count: int, image: Tensor) -> Tensor:
        try:
            return torch.empty(count, *image.shape, dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(
                f"Expected images of '{self.root}' that fit into memory together, but got {count} of "
                f"{tuple(image.shape)}. Set `image_size`."
            ) from error


class Sample(LabelledDataModule):
    """The bundled sample of FashionMNIST, 80 training and 20 test images of (1, 28, 28) of each of 10 classes.

    Needs no network and no data folder. All of its images are among FashionMNIST's test images.

    Args:
        batch_size: as for :class:`~leakage.datamodules.labelled.LabelledDataModule`.
        seed: as for :class:`~leakage.datamodules.labelled.LabelledDataModule`.

    References:
        Xiao et al., *Fashion-MNIST*, 2017, https://arxiv.org/abs/1708.07747.

    Example:
        >>> data = Sample(batch_size=8)
        >>> data.setup("fit")
        >>> len(data.train), len(data.test), data.image_shape
        (800, 200, (1, 28, 28))
        >>> data.class_batch(0).labels.bincount().tolist()
        [8, 8, 8, 8, 8, 8, 8, 8, 8, 8]
    """

    name = "sample"

    def load_images(self) -> tuple[LabelledTensors, LabelledTensors, tuple[str, ...]]:
        """The first 80 images of each class, and the others."""
        train, test = (
            LabelledTensors(
                images=part.flatten(0, 1).contiguous(), labels=torch.arange(10).repeat_interleave(part.shape[1])
            )
            for part in read_sheet().tensor_split([80], dim=1)
        )
        return train, test, tuple(datasets.FashionMNIST.classes)


def _select(data: LabelledTensors, which: Tensor) -> LabelledTensors:
    return LabelledTensors(images=data.images[which], labels=data.labels[which])


def _images_alone(items: list[tuple[Tensor, int]]) -> list[Tensor]:
    return [image for image, _ in items]
