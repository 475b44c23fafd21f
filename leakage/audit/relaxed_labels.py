"""Labels of which each image has several, by their probabilities, in code that was written for one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Functions whose result, if it has as many entries, stands for the same labels.
_SAME = {
    *(Tensor.long, Tensor.int, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double),
    *(Tensor.clone, Tensor.contiguous, Tensor.detach, Tensor.view, Tensor.reshape, Tensor.flatten),
    *(Tensor.squeeze, Tensor.unsqueeze, Tensor.__getitem__),
    *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze),
}
# Functions that turn a tensor into a number, which `torch.func` does not allow. Training steps use them for logs.
_NUMBERS = {Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__}
_CASTS = {Tensor.float, Tensor.to, Tensor.type}


class RelaxedLabels(TorchFunctionMode):
    """Replace labels by the probabilities of their classes in the functions inside this context.

    Where the labels are passed to ``cross_entropy`` or ``nll_loss``, this is the mean loss over the classes. Where they
    select entries of a tensor (``gather``, ``logits[torch.arange(n), labels]``, ``weight[labels]``, ``embedding``), it
    is the mean of these entries, ``one_hot`` gives the probabilities, and labels as floating-point numbers are the mean
    class. With probabilities of 0 and 1, nothing changes.

    Inside, tensors of double precision stay so if they are converted to single precision, and numbers that
    ``torch.func`` does not know are :class:`Unknown`.

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
        given = [*args, *kwargs.values()]
        if any(isinstance(one, Unknown) for one in given):
            raise ValueError(Unknown.message)  # a TypeError would make torch ask the number for the result
        if function in _NUMBERS:
            return _number(function, *args, **kwargs)
        if function in _CASTS and self.targets.dtype == torch.float64 and args[0].is_floating_point():
            args = tuple(torch.float64 if one is torch.float32 else one for one in args)
            kwargs = {name: torch.float64 if one is torch.float32 else one for name, one in kwargs.items()}
            function = Tensor.double if function is Tensor.float else function
        tensor = given[0] if given else None
        index = args[1] if function is Tensor.__getitem__ else None
        if not any(map(self._is_label, given)):
            if isinstance(tensor, Tensor) and self._is_diagonal(tensor, index):
                return (tensor * self.targets).sum(1)
            return function(*args, **kwargs)
        if function is F.one_hot:
            classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
            padded = F.pad(self.targets, (0, max(0, classes - self.targets.shape[1])))
            return padded.reshape(*given[0].shape, -1)
        if function in (F.cross_entropy, F.nll_loss):
            return self._cross_entropy(function, *args, **kwargs)
        if function in (torch.gather, Tensor.gather):
            options = {**dict(zip(("input", "dim", "index"), args, strict=False)), **kwargs}
            tensor, index = options["input"], options["index"]
            if tensor.shape == self.targets.shape and options["dim"] in (1, -1) and index.shape == (len(tensor), 1):
                return (tensor * self.targets).sum(1, keepdim=True)
        if function is F.embedding and self._is_label(given[0]) and given[1].is_floating_point():
            return self._means(given[1], given[0])
        if function is Tensor.__getitem__ and self._is_label(index) and args[0].is_floating_point():
            return self._means(args[0], args[1])
        value = function(*args, **kwargs)
        if function in _SAME and self._is_label(given[0]) and self._keeps_order(value, index):
            if value.is_floating_point():
                classes = torch.arange(self.targets.shape[1]).to(self.targets)
                return (self.targets @ classes).reshape(value.shape)
            self.held.append(value)
        return value

    def _is_label(self, one: Any) -> bool:
        return any(one is held for held in self.held)

    def _is_diagonal(self, tensor: Tensor, index: Any) -> bool:
        if not isinstance(index, tuple) or len(index) != 2 or not self._is_label(index[1]):
            return False
        rows = isinstance(index[0], list | range) or (isinstance(index[0], Tensor) and index[0].ndim == 1)
        return tensor.shape == self.targets.shape and rows

    def _means(self, table: Tensor, labels: Tensor) -> Tensor:
        found = self.targets @ table[: self.targets.shape[1]].flatten(1).to(self.targets)
        return found.reshape(*labels.shape, *table.shape[1:])

    def _keeps_order(self, value: Tensor, index: Any) -> bool:
        parts = index if isinstance(index, tuple) else (index,)
        return value.numel() == len(self.targets) and not any(isinstance(part, Tensor | list) for part in parts)

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
        sizes, ignored = known @ weights, options.get("ignore_index", -100)
        if 0 <= ignored < known.shape[1]:
            losses, sizes = (part * (1 - known[:, ignored]) for part in (losses, sizes))
        reduction = options.get("reduction", "mean")
        if reduction == "none":
            return losses
        return losses.sum() / sizes.sum() if reduction == "mean" else losses.sum()


class Unknown(float):
    """A number that ``torch.func`` does not know: it can be logged, but not compared or used in a loss."""

    message = (
        "Expected `training_step` to use numbers of tensors, such as `loss.item()`, only for its logs, but got one "
        "that the loss may depend on. Use the tensor itself."
    )

    def _refuse(self, *others: object) -> Any:
        raise ValueError(self.message)

    def _stay(self, *others: object) -> Unknown:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _stay
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __abs__ = _stay
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = _refuse
    __hash__ = float.__hash__


def _number(function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(tensor, *args, **kwargs)
    except RuntimeError:  # the tensor has a value for each of the clients that run at once
        if function is Tensor.__int__:
            return 0
        return torch.zeros(tensor.shape).tolist() if tensor.ndim and function is Tensor.tolist else Unknown(0.0)
