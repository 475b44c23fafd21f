"""The subject of an audit: a user's LightningModule and data, used without any change to them."""

from __future__ import annotations

import copy
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from leakage.audit.report import Problem
from leakage.labels import Auxiliary
from leakage.updates.weights import open_weights

#: The types of data that a user may pass.
Data = LightningDataModule | DataLoader[Any] | Dataset[Any]
# Keys under which dicts hold images and labels, the most usual first.
_IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x", "inputs", "input")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")
# The most values that all images in memory may have together.
_MOST_VALUES = 2**27
_LOSSES = {F.cross_entropy: "cross_entropy", F.nll_loss: "cross_entropy", F.mse_loss: "mean_squared_error"}
_LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, torch.special.log_softmax, Tensor.log_softmax)
# Other losses, recorded so that a problem can name them.
_OTHER_LOSSES = (
    *(F.binary_cross_entropy_with_logits, F.binary_cross_entropy, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    *(F.kl_div, F.multi_margin_loss, F.cosine_embedding_loss),
)


@dataclass
class Batch:
    """Images and labels of a batch, and a function that builds such a batch from other images and labels."""

    images: Tensor
    labels: Tensor
    rebuild: Callable[[Tensor, Tensor], Any]


@dataclass
class Loss:
    """A loss function that ``training_step`` called.

    Attributes:
        name: the name of the function.
        given: the logits: its first argument, or what ``log_softmax`` made into that argument.
        targets: its second argument.
        options: its other arguments, by name.
        value: the value that it returned.
    """

    name: str
    given: Tensor
    targets: Any
    options: dict[str, Any]
    value: Tensor


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@dataclass
class Subject:
    """A module and data, prepared for an audit.

    Attributes:
        module: a copy of the user's module, in its modes. Clients run its ``training_step``.
        network: a network from images in [0, 1] to logits: a part of ``module``, with a ``Normalize`` before it if the
            module takes images in another range.
        loss: the options of :class:`leakage.Victim` that declare the loss.
        images, labels: the images ``(M, C, H, W)`` in [0, 1] and labels ``(M,)`` that victims are drawn from.
        own_images, own_labels: the auditor's own images and labels, which are not among those above.
        to_batch: a function that makes a batch for ``training_step`` from images in [0, 1] and labels.
        dropout: the names of the module's dropout layers, which are turned off.
        problems: the problems that were found.
    """

    module: LightningModule
    network: nn.Module
    loss: dict[str, Any]
    images: Tensor
    labels: Tensor
    own_images: Tensor
    own_labels: Tensor
    to_batch: Callable[[Tensor, Tensor], Any]
    dropout: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def with_dropout(self) -> Subject:
        """Return a copy whose dropout layers are turned on.

        Raises:
            ValueError: there are no such layers.
        """
        if not self.dropout:
            raise ValueError(
                "Expected a module with torch.nn.Dropout in training mode for clients with dropout=True, but got none."
            )
        module, network = copy.deepcopy((self.module, self.network))
        for name in self.dropout:
            module.get_submodule(name).train()
        return replace(self, module=module, network=network)

    @property
    def names(self) -> dict[str, str]:
        """The module's name for each parameter and buffer of the network, by the network's name."""
        places = {id(tensor): name for name, tensor in _tensors(self.module)}
        return {name: places[id(tensor)] for name, tensor in _tensors(self.network) if id(tensor) in places}

    def renamed(self, weights: Any, what: str) -> Any:
        """Return a client's weights or update under the network's names, if the arrays have names."""
        arrays = open_weights(weights, what)
        if not isinstance(arrays.tensors, dict):
            return arrays.tensors
        places = {own: name for name, own in self.names.items()}
        return {places.get(name, name): tensor for name, tensor in arrays.tensors.items()}

    def module_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the module's own ``training_step`` for images in [0, 1]."""
        return loss_of(self.module, self.to_batch(images, labels))

    @cached_property
    def num_classes(self) -> int:
        """The number of logits."""
        with torch.no_grad():
            return int(self.network(self.own_images[:2]).shape[1])

    def auxiliary(self, most: int | None = None) -> Auxiliary:
        """Return the auditor's images, for attackers who have similar ones.

        They come with labels only if there are at least two images of every class, as label rules need.

        Args:
            most: the largest number of images. The first two of every class come first.
        """
        labels, counts = self.own_labels, self.own_labels.bincount(minlength=self.num_classes)
        ranked = labels.argsort(stable=True)
        place = torch.empty_like(ranked)  # the place of each image among those of its class
        place[ranked] = torch.arange(len(ranked)) - (counts.cumsum(0) - counts)[labels[ranked]]
        rows = (place >= 2).long().argsort(stable=True)[:most]
        kept = labels[rows].bincount(minlength=self.num_classes)
        return Auxiliary(self.own_images[rows], labels[rows] if bool((kept >= 2).all()) else None)


class LogitsOfTrainingStep(nn.Module):
    """Compute the logits that ``training_step`` passes to its loss, if no layer takes the images unchanged."""

    def __init__(self, module: LightningModule, rebuild: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.module, self.rebuild = module, rebuild

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, K)``."""
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        try:
            with _Losses(stop=True):
                training_step(self.module, self.rebuild(images, labels))
        except _ReachedLossError as reached:
            return reached.logits
        raise ValueError("Expected `training_step` to call a loss of torch.nn.functional, but got none.")


class _ReachedLossError(Exception):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits


class _Losses(TorchFunctionMode):
    """Record the loss functions that are called in this context, or stop at the first."""

    def __init__(self, *, stop: bool = False) -> None:
        super().__init__()
        self.calls: list[Loss] = []
        self.stop = stop
        self._log_softmax: list[tuple[Tensor, Tensor]] = []  # inputs and outputs

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _LOG_SOFTMAX:
            given, value = kwargs.get("input", args[0] if args else None), function(*args, **kwargs)
            self._log_softmax.append((given, value))
            return value
        if function not in _LOSSES and function not in _OTHER_LOSSES:
            return function(*args, **kwargs)
        names = ("input", "target", "weight")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        logits = next((before for before, after in self._log_softmax if after is given["input"]), given["input"])
        if self.stop:
            raise _ReachedLossError(logits)
        value = function(*args, **kwargs)
        options = {name: option for name, option in given.items() if name not in ("input", "target")}
        self.calls.append(Loss(function.__name__, logits, given["target"], options, value))
        return value


def training_step(module: LightningModule, batch: Any) -> Any:
    """Call the module's ``training_step`` with as many arguments as it takes."""
    step = module.training_step
    code = getattr(getattr(step, "__func__", step), "__code__", None)
    taken = code.co_argcount - 1 if code is not None else 2
    return step(batch, *(0, 0)[: max(0, taken - 1)])


def loss_of(module: LightningModule, batch: Any) -> Tensor:
    """Return the loss of ``training_step``, which returns it directly or in a dict."""
    returned = training_step(module, batch)
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"Expected `training_step` to return the loss as one number, but got {type(loss).__name__}.")
    return loss.squeeze()


