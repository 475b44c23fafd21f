"""The loss of a training step: one that clients can declare, or any other that attacks can differentiate."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import Metric, MetricCollection

from leakage.audit.data import seeded
from leakage.audit.relaxed_labels import RelaxedLabels
from leakage.audit.subject import LOSSES, Loss, loss_of, slope_of
from leakage.clients.protocol import Protocol, are_probabilities

_NAMES = {function.__name__: name for function, name in LOSSES.items()}
# The largest relative difference between targets that count as the same.
_SAME_TARGETS = 1e-4
# The number of seeds that must not change the loss, and the largest number of batches of other labels that are tried.
_SEEDS, _MOST_TRIALS = 10, 32


class LossError(ValueError):
    """The loss can't be simulated."""


class OwnLoss(nn.Module):
    """The loss of a ``training_step``, for a :class:`leakage.Victim` with loss ``"own"``.

    A step that takes labels as classes gets the most probable class of each image, and probabilities where it can use
    them (:class:`~leakage.audit.relaxed_labels.RelaxedLabels`), so that labels can be searched for.

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
        for part in self.module.modules():
            if isinstance(part, LightningModule):  # only `part.to()` would tell it
                part._dtype, part._device = images.dtype, images.device
        with RelaxedLabels(labels, targets):
            return loss_of(self.module, self.to_batch(images, labels))

    def use_of_labels(self, images: Tensor, labels: Tensor, seed: int) -> str:
        """Return what the gradient for some images uses of their labels.

        Returns:
            See :attr:`leakage.audit.subject.Subject.uses`.

        Raises:
            LossError: the loss is not finite, or depends on random numbers.
        """
        own = copy.deepcopy(self)  # BatchNorm changes its statistics
        targets = F.one_hot(labels, self.num_classes).to(images) if self.classes else labels.to(images)
        first = own._slope(images, targets, seed)
        if not bool(first.isfinite().all()):
            raise LossError(
                "a loss that is not finite; if a metric of torchmetrics is a part of it, compute it without"
            )
        pair = images[:2], targets[:2]
        if len({float(own._slope(*pair, other)) for other in range(seed, seed + _SEEDS)}) > 1:
            raise LossError("a loss that depends on random numbers, other than those of `torch.nn.Dropout`")
        soft = self.classes or are_probabilities(labels)
        if soft:
            known = targets.argmax(1)
            shifts = range(1, min(_MOST_TRIALS + 1, self.num_classes))
            others = [F.one_hot((known + by) % self.num_classes, self.num_classes).to(images) for by in shifts]
        else:
            others = [targets + 1, targets.roll(1, 0)]
        if all(torch.equal(own._slope(images, other, seed), first) for other in others):
            return "nothing"
        if not soft:
            return "numbers"
        even = torch.full_like(targets, 1 / self.num_classes).requires_grad_()
        slope = torch.autograd.grad(own._slope(images, even, seed, further=True), even, allow_unused=True)[0]
        return "numbers" if slope is None or not bool((slope != 0).any()) else "classes"

    def _slope(self, images: Tensor, targets: Tensor, seed: int, *, further: bool = False) -> Tensor:
        with seeded(seed), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # only it can be differentiated twice
            return slope_of(self(images, targets), self.module, further=further)


def _no_metric(*given: Any, **options: Any) -> Tensor:
    return torch.tensor(math.nan)


def _no_metrics(*given: Any, **options: Any) -> dict[str, Tensor]:
    return defaultdict(_no_metric)


def known_loss(loss: Tensor, calls: list[Loss], labels: Tensor, kind: str) -> Loss | str:
    """Return the call that computed a loss which clients can declare, or what the loss is instead.

    Args:
        loss: the loss that ``training_step`` returned.
        calls: the loss functions that it called.
        labels: all labels, ``(M,)`` or ``(M, K)``, those of its batch first.
        kind: what labels are, a member of :data:`leakage.clients.protocol.LABEL_KINDS`.
    """
    if not calls:
        return "a loss that is not a function of torch.nn.functional"
    same = [call for call in calls if call.value.numel() == 1 and torch.equal(call.value.squeeze(), loss)]
    if not same:
        return (
            f"a loss that is more than {', '.join(sorted({call.name for call in calls}))}, such as a sum or a multiple"
        )
    call = same[0]
    if call.name not in _NAMES:
        return f"the loss {call.name}"
    if call.given.ndim != 2:
        return f"a loss of outputs {tuple(call.given.shape)} instead of logits (N, K)"
    if kind == "classes" and bool((labels == call.options.get("ignore_index", -100)).any()):
        return f"the loss {call.name} with ignored labels"
    labels = labels[: len(call.given)]
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
    return bool((one - other).norm() <= _SAME_TARGETS * other.norm() + 1e-12)
