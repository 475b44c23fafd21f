"""The loss of a training step: one that clients can declare, or any other that attacks can differentiate."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric, MetricCollection

from leakage.audit.data import seeded
from leakage.audit.subject import LOSSES, Loss, loss_of
from leakage.clients.protocol import Protocol, are_probabilities

_NAMES = {function.__name__: name for function, name in LOSSES.items()}
# The largest relative difference between two ways to compute the same value in single precision.
_SAME_VALUE = 1e-4

# Functions whose result stands for the same labels as before.
_SAME = {
    *(Tensor.long, Tensor.int, Tensor.to, Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.squeeze),
    *(Tensor.clone, Tensor.contiguous, Tensor.detach, Tensor.float, Tensor.double),
    *(torch.flatten, torch.squeeze, torch.reshape),
}
# Functions that turn a tensor into numbers, which `torch.func` does not allow. Training steps call them for their logs.
_NUMBERS = {Tensor.item, Tensor.__float__}


class OwnLoss(nn.Module):
    """The loss of a ``training_step``, for a :class:`leakage.Victim` with loss ``"own"``.

    A step that takes labels as classes gets the most probable class of each image. Where it passes them on to
    ``cross_entropy``, ``nll_loss`` or ``one_hot``, or converts them to floats, the probabilities of the classes (or the
    mean class) are used instead, so that labels can be searched for.

    Args:
        module: a module whose ``training_step`` returns a loss; its metrics are turned off.
        to_batch: a function that makes a batch for it from images in [0, 1] and labels.
        num_classes: K.
        classes: whether labels are classes; if not, the step gets the targets as they are.
    """

    def __init__(
        self, module: LightningModule, to_batch: Callable[[Tensor, Tensor], Any], num_classes: int, *, classes: bool
    ) -> None:
        super().__init__()
        self.module, self.to_batch, self.num_classes, self.classes = module, to_batch, num_classes, classes
        for part in module.modules():
            # Metrics keep state, and compute what no attack needs.
            if isinstance(part, Metric | MetricCollection):
                off: Any = _no_metrics if isinstance(part, MetricCollection) else _no_metric
                vars(part).update(forward=off, update=off, compute=off)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the loss, one number, for images ``(N, C, H, W)`` in [0, 1] and targets ``(N, K)``."""
        labels = targets.detach().argmax(-1) if self.classes else targets
        with _kept(self.module), _Relaxed(labels, targets):
            return loss_of(self.module, self.to_batch(images, labels))

    def use_of_labels(self, images: Tensor, labels: Tensor, seed: int) -> str:
        """Return what the loss of some images uses of their labels, see :class:`~leakage.audit.subject.Subject`."""
        targets = F.one_hot(labels, self.num_classes).to(images) if self.classes else labels.to(images)
        soft = self.classes or are_probabilities(labels)
        values = []
        for given in (targets, targets.roll(1, 1) if soft else targets + 1):
            with seeded(seed), torch.no_grad():
                values.append(copy.deepcopy(self)(images, given))
        if torch.equal(*values):
            return "nothing"
        if not soft:
            return "numbers"
        even = torch.full_like(targets, 1 / self.num_classes).requires_grad_()
        with seeded(seed), torch.enable_grad():
            slope = torch.autograd.grad(copy.deepcopy(self)(images, even), even, allow_unused=True)[0]
        return "numbers" if slope is None or not bool((slope != 0).any()) else "classes"


def _no_metric(*given: Any, **options: Any) -> Tensor:
    return torch.tensor(math.nan)


def _no_metrics(*given: Any, **options: Any) -> dict[str, Tensor]:
    return {}


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Undo what is added to a module's lists, which would hold the graphs of all evaluations."""
    held = {name: value for name, value in vars(module).items() if isinstance(value, list | deque)}
    before = {name: list(value) for name, value in held.items()}
    try:
        yield
    finally:
        for name, value in held.items():
            value.clear()
            value.extend(before[name])


