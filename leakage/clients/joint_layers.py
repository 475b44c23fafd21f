"""Layers of V victims at once whose outputs are affine in their parameters: each victim's own, or those of all.

Tensors are ``(N * V, ...)``: the first images of all victims, then the second ones. So maps ``(N, V * C, H, W)`` for a
grouped convolution, one group for each victim, are the same numbers in the same order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

_Sizes = list[int]


class Parameter(NamedTuple):
    """A weight or bias, ``(V, *shape)`` if victims have their own; ``name`` is None if its gradient is not shared."""

    value: Tensor
    name: str | None


@dataclass
class Layer(ABC):
    """A call of a function that is affine in its weight and bias.

    Attributes:
        inputs: ``(N * V, ...)``.
        weight, bias: its parameters; there may be no bias.
        victims: V.
        own: whether victims have parameters of their own.
    """

    inputs: Tensor
    weight: Parameter
    bias: Parameter | None
    victims: int
    own: bool

    def outputs(self) -> Tensor:
        """What the function gives, differentiable twice by the inputs."""
        return self._apply(self.weight.value, None if self.bias is None else self.bias.value, self.own)

    def tangent(self, direction: Mapping[str, Tensor]) -> Tensor:
        """The outputs' derivative along a direction ``(V, *shape)`` of named parameters; differentiable too."""
        weight, bias = (None if part is None else direction.get(part.name or "") for part in self._both)
        if weight is None:
            shape = self.weight.value.shape[1:] if self.own else self.weight.value.shape
            weight = self.inputs.new_zeros(self.victims, *shape)
        return self._apply(weight, bias, True, linear=True)

    @property
    def names(self) -> set[str]:
        """Those of its parameters."""
        return {part.name for part in self._both if part is not None and part.name is not None}

    def gradients(self, delta: Tensor) -> dict[str, Tensor]:
        """Those of the named parameters, ``(V, *shape)``, from the derivative of a loss by the outputs."""
        made = zip(self._both, (self._by_weight, self._by_bias), strict=True)
        return {part.name: by(delta) for part, by in made if part is not None and part.name is not None}

    @property
    def _both(self) -> tuple[Parameter, Parameter | None]:
        return self.weight, self.bias

    @abstractmethod
    def _apply(self, weight: Tensor, bias: Tensor | None, own: bool, *, linear: bool = False) -> Tensor:
        """For any parameters; only what is ``linear`` in them, if so."""

    @abstractmethod
    def _by_weight(self, delta: Tensor) -> Tensor:
        """``(V, *shape)``."""

    @abstractmethod
    def _by_bias(self, delta: Tensor) -> Tensor:
        """``(V, *shape)``."""


