"""Smooth versions of a network's kinked functions, which give an attacker more useful derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Name under which the sharpness is passed along with the buffers of a network.
SHARPNESS = "leakage.sharpness"


def smoothed(sharpness: Tensor | None, *, jointly: bool = False) -> contextlib.AbstractContextManager[Any]:
    r"""Context in which kinked functions of :mod:`torch` are smooth; they approach the originals as s grows.

    =============================== =====================================================================
    ReLU                            :math:`p(x) = \log(1 + e^{\beta x}) / \beta`
    leaky, parametric ReLU          :math:`a x + (1 - a) \, p(x)`
    hard tanh, ReLU6                :math:`l + p(x - l) - p(x - u)`
    hard sigmoid, hard swish        built from :math:`p` in the same way
    max pooling of two dimensions   the mean of each window, weighted by :math:`e^{\beta x}`
    =============================== =====================================================================

    Here :math:`\beta = s / \sqrt{\mathrm{mean}\,x^2}`, with the mean over all inputs of the function and without a
    derivative, so that s has the same meaning in every layer of every network. Calls of modules and of functions are
    both replaced.

    Args:
        sharpness: s, positive, of one victim, also under ``vmap``; with None, nothing changes.
        jointly: whether s is ``(V,)`` and the batch holds the first images of V victims, then the second ones, and so
            on. Means are then taken over the inputs of each victim separately.

    Example:
        >>> with smoothed(torch.tensor(2.0)):
        ...     torch.nn.ReLU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.0338, 0.2830, 1.0338])
    """
    return contextlib.nullcontext() if sharpness is None else _Smoothed(sharpness, jointly)


@torch.no_grad()
def has_kinks(network: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether a network computes its outputs for these inputs with a function of the table in :func:`smoothed`.

    Example:
        >>> has_kinks(torch.nn.ReLU(), torch.randn(2, 3)), has_kinks(torch.nn.GELU(), torch.randn(2, 3))
        (True, False)
    """
    plain = network(*inputs)
    with smoothed(torch.ones(()).to(inputs[0])):
        return not torch.equal(network(*inputs), plain)


@torch.no_grad()
def kinks_left(network: Callable[..., Tensor], *inputs: Tensor) -> tuple[str, ...]:
    """Return the names of a network's kinked activations and poolings for which :func:`smoothed` has no smooth version.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Softshrink(), torch.nn.Hardshrink())
        >>> kinks_left(network, torch.randn(2, 3))
        ('softshrink', 'hardshrink')
    """
    with _Recorded() as found:
        network(*inputs)
    return tuple(dict.fromkeys(found.names))


def without_sharpness(buffers: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Separate the buffers of a network from the sharpness passed along with them (None if there is none)."""
    own = dict(buffers)
    return own, own.pop(SHARPNESS, None)


class _Smoothed(TorchFunctionMode):
    def __init__(self, sharpness: Tensor, jointly: bool) -> None:
        super().__init__()
        self.sharpness, self.jointly = sharpness, jointly

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        smooth = _SMOOTH.get(func)
        if smooth is None:
            return func(*args, **given)
        given.pop("inplace", None)
        if "input" in given:
            args = (given.pop("input"), *args)
        if not self.jointly:
            return smooth(self.sharpness, *args, **given)
        inputs, *more = args
        of_victims = inputs.reshape(-1, len(self.sharpness), *inputs.shape[1:])
        apply = vmap(lambda sharpness, own: smooth(sharpness, own, *more, **given), in_dims=(0, 1), out_dims=1)
        return apply(self.sharpness, of_victims).flatten(0, 1)


class _Recorded(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _NOT_SMOOTH:
            self.names.append(_NOT_SMOOTH[func])
        return func(*args, **(kwargs or {}))


def _beta(sharpness: Tensor, x: Tensor) -> Tensor:
    size = x.detach().square().mean().sqrt()
    return sharpness / torch.where(size > 0, size, 1.0)


def _soft(beta: Tensor, x: Tensor) -> Tensor:
    return F.softplus(beta * x, threshold=50) / beta


def _relu(sharpness: Tensor, x: Tensor) -> Tensor:
    return _soft(_beta(sharpness, x), x)


def _leaky_relu(sharpness: Tensor, x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return negative_slope * x + (1 - negative_slope) * _relu(sharpness, x)


def _prelu(sharpness: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    slope = weight.view(-1, *[1] * (x.ndim - 2)) if weight.numel() > 1 and x.ndim > 1 else weight
    return slope * x + (1 - slope) * _relu(sharpness, x)


def _clipped(sharpness: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    beta = _beta(sharpness, x)
    return low + _soft(beta, x - low) - _soft(beta, x - high)


def _hardtanh(sharpness: Tensor, x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return _clipped(sharpness, x, min_val, max_val)


def _relu6(sharpness: Tensor, x: Tensor) -> Tensor:
    return _clipped(sharpness, x, 0.0, 6.0)


def _hardsigmoid(sharpness: Tensor, x: Tensor) -> Tensor:
    return _clipped(sharpness, x, -3.0, 3.0) / 6 + 0.5


def _hardswish(sharpness: Tensor, x: Tensor) -> Tensor:
    return x * _hardsigmoid(sharpness, x)


def _max_pool2d(
    sharpness: Tensor,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,  # F.max_pool2d passes calls that ask for indices to another function
) -> Tensor:
    shape = F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode).shape
    sizes = (_pair(value) for value in (kernel_size, stride or kernel_size, padding, dilation))
    # With `ceil_mode`, windows may reach beyond the padding.
    further = [
        max(0, (count - 1) * step + gap * (kernel - 1) + 1 - length - 2 * pad)
        for count, length, kernel, step, pad, gap in zip(shape[-2:], x.shape[-2:], *sizes, strict=True)
    ]
    options = {"kernel_size": kernel_size, "stride": stride or kernel_size, "padding": padding, "dilation": dilation}
    windows, inside = (
        F.unfold(F.pad(part, (0, further[1], 0, further[0])), **options).view(*x.shape[:2], -1, shape[-2] * shape[-1])
        for part in (x, torch.ones_like(x))
    )
    scores = torch.where(inside > 0, _beta(sharpness, x) * windows, -torch.inf)
    found: Tensor = (scores.softmax(-2) * windows).sum(-2)
    return found.view(shape)


def _pair(value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value,)
    return (pair[0], pair[-1])


_SMOOTH: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    Tensor.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
}

# Each function by its name, as users call it.
_NOT_SMOOTH: dict[Callable[..., Any], str] = {
    F.threshold: "threshold",
    F.hardshrink: "hardshrink",
    F.softshrink: "softshrink",
    F.rrelu: "rrelu",
    torch.max_pool1d: "max_pool1d",
    F.max_pool1d: "max_pool1d",
    F.max_pool3d: "max_pool3d",
    torch.max_pool3d: "max_pool3d",
    F.adaptive_max_pool1d: "adaptive_max_pool1d",
    F.adaptive_max_pool2d: "adaptive_max_pool2d",
    F.adaptive_max_pool3d: "adaptive_max_pool3d",
    torch.abs: "abs",
    Tensor.abs: "abs",
    torch.maximum: "maximum",
    torch.minimum: "minimum",
    torch.amax: "amax",
    Tensor.amax: "amax",
}
