"""Decodes all images of a data set into memory."""

from __future__ import annotations

import sys
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from torch.utils.data import DataLoader

from leakage.datamodules.sources import LabelledTensors, OpenSource

# Seconds of decoding after which a bar is shown.
_PATIENCE = 3.0
# Seconds between updates of the bar in a file or a pipe, where updates do not replace one another.
_PAUSE_IN_A_FILE = 30.0
# Images that a worker decodes before it hands them over.
_DECODED_AT_ONCE = 64


def in_memory(images: OpenSource, num_workers: int = 0) -> LabelledTensors:
    """Decode all images, in ``num_workers`` processes or in this one. If it takes long, a progress bar is shown.

    Raises:
        ValueError: an image can't be used, images differ in size, or they do not fit into memory.
    """
    if isinstance(images.dataset, LabelledTensors):
        return LabelledTensors(images.dataset.images.contiguous(), images.dataset.labels)
    loader: DataLoader[Any] = DataLoader(
        range(len(images)),  # type: ignore[arg-type]
        batch_size=_DECODED_AT_ONCE if num_workers else 1,
        num_workers=num_workers,
        collate_fn=partial(_decoded, images),
        generator=torch.Generator(),  # without one the loader advances the global generator
    )
    found, labels = torch.empty(0), torch.empty(len(images), dtype=torch.int64)
    pause = 0.1 if sys.stderr.isatty() else _PAUSE_IN_A_FILE
    with Tqdm(
        total=len(images), desc=f"Decoding {images.name}", unit=" images", delay=_PATIENCE, mininterval=pause
    ) as bar:
        for index, (image, label) in enumerate(chain.from_iterable(loader)):
            if index == 0:
                found = _room_for(images, image)
            images.check_size(image, found.shape[1:], index)
            found[index], labels[index] = image, label
            bar.update()
    return LabelledTensors(found, labels)


def _room_for(images: OpenSource, image: Tensor) -> Tensor:
    try:
        return torch.empty(len(images), *image.shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise ValueError(
            f"Expected images of {images.name!r} that fit into memory, but got {len(images)} of shape "
            f"{tuple(image.shape)}. Set `image_size`."
        ) from error


def _decoded(images: OpenSource, indices: list[int]) -> list[tuple[Tensor, int]]:
    """Decode images to uint8. They are not stacked, since a message about their sizes has to name the file."""
    items = [images.item(index) for index in indices]
    return [(image if image.dtype == torch.uint8 else (image * 255).round().byte(), label) for image, label in items]