@dataclass
class Linear(Layer):
    """``F.linear``: the last dimension of the inputs."""

    def _apply(self, weight: Tensor, bias: Tensor | None, own: bool, *, linear: bool = False) -> Tensor:
        if not own:
            return F.linear(self.inputs, weight, bias)
        rows = self._rows(self.inputs)
        outputs = rows @ weight.mT if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        images = outputs.reshape(self.victims, len(self.inputs) // self.victims, -1).transpose(0, 1)
        return _as(images.contiguous(), (*self.inputs.shape[:-1], outputs.shape[-1]))

    def _rows(self, tensor: Tensor) -> Tensor:
        """Those of each victim, ``(V, rows, D)``."""
        images = tensor.reshape(-1, self.victims, *tensor.shape[1:]).transpose(0, 1)
        return images.reshape(self.victims, -1, tensor.shape[-1])

    def _by_weight(self, delta: Tensor) -> Tensor:
        return self._rows(delta).mT @ self._rows(self.inputs)

    def _by_bias(self, delta: Tensor) -> Tensor:
        return self._rows(delta).sum(1)


@dataclass
class Convolution(Layer):
    """``F.conv1d`` to ``F.conv3d``.

    Attributes:
        stride, padding, dilation: for each dimension.
        groups: of a single victim.
    """

    stride: _Sizes
    padding: _Sizes
    dilation: _Sizes
    groups: int

    def _apply(self, weight: Tensor, bias: Tensor | None, own: bool, *, linear: bool = False) -> Tensor:
        if not own:
            return _convolved(self.inputs, weight, bias, self._options(1))
        bias = None if bias is None else bias.flatten()
        outputs = _convolved(self._merged(self.inputs), weight.flatten(0, 1), bias, self._options(self.victims))
        return _as(outputs, (len(self.inputs), outputs.shape[1] // self.victims, *outputs.shape[2:]))

    def _options(self, victims: int) -> tuple[_Sizes, _Sizes, _Sizes, int]:
        return self.stride, self.padding, self.dilation, victims * self.groups

    def _merged(self, maps: Tensor) -> Tensor:
        """``(N, V * C, ...)``."""
        return maps.reshape(-1, self.victims * maps.shape[1], *maps.shape[2:])

    def _by_weight(self, delta: Tensor) -> Tensor:
        shape = self.weight.value.shape[1:] if self.own else self.weight.value.shape
        like = self.inputs.new_empty(self.victims * shape[0], *shape[1:])  # nothing is read of it
        found = _derivative(
            self._merged(delta), self._merged(self.inputs), like, self._options(self.victims), (False, True)
        )
        return found[1].view(self.victims, *shape)

    def _by_bias(self, delta: Tensor) -> Tensor:
        return delta.flatten(2).sum(2).view(-1, self.victims, delta.shape[1]).sum(0)


@dataclass
class Scaling(Layer):
    """What follows a normalisation: one factor and one shift for each channel, or for each element of the last ones.

    Attributes:
        middle: numbers in the dimensions between that of the images and those of the parameters.
        mean, rate: subtracted from the inputs, and multiplied with them, before: ``(P,)`` or ``(V, P)``; None for
            inputs that are normalised.
    """

    middle: int
    mean: Tensor | None
    rate: Tensor | None

    def _apply(self, weight: Tensor, bias: Tensor | None, own: bool, *, linear: bool = False) -> Tensor:
        factor, shift = self._spread(weight, own), None if bias is None else self._spread(bias, own)
        if self.rate is not None and self.mean is not None:
            factor = factor * self._spread(self.rate, self.own)
            less = factor * self._spread(self.mean, self.own)
            shift = -less if shift is None else shift - less
        outputs = self._parted(self.inputs) * factor
        return _as(outputs if shift is None else outputs.add_(shift), self.inputs.shape)

    def _spread(self, parameter: Tensor, own: bool) -> Tensor:
        return parameter.reshape(1, self.victims if own else 1, 1, -1, 1)

    def _parted(self, tensor: Tensor) -> Tensor:
        """``(N, V, middle, P, rest)``."""
        return tensor.reshape(-1, self.victims, self.middle, self._shape.numel(), self._rest)

    @property
    def _shape(self) -> torch.Size:
        return self.weight.value.shape[1:] if self.own else self.weight.value.shape

    @property
    def _rest(self) -> int:
        return math.prod(self.inputs.shape[1:]) // (self.middle * self._shape.numel())

    def _by_weight(self, delta: Tensor) -> Tensor:
        found = self._summed(delta * self.inputs)
        if self.rate is not None and self.mean is not None:
            found = (found - self.mean * self._summed(delta)) * self.rate
        return found.view(self.victims, *self._shape)

    def _by_bias(self, delta: Tensor) -> Tensor:
        return self._summed(delta).view(self.victims, *self._shape)

    def _summed(self, tensor: Tensor) -> Tensor:
        return self._parted(tensor).sum(4).sum((0, 2))


def _as(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Of another shape, but no view: a view that is changed in place later would not be found in the graph again."""
    return torch.ops.aten._unsafe_view(tensor, shape)  # type: ignore[no-any-return]


def normalised(inputs: Tensor, rows: int, eps: float) -> Tensor:
    """Inputs in rows of equal length, each with its mean subtracted and divided by the root of its variance + eps."""
    return cast(Tensor, _Normalised.apply(inputs.reshape(1, rows, -1), eps)).view(inputs.shape)


# What autograd does not do well: it makes the gradient of constant weights when it differentiates a convolution twice,
# and the second derivative of a normalisation out of dozens of operations.


def _convolved(maps: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    return cast(Tensor, _Convolved.apply(maps, weight, bias, options))


def _derivative(
    delta: Tensor, maps: Tensor, weight: Tensor, options: tuple[Any, ...], wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """By maps and by weight, those that are wanted."""
    *geometry, groups = options
    none = [0] * len(geometry[0])
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        delta, maps, weight, None, *geometry, False, none, groups, (*wanted, False)
    )
    return found[:2]


class _Convolved(Function):
    """A convolution with constants."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = maps.shape, options
        *geometry, groups = options
        none = [0] * len(geometry[0])
        outputs: Tensor = torch.ops.aten.convolution(maps, weight, bias, *geometry, False, none, groups)
        return outputs

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        return _Transposed.apply(delta, *ctx.saved_tensors, ctx.shape, ctx.options), None, None, None


class _Transposed(Function):
    """Its derivative by the maps, which is linear in ``delta``."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, weight: Tensor, shape: torch.Size, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.options = options
        like = delta.new_empty(shape)  # nothing is read of it
        return _derivative(delta, like, weight, options, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _convolved(tangent, weight, None, ctx.options), None, None, None


class _Normalised(Function):
    r"""Rows :math:`z = r (x - \bar x)` of ``(1, rows, M)`` with :math:`r = (\mathrm{var}(x) + \epsilon)^{-1/2}`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, eps: float) -> Tensor:
        found: tuple[Tensor, Tensor, Tensor] = torch.native_group_norm(
            rows, None, None, 1, rows.shape[1], rows.shape[2], rows.shape[1], eps
        )
        ctx.save_for_backward(rows, *found)
        return found[0]

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        return _NormalisedBack.apply(delta, *ctx.saved_tensors), None


class _NormalisedBack(Function):
    r"""Its derivative :math:`B = r (\delta - \bar\delta - z \, \overline{\delta z})`, bars for means over a row.

    Of :math:`\langle h, B \rangle`, the one by :math:`\delta` is the same with h for :math:`\delta`, the one by x

    .. math:: -r^2 \left( \overline{\delta z} (h - \bar h) + \overline{h z} (\delta - \bar\delta)
        + z \left( \overline{h \delta} - \bar h \bar\delta - 3 \, \overline{h z} \, \overline{\delta z} \right) \right)
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor, rows: Tensor, outputs: Tensor, mean: Tensor, rate: Tensor) -> Tensor:
        delta = delta.contiguous()
        found, *means = _normalised_back(delta, rows, mean, rate)
        ctx.save_for_backward(delta, rows, outputs, mean, rate, *means)
        return found

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        delta, rows, outputs, mean, rate, of_delta, with_delta = ctx.saved_tensors
        tangent = tangent.contiguous()
        by_delta, of_tangent, with_tangent = _normalised_back(tangent, rows, mean, rate)
        both = (tangent * delta).mean(2)
        on_outputs = both - of_tangent * of_delta - 3 * with_tangent * with_delta
        square = -rate.square()
        # Broadcasting in `addcmul` is several times slower than two operations.
        by_rows = tangent * (square * with_delta)[..., None]
        by_rows += delta * (square * with_tangent)[..., None]
        by_rows += outputs * (square * on_outputs)[..., None]
        by_rows -= (square * (with_delta * of_tangent + with_tangent * of_delta))[..., None]
        return by_delta, by_rows, None, None, None


def _normalised_back(delta: Tensor, rows: Tensor, mean: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""B, and the means :math:`\bar\delta` and :math:`\overline{\delta z}` ``(1, rows)``."""
    _, count, length = rows.shape
    by_rows, with_outputs, sums = torch.ops.aten.native_group_norm_backward(
        delta, rows, mean, rate, None, 1, count, length, count, (True, True, True)
    )
    return by_rows, sums[None] / length, with_outputs[None] / length
