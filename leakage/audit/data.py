"""The data of an audit: the batches that a user's training would see."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

#: The types of data that a user may pass.
Data = LightningDataModule | DataLoader[Any] | Dataset[Any]
# Keys under which dicts hold images and labels, the most usual first.
_IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x", "inputs", "input")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")
# The most values that all images in memory may have together.
_MOST_VALUES = 2**27


@dataclass
class Batch:
    """A batch with images.

    Attributes:
        images: ``(B, C, H, W)``.
        labels: ``(B,)`` or ``(B, K)``; None if there are none.
        rebuild: a function that builds such a batch from other images and labels. All else is that of this batch.
        others: this batch with other values in one further tensor, for each such tensor.
    """

    images: Tensor
    labels: Tensor | None
    rebuild: Callable[[Tensor, Tensor], Any]
    others: dict[Any, Any] = field(default_factory=dict)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random generators inside the context, and restore their states afterwards."""
    with isolate_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 (a user's augmentation may draw from it)
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's hints about training, and that R-GAP ignores dropout, inside the context."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            warnings.filterwarnings("ignore", message="The clients' network draws random numbers")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Collector(LightningModule):
    """Run a user's data as in training, with the module's own hooks for batches, and keep each batch."""

    def __init__(self, module: LightningModule, images: int) -> None:
        super().__init__()
        self.module = [module]  # in a list, so as not to become a submodule
        self.batches: list[Any] = []
        self.missing = images

    def on_fit_start(self) -> None:
        """Show the Trainer to the module, whose hooks may use it."""
        self.module[0].trainer = self.trainer

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the module's own hook."""
        return self.module[0].on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the module's own hook."""
        return self.module[0].on_after_batch_transfer(batch, dataloader_idx)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch."""
        self.batches.append(batch)
        found = find_images(batch)
        self.missing -= 1 if found is None else len(found.images)
        if self.missing <= 0 or found is None:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> None:
        """Return no optimizer."""


def fit(module: LightningModule, data: Data | None, **options: Any) -> None:
    """Train a module on the data, or on its own ``train_dataloader``, with these options of the Trainer."""
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=32, shuffle=True)
    trainer = Trainer(
        devices=1,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data)


def collect(module: LightningModule, data: Data | None, images: int, seed: int) -> list[Any]:
    """Collect batches with about this many images, as the module's own training would see them.

    Raises:
        ValueError: there are no data, or no batch of them can be loaded.
    """
    if data is None:
        if not is_overridden("train_dataloader", module):
            raise ValueError(
                f"Expected `data`, or a module with a `train_dataloader`, but got neither for {type(module).__name__}."
            )
        data = module.train_dataloader()
    collector = _Collector(module, images)
    attached = getattr(data, "trainer", None)
    try:
        with seeded(seed):
            fit(collector, data, max_epochs=1, accelerator="cpu")
    except Exception as error:
        if not collector.batches:
            raise ValueError(f"Expected data with images, but got {type(data).__name__}: {error}") from error
    finally:
        if isinstance(data, LightningDataModule):
            data.trainer = attached
    if not collector.batches:
        raise ValueError(f"Expected data with images, but got none from {type(data).__name__}.")
    return collector.batches


def find_images(batch: Any) -> Batch | None:
    """Find the images and labels of a batch: a tensor, or a tuple, list or dict of tensors; None without images."""
    items: list[tuple[Any, Any]]
    if isinstance(batch, Tensor):
        return Batch(batch, None, lambda images, labels: images) if batch.ndim == 4 else None
    if isinstance(batch, Mapping):
        rank = {key: place for place, key in enumerate((*_IMAGE_KEYS, *_LABEL_KEYS))}
        items = sorted(batch.items(), key=lambda item: rank.get(item[0], len(rank)))
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        items = list(enumerate(batch))
    else:
        return None
    tensors = [(place, value) for place, value in items if isinstance(value, Tensor)]
    images = next(((place, value) for place, value in tensors if value.ndim == 4), None)
    if images is None:
        return None
    place, found = images
    of_images = {key for key, value in tensors if value.ndim and len(value) == len(found)}
    if not isinstance(batch, Mapping):  # labels follow their images; a number of the image may come before it
        tensors = [*(pair for pair in tensors if pair[0] > place), *(pair for pair in tensors if pair[0] <= place)]
    labels = next(
        ((key, value) for key, value in tensors if key != place and value.ndim in (1, 2) and len(value) == len(found)),
        None,
    )

    def rebuild(new_images: Tensor, new_labels: Tensor) -> Any:
        rows = torch.arange(len(new_images)) % len(found)
        values: dict[Any, Any] = {}
        for key, value in items:
            value = value[rows] if key in of_images else value
            values[key] = value.to(new_images.device) if isinstance(value, Tensor) else value
        values[place] = new_images
        if labels is not None:
            new_labels = new_labels.view(len(new_images), *labels[1].shape[1:])
            # Numbers in floating point get the precision of the images, all others their own type.
            dtype = labels[1].dtype
            values[labels[0]] = new_labels.to(new_images.dtype if dtype.is_floating_point else dtype)
        return put(values)

    def put(values: dict[Any, Any]) -> Any:
        if isinstance(batch, Mapping):
            return values
        made = [values[key] for key in range(len(batch))]
        return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)

    known = {place, labels[0] if labels is not None else place}
    further = {key: value for key, value in tensors if value.ndim and key not in known}
    others = {key: put(dict(items) | {key: _changed(value)}) for key, value in further.items()}
    return Batch(found, None if labels is None else labels[1], rebuild, others)


def _changed(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return ~tensor
    return tensor + 1 if tensor.is_floating_point() else (tensor.long() - 1).abs().to(tensor.dtype)


def most_images(images: Tensor) -> int:
    """Return the largest number of such images that is kept."""
    return max(1, _MOST_VALUES // max(1, images[0].numel()))
