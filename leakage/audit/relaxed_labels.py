"""Labels of which each image has several, by their probabilities, in code that was written for one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Functions whose result, if it has as many entries, stands for the same labels.
_SAME = {
    *(Tensor.long, Tensor.int, Tensor.to, Tensor.float, Tensor.double, Tensor.clone, Tensor.contiguous, Tensor.detach),
    *(Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.__getitem__),
    *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze),
}
# Functions that turn a tensor into numbers, which `torch.func` does not allow. Training steps call them for their logs.
_NUMBERS = {Tensor.item, Tensor.__float__}


class RelaxedLabels(TorchFunctionMode):
    """Replace labels by the probabilities of their classes in the functions inside this context.

    Where the labels are passed to ``cross_entropy`` or ``nll_loss``, this is the mean loss over the classes. Where they
    select entries of a tensor (``gather``, ``logits[torch.arange(n), labels]``, ``embedding``), it is the mean of these
    entries, ``one_hot`` gives the probabilities, and labels as floating-point numbers are the mean class. With
    probabilities of 0 and 1, nothing changes.

    Args:
        labels: classes ``(N,)``, or the targets themselves, which are then used as they are.
        targets: probabilities ``(N, K)``.
    """

    def __init__(self, labels: Tensor, targets: Tensor) -> None:
        super().__init__()
        # A list, so that no other tensor takes the place of a label. It is empty if labels are the targets.
        self.held = [] if labels is targets else [labels]
        self.targets = targets

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or what stands for it."""
        kwargs = kwargs or {}
        if function in _NUMBERS:
            return math.nan
        if not any(map(self._is_label, (*args, *kwargs.values()))):
            if function is Tensor.__getitem__ and self._selects(*args):
                return (args[0] * self.targets).sum(1)
            return function(*args, **kwargs)
        if function is F.one_hot:
            classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
            return F.pad(self.targets, (0, max(0, classes - self.targets.shape[1])))
        if function in (F.cross_entropy, F.nll_loss):
            return self._cross_entropy(function, *args, **kwargs)
        if function in (torch.gather, Tensor.gather) and self._gathers(*args, **kwargs):
            return (args[0] * self.targets).sum(1, keepdim=True)
        if function is F.embedding and self._is_label(args[0]) and len(args[1]) == self.targets.shape[1]:
            return (self.targets @ args[1]).reshape(*args[0].shape, -1)
        value = function(*args, **kwargs)
        if function in _SAME and self._is_label(args[0]) and value.numel() == len(self.targets):
            if value.is_floating_point():
                classes = torch.arange(self.targets.shape[1]).to(self.targets)
                return (self.targets @ classes).to(value).reshape(value.shape)
            self.held.append(value)
        return value

    def _is_label(self, one: Any) -> bool:
        return any(one is held for held in self.held)

    def _selects(self, tensor: Tensor, index: Any) -> bool:
        if not isinstance(index, tuple) or len(index) != 2 or not self._is_label(index[1]):
            return False
        return tensor.shape == self.targets.shape and isinstance(index[0], Tensor) and index[0].ndim == 1

    def _gathers(self, tensor: Tensor, dim: int, index: Tensor, **options: Any) -> bool:
        return tensor.shape == self.targets.shape and dim in (1, -1) and tuple(index.shape) == (len(tensor), 1)

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
