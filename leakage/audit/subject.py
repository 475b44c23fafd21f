"""The subject of an audit: a user's LightningModule and data, used without any change to them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from leakage.audit.data import seeded
from leakage.audit.report import Problem
from leakage.clients.losses import OWN
from leakage.clients.victim import Victim
from leakage.labels import Auxiliary
from leakage.updates.weights import open_weights

#: The losses of torch that a client can declare, with their names.
LOSSES = {F.cross_entropy: "cross_entropy", F.nll_loss: "cross_entropy", F.mse_loss: "mean_squared_error"}
_LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, torch.special.log_softmax, Tensor.log_softmax)
# Other losses, recorded so that a problem can name them.
_OTHER_LOSSES = (
    *(F.binary_cross_entropy_with_logits, F.binary_cross_entropy, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    *(F.kl_div, F.multi_margin_loss, F.cosine_embedding_loss),
)


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
            module takes images in another range; or, with loss ``"own"``, from images and targets to the loss.
        loss: the options of :class:`leakage.Victim` that declare loss and labels.
        num_classes: K, the number of logits, or of classes or values in the labels.
        images, labels: the images ``(M, C, H, W)`` in [0, 1] and labels, ``(M,)`` or ``(M, K)``, that victims are drawn
            from.
        own_images, own_labels: the auditor's own images and labels, which are not among those above.
        to_batch: a function that makes a batch for ``training_step`` from images in [0, 1] and labels.
        dropout: the names of the module's dropout layers, which are turned off.
        problems: the problems that were found.
        uses: what the loss uses of labels: ``"classes"`` (or their probabilities), which attacks can search for;
            ``"numbers"``, which attacks must know; or ``"nothing"``, and labels are then zeros.
    """

    module: LightningModule
    network: nn.Module
    loss: dict[str, Any]
    num_classes: int
    images: Tensor
    labels: Tensor
    own_images: Tensor
    own_labels: Tensor
    to_batch: Callable[[Tensor, Tensor], Any]
    dropout: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    uses: str = "classes"

    @property
    def has_own_loss(self) -> bool:
        """Whether ``training_step`` itself computes the loss of clients, as they can't declare it."""
        return bool(self.loss["loss"] == OWN)

    def victim(self, **client: Any) -> Victim:
        """Return a client of this subject with further options of :class:`leakage.Victim`."""
        of_own: dict[str, Any] = {"num_classes": self.num_classes} if self.has_own_loss else {}
        shape = tuple(self.images.shape[1:])
        return Victim(self.network, image_shape=shape, **self.loss, **of_own, **client)

    @property
    def own_classes(self) -> Tensor | None:
        """The most probable class of each of the auditor's images; None if labels are not classes."""
        if self.loss["label_kind"] == "classes":
            return self.own_labels
        return self.own_labels.argmax(1) if self.loss["label_kind"] == "probabilities" else None

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

    def size_of_gradient(self) -> str:
        """Return the length of a gradient in three digits, by which an audit that is resumed recognises the loss."""
        made = copy.deepcopy(self)  # BatchNorm changes its statistics
        with seeded(0):
            loss = made.module_loss(self.own_images[:2], self.own_labels[:2])
        weights = [weight for weight in made.module.parameters() if weight.requires_grad]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return f"{torch.stack([one.norm() for one in found if one is not None]).norm():.2e}"

    def module_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the module's own ``training_step`` for images in [0, 1]."""
        return loss_of(self.module, self.to_batch(images, labels))

    def auxiliary(self, most: int | None = None) -> Auxiliary:
        """Return the auditor's images, for attackers who have similar ones.

        They come with labels only if there are at least two images of every class, as label rules need.

        Args:
            most: the largest number of images. The first two of every class come first.
        """
        if (labels := self.own_classes) is None:
            return Auxiliary(self.own_images[:most])
        counts = labels.bincount(minlength=self.num_classes)
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
        if function not in LOSSES and function not in _OTHER_LOSSES:
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


@cache
def _trainer() -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", max_epochs=1000, **quiet)


def training_step(module: LightningModule, batch: Any) -> Any:
    """Call the module's ``training_step`` with as many arguments as it takes."""
    if module._trainer is None:  # the step may need it, for instance for its world size; copies of modules lose it
        module.trainer = _trainer()
    step = module.training_step
    code = getattr(getattr(step, "__func__", step), "__code__", None)
    taken = code.co_argcount - 1 if code is not None else 2
    return step(batch, *(0, 0)[: max(0, taken - 1)])


@cache
def _own_names() -> frozenset[str]:
    return frozenset(vars(LightningModule()))


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Undo what a step notes in a module: counters, and records that would hold the graphs of all evaluations."""
    parts = [vars(part) for part in module.modules() if isinstance(part, LightningModule)]
    before = [{name: value for name, value in part.items() if name not in _own_names()} for part in parts]
    held = [value for values in before for value in values.values() if isinstance(value, list | deque | dict)]
    inside = [one for value in held if isinstance(value, dict) for one in value.values()]
    held += [value for value in inside if isinstance(value, list | deque)]
    contents = [copy.copy(value) for value in held]
    try:
        yield
    finally:
        for part, values in zip(parts, before, strict=True):
            for name in part.keys() - values.keys() - _own_names():
                del part[name]
            part.update(values)
        for value, old in zip(held, contents, strict=True):
            value.clear()
            value.update(old) if isinstance(value, dict) else value.extend(old)


def loss_of(module: LightningModule, batch: Any) -> Tensor:
    """Return the loss of ``training_step``, which returns it directly or in a dict."""
    with _kept(module):
        returned = training_step(module, batch)
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"Expected `training_step` to return the loss as one number, but got {type(loss).__name__}.")
    return loss.squeeze()


def slope_of(loss: Tensor, module: nn.Module, *, further: bool = False) -> Tensor:
    """Return the derivative of a loss by a module's weights in a :func:`direction`.

    Two gradients that differ have different ones, except by rare chance.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, weights, create_graph=further, allow_unused=True)
    return direction([one for one in found if one is not None])


def direction(gradients: Sequence[Tensor]) -> Tensor:
    """Return the sum of gradients times fixed random numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([(one * torch.randn(one.shape, generator=generator)).sum() for one in gradients]).sum()


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Distance of two gradients, relative to the length of the second."""
    apart, length = 0.0, 0.0
    for name in {*ours, *theirs}:
        like = theirs.get(name, ours.get(name))
        assert like is not None
        one, other = (side.get(name, torch.zeros_like(like)).detach().double() for side in (ours, theirs))
        apart, length = apart + float((one - other).square().sum()), length + float(other.square().sum())
    return (apart / length) ** 0.5 if length else float("inf") if apart else 0.0


def copy_of(module: LightningModule) -> LightningModule:
    """Copy a module to the CPU, where it logs nothing."""
    try:
        copied: LightningModule = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(f"Expected a `model` that can be copied, but got {type(module).__name__}: {error}") from error
    copied = copied.to("cpu")
    copied.zero_grad(set_to_none=True)
    silent = cast(Any, copied)
    silent.log = silent.log_dict = lambda *args, **kwargs: None
    return copied


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