def copy_of(module: LightningModule) -> LightningModule:
    """Copy a module to the CPU, with a Trainer that trains and logs nothing."""
    try:
        copied: LightningModule = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(f"Expected a `model` that can be copied, but got {type(module).__name__}: {error}") from error
    copied = copied.to("cpu")
    copied.zero_grad(set_to_none=True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    copied.trainer = trainer  # a training_step may need it, for instance for its world size
    silent = cast(Any, copied)
    silent.log = silent.log_dict = lambda *args, **kwargs: None
    return copied


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
    """Silence Lightning's hints about training inside the context."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
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
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=32, shuffle=True)
    collector = _Collector(module, images)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    given = {"datamodule": data} if isinstance(data, LightningDataModule) else {"train_dataloaders": data}
    attached = getattr(data, "trainer", None)
    module.trainer = trainer
    try:
        with seeded(seed):
            trainer.fit(collector, **cast(Any, given))
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
    """Find the images and labels of a batch, which is a tuple, list or dict of tensors; None if there are none."""
    items: list[tuple[Any, Any]]
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
    labels = next(
        ((key, value) for key, value in tensors if key != place and value.ndim in (1, 2) and len(value) == len(found)),
        None,
    )
    if labels is None:
        return None

    def rebuild(new_images: Tensor, new_labels: Tensor) -> Any:
        number, rows = len(new_images), torch.arange(len(new_images)) % len(found)
        values: dict[Any, Any] = {}
        for key, value in items:
            same = isinstance(value, Tensor) and value.ndim and len(value) == len(found)
            values[key] = value[rows] if same else value
        values[place] = new_images.round().to(found.dtype) if found.dtype == torch.uint8 else new_images
        values[labels[0]] = new_labels.view(number, *labels[1].shape[1:])
        if isinstance(batch, Mapping):
            return values
        made = [values[key] for key in range(len(batch))]
        return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)

    return Batch(found, labels[1], rebuild)


def observe(module: LightningModule, batch: Any) -> tuple[Tensor, list[Loss], list[tuple[str, Tensor, Any]]]:
    """Run ``training_step`` and return its loss, the loss functions it called, and each layer's input and output."""
    layers: list[tuple[str, Tensor, Any]] = []

    def record(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if len(inputs) == 1 and isinstance(inputs[0], Tensor):
                layers.append((name, inputs[0], output))

        return hook

    hooks = [layer.register_forward_hook(record(name)) for name, layer in module.named_modules()]
    losses = _Losses()
    try:
        with losses:
            loss = loss_of(module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return loss, losses.calls, layers


def most_images(images: Tensor) -> int:
    """Return the largest number of such images that is kept."""
    return max(1, _MOST_VALUES // max(1, images[0].numel()))