class _Relaxed(TorchFunctionMode):
    """Replace labels by the probabilities ``(N, K)`` of their classes where a loss can use these."""

    def __init__(self, labels: Tensor, targets: Tensor) -> None:
        super().__init__()
        # A list, so that no other tensor takes the place of a label. It is empty if labels are the targets.
        self.held = [] if labels is targets else [labels]
        self.targets = targets

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _NUMBERS:
            return math.nan
        given = {id(one) for one in (*args, *kwargs.values())}
        if not any(id(held) in given for held in self.held):
            return function(*args, **kwargs)
        if function is F.one_hot:
            classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
            return F.pad(self.targets, (0, max(0, classes - self.targets.shape[1])))
        if function in (F.cross_entropy, F.nll_loss):
            return self._cross_entropy(function, *args, **kwargs)
        value = function(*args, **kwargs)
        if function in _SAME and value.numel() == self.held[0].numel():
            if value.is_floating_point():
                classes = torch.arange(self.targets.shape[1]).to(self.targets)
                return (self.targets @ classes).to(value).reshape(value.shape)
            self.held.append(value)
        return value

    def _cross_entropy(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        logits, weight, known = options["input"], options.get("weight"), self.targets
        if logits.shape != known.shape:
            return function(*args, **kwargs)
        weights = torch.ones(known.shape[1]).to(known) if weight is None else weight.to(known)
        smoothing = options.get("label_smoothing", 0.0)
        likely = logits.log_softmax(1) if function is F.cross_entropy else logits
        losses = -(((1 - smoothing) * known + smoothing / known.shape[1]) * weights * likely).sum(1)
        reduction = options.get("reduction", "mean")
        if reduction == "none":
            return losses
        return losses.sum() / (known @ weights).sum() if reduction == "mean" else losses.sum()


def known_loss(loss: Tensor, calls: list[Loss], labels: Tensor, kind: str) -> Loss | str:
    """Return the call that computed a loss which clients can declare, or what the loss is instead.

    Args:
        loss: the loss that ``training_step`` returned.
        calls: the loss functions that it called.
        labels: the labels of its batch, ``(N,)`` or ``(N, K)``.
        kind: what labels are, a member of :data:`leakage.clients.protocol.LABEL_KINDS`.
    """
    if not calls:
        return "a loss that is not a function of torch.nn.functional"
    same = [call for call in calls if call.value.numel() == 1 and _near(call.value.squeeze(), loss)]
    if not same:
        return (
            f"a loss that is more than {', '.join(sorted({call.name for call in calls}))}, such as a sum or a multiple"
        )
    call = same[0]
    if call.name not in _NAMES:
        return f"the loss {call.name}"
    if call.given.ndim != 2:
        return f"a loss of outputs {tuple(call.given.shape)} instead of logits (N, K)"
    options = declared(call, kind)
    if options["loss"] == "mean_squared_error" and options["reduction"] == "sum":
        return "the loss mse_loss with reduction 'sum'"
    try:
        protocol = Protocol((1, 1, 1), call.given.shape[1], len(labels), **options)
    except ValueError as error:
        return f"a loss with options that attacks do not know: {error}"
    if kind == "classes" and labels.max() >= protocol.num_classes:
        return "a loss of other targets than the labels"
    expected = labels
    if call.targets.shape != labels.shape:  # one-hot labels
        plain = replace(protocol, class_weights=None, label_smoothing=0)
        expected = plain.targets(labels, call.given.dtype)
    if call.targets.shape != expected.shape or not _near(call.targets.to(loss), expected.to(loss)):
        return "a loss of other targets than the labels"
    return call


def declared(call: Loss, kind: str) -> dict[str, Any]:
    """Return the options of a :class:`leakage.Victim` that trains with this loss."""
    weights, smoothing = call.options.get("weight"), call.options.get("label_smoothing")
    return {
        "loss": _NAMES[call.name],
        "reduction": str(call.options.get("reduction", "mean")),
        "label_smoothing": float(smoothing or 0.0),
        "class_weights": None if weights is None else tuple(weights.tolist()),
        "label_kind": kind,
    }


def _near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= _SAME_VALUE * other.norm() + 1e-12)
