"""Layers, run for V victims at once, whose outputs are affine in their parameters.

Parameters are shared by all victims, or each victim has its own. Tensors are ``(N * V, ...)``: the first images of all
victims, then the second ones, and so on. Viewed as maps ``(N, V * C, H, W)``, they fit a grouped convolution with one
group for each victim without a copy.
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
    """A weight or bias, ``(V, *shape)`` if each victim has its own; ``name`` is None if its gradient is not shared."""

    value: Tensor
    name: str | None


@dataclass
class Layer(ABC):
    """A call of a function that is affine in its weight and bias.

    Attributes:
        inputs: ``(N * V, ...)``.
        weight, bias: the parameters; ``bias`` may be None.
        victims: V.
        own: whether each victim has its own parameters.
    """

    inputs: Tensor
    weight: Parameter
    bias: Parameter | None
    victims: int
    own: bool

    def outputs(self) -> Tensor:
        """Return the outputs of the function, twice differentiable with respect to the inputs."""
        return self._apply(self.weight.value, None if self.bias is None else self.bias.value, self.own)

    def tangent(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return the derivative of the outputs along a direction ``(V, *shape)`` of parameters; differentiable."""
        weight, bias = (None if part is None else direction.get(part.name or "") for part in self._both)
        if weight is None:
            shape = self.weight.value.shape[1:] if self.own else self.weight.value.shape
            weight = self.inputs.new_zeros(self.victims, *shape)
        return self._apply(weight, bias, True, linear=True)

    @property
    def names(self) -> set[str]:
        """The names of the parameters whose gradients are shared."""
        return {part.name for part in self._both if part is not None and part.name is not None}

    def gradients(self, delta: Tensor) -> dict[str, Tensor]:
        """Return the gradients ``(V, *shape)`` of named parameters, given the derivative of a loss by the outputs."""
        made = zip(self._both, (self._by_weight, self._by_bias), strict=True)
        return {part.name: by(delta) for part, by in made if part is not None and part.name is not None}

    @property
    def _both(self) -> tuple[Parameter, Parameter | None]:
        return self.weight, self.bias

    @abstractmethod
    def _apply(self, weight: Tensor, bias: Tensor | None, own: bool, *, linear: bool = False) -> Tensor:
        """Apply the function with any parameters; with ``linear``, only the part that is linear in them."""

    @abstractmethod
    def _by_weight(self, delta: Tensor) -> Tensor:
        """Return the gradient of the weight, ``(V, *shape)``."""

    @abstractmethod
    def _by_bias(self, delta: Tensor) -> Tensor:
        """Return the gradient of the bias, ``(V, *shape)``."""


@dataclass
class Linear(Layer):
    """A call of ``F.linear``, which maps the last dimension of the inputs."""

    def _apply(self, weight: Tensor, bias: Tensor | None, own: bool, *, linear: bool = False) -> Tensor:
        if not own:
            return F.linear(self.inputs, weight, bias)
        rows = self._rows(self.inputs)
        outputs = rows @ weight.mT if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        images = outputs.reshape(self.victims, len(self.inputs) // self.victims, -1).transpose(0, 1)
        return _as(images.contiguous(), (*self.inputs.shape[:-1], outputs.shape[-1]))

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of each victim, ``(V, rows, D)``."""
        images = tensor.reshape(-1, self.victims, *tensor.shape[1:]).transpose(0, 1)
        return images.reshape(self.victims, -1, tensor.shape[-1])

    def _by_weight(self, delta: Tensor) -> Tensor:
        return self._rows(delta).mT @ self._rows(self.inputs)

    def _by_bias(self, delta: Tensor) -> Tensor:
        return self._rows(delta).sum(1)


@dataclass
class Convolution(Layer):
    """A call of ``F.conv1d``, ``F.conv2d`` or ``F.conv3d``.

    Attributes:
        stride, padding, dilation: one number for each dimension.
        groups: number of groups for one victim.
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
        """Merge the victims into the channels, ``(N, V * C, ...)``."""
        return maps.reshape(-1, self.victims * maps.shape[1], *maps.shape[2:])

    def _by_weight(self, delta: Tensor) -> Tensor:
        shape = self.weight.value.shape[1:] if self.own else self.weight.value.shape
        like = self.inputs.new_empty(self.victims * shape[0], *shape[1:])  # only its shape is used
        found = _derivative(
            self._merged(delta), self._merged(self.inputs), like, self._options(self.victims), (False, True)
        )
        return found[1].view(self.victims, *shape)

    def _by_bias(self, delta: Tensor) -> Tensor:
        return delta.flatten(2).sum(2).view(-1, self.victims, delta.shape[1]).sum(0)


@dataclass
class Scaling(Layer):
    """The affine map after a normalisation: a factor and a shift for each channel, or for each element.

    Attributes:
        middle: number of elements in the dimensions between the image dimension and those of the parameters.
        mean, rate: subtracted from the inputs, and then multiplied with them, ``(P,)`` or ``(V, P)``; None if the
            inputs are already normalised.
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
        """Reshape to ``(N, V, middle, P, rest)``."""
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
    """Reshape without a view: if a view is changed in place later, its node in the graph can't be found any more."""
    return torch.ops.aten._unsafe_view(tensor, shape)  # type: ignore[no-any-return]


def normalised(inputs: Tensor, rows: int, eps: float) -> Tensor:
    """Normalise rows of equal length: subtract the mean, and divide by the square root of the variance plus eps."""
    return cast(Tensor, _Normalised.apply(inputs.reshape(1, rows, -1), eps)).view(inputs.shape)


# Two cases in which autograd is slow: for the second derivative of a convolution it also computes the gradient of
# constant weights, and it builds the second derivative of a normalisation from dozens of operations.


def _convolved(maps: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    return cast(Tensor, _Convolved.apply(maps, weight, bias, options))


def _derivative(
    delta: Tensor, maps: Tensor, weight: Tensor, options: tuple[Any, ...], wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of a convolution by its maps and its weight, as far as they are ``wanted``."""
    *geometry, groups = options
    none = [0] * len(geometry[0])
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        delta, maps, weight, None, *geometry, False, none, groups, (*wanted, False)
    )
    return found[:2]


class _Convolved(Function):
    """A convolution whose parameters are constants."""

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
    """The derivative of a convolution by its maps, which is linear in ``delta``."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, weight: Tensor, shape: torch.Size, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.options = options
        like = delta.new_empty(shape)  # only its shape is used
        return _derivative(delta, like, weight, options, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _convolved(tangent, weight, None, ctx.options), None, None, None


class _Normalised(Function):
    r"""Normalises rows ``(1, rows, M)`` to :math:`z = r (x - \bar x)`, :math:`r = (\mathrm{var} + \epsilon)^{-1/2}`."""

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
    r"""The derivative of the normalisation, :math:`B = r (\delta - \bar\delta - z \, \overline{\delta z})`.

    Bars are means over a row. The derivative of :math:`\langle h, B \rangle` by :math:`\delta` is B with h in place of
    :math:`\delta`; its derivative by x is

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
    r"""Return B, and the means :math:`\bar\delta` and :math:`\overline{\delta z}`, each ``(1, rows)``."""
    _, count, length = rows.shape
    by_rows, with_outputs, sums = torch.ops.aten.native_group_norm_backward(
        delta, rows, mean, rate, None, 1, count, length, count, (True, True, True)
    )
    return by_rows, sums[None] / length, with_outputs[None] / length
