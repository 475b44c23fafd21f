"""The layers of a chain for V victims at once: outputs, derivatives, and both along the residual of the gradients.

Autograd could do this in less code, but this is about twice as fast as ``vmap(grad_and_value(...))``.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional as F
from torchvision.transforms import Normalize

from leakage.clients.chain import Link
from leakage.clients.low_rank import split
from leakage.models.derivatives import ACTIVATIONS
from leakage.models.layers import AveragePooling

# With fewer channels per group, a matrix product with all patches is faster than a grouped convolution.
_FEWEST_CHANNELS = 4
# Number of products summed at once in a last layer with many features.
_ADDED = 64


class Step(ABC):
    """One module for V victims. All tensors are ``(V, N, *shape)``; each method stores what later methods need."""

    parameters: Sequence[_Parameter] = ()

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs."""

    @abstractmethod
    def backward(self, delta: Tensor) -> Tensor:
        """Return the loss's derivative by the inputs from that by the outputs; undefined up to the first layer."""

    @abstractmethod
    def tangent(self, tangent: Tensor) -> Tensor:
        """Return the outputs' derivative along the residual from that of the inputs."""

    @abstractmethod
    def tangent_backward(self, tangent: Tensor) -> Tensor:
        """Return the derivative along the residual of the result of :meth:`backward`, from that of its argument."""

    def distances(self) -> list[Tensor]:
        """Return the squared norms ``(V,)`` of the residuals of the module's parameters."""
        return []


class _Activation(Step):
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.bend: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, self.slope, self.curvature = ACTIVATIONS[type(self.module)](self.module, inputs)
        return outputs

    def backward(self, delta: Tensor) -> Tensor:
        self.delta = delta
        return self.slope * delta

    def tangent(self, tangent: Tensor) -> Tensor:
        if self.curvature is not None:
            self.bend = (self.curvature * tangent).mul_(self.delta)
        return self.slope * tangent

    def tangent_backward(self, tangent: Tensor) -> Tensor:
        return self.slope * tangent if self.bend is None else torch.addcmul(self.bend, self.slope, tangent)


class _Scaling(Step):
    def __init__(self, module: Normalize, like: Tensor) -> None:
        both = (torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in (module.mean, module.std))
        self.mean, self.std = (value[:, None, None] for value in both)

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - self.mean) / self.std

    def backward(self, delta: Tensor) -> Tensor:
        return delta / self.std

    def tangent(self, tangent: Tensor) -> Tensor:
        return tangent / self.std

    def tangent_backward(self, tangent: Tensor) -> Tensor:
        return tangent / self.std


class _Pooling(Step):
    def __init__(self, plan: Plan) -> None:
        pool = plan.module if isinstance(plan.module, nn.AvgPool2d) else nn.AvgPool2d(2)
        self.size = plan.input_shape[1:]
        sizes = pool.kernel_size, pool.stride, pool.padding
        self.options: Any = (*sizes, pool.ceil_mode, pool.count_include_pad, pool.divisor_override)

    def forward(self, inputs: Tensor) -> Tensor:
        self.shape, self.inputs = inputs.shape, self._merged(inputs)
        return self.tangent(inputs)

    def backward(self, delta: Tensor) -> Tensor:
        by_inputs: Tensor = torch.ops.aten.avg_pool2d_backward(_merge(delta), self.inputs, *self.options)
        return _split(by_inputs, len(delta)).reshape(self.shape)

    def tangent(self, tangent: Tensor) -> Tensor:
        return _split(F.avg_pool2d(self._merged(tangent), *self.options), len(tangent))

    def tangent_backward(self, tangent: Tensor) -> Tensor:
        return self.backward(tangent)

    def _merged(self, inputs: Tensor) -> Tensor:
        return _merge(inputs.reshape(*inputs.shape[:2], -1, *self.size))


@dataclass
class _Parameter:
    """A weight or bias ``(V or 1, *shape)``, the gradient that victims shared of it (or None), and the residual."""

    value: Tensor
    shared: Tensor | None
    residual: Tensor = dataclasses.field(init=False)


class _Layer(Step):
    """A layer with weights: a linear map of its inputs, in the layout that is fastest for it."""

    def __init__(self, plan: Plan, weight: _Parameter, bias: _Parameter | None) -> None:
        self.first, self.weight, self.bias = plan.first, weight, bias
        self.parameters = [weight] if bias is None else [weight, bias]

    @abstractmethod
    def _enter(self, inputs: Tensor) -> Tensor:
        """Return the inputs in the layout of the layer."""

    def _enter_back(self, delta: Tensor) -> Tensor:
        """Return derivatives by the outputs in the layout of the layer."""
        return delta

    @abstractmethod
    def _apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the outputs for any weight and bias."""

    @abstractmethod
    def _transposed(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return derivatives by the inputs, summed over pairs of derivatives by the outputs and weights."""

    @abstractmethod
    def _by_parameters(self) -> list[Tensor]:
        """Return the gradients of the parameters."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.shape = inputs.shape
        self.inputs = self._enter(inputs)
        return self._apply(self.inputs, self.weight.value, None if self.bias is None else self.bias.value)

    def backward(self, delta: Tensor) -> Tensor:
        self.delta = self._enter_back(delta)
        for parameter, gradient in zip(self.parameters, self._by_parameters(), strict=True):
            parameter.residual = gradient.zero_() if parameter.shared is None else gradient.sub_(parameter.shared)
        return delta if self.first else self._transposed((self.delta, self.weight.value)).reshape(self.shape)

    def distances(self) -> list[Tensor]:
        return [vector_norm(parameter.residual.flatten(1), dim=1).square() for parameter in self.parameters]

    def tangent(self, tangent: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.residual
        outputs = self._apply(self.inputs, self.weight.residual, bias)
        return outputs if self.first else outputs.add_(self._apply(self._enter(tangent), self.weight.value, None))

    def tangent_backward(self, tangent: Tensor) -> Tensor:
        pairs = (self._enter_back(tangent), self.weight.value), (self.delta, self.weight.residual)
        return self._transposed(*pairs).reshape(self.shape)


class _Linear(_Layer):
    """A linear layer, on rows ``(V, N, D)``."""

    def _enter(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(2)

    def _apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        outputs = inputs @ _one_or_each(weight).mT
        return outputs if bias is None else outputs.add_(bias[:, None])

    def _transposed(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        return _sum([delta @ _one_or_each(weight) for delta, weight in pairs])

    def _by_parameters(self) -> list[Tensor]:
        one = self.shape[1] == 1  # a single image: the product of a column and a row
        by_weight = self.delta.mT * self.inputs if one else self.delta.mT @ self.inputs
        return [by_weight, self.delta.sum(1)][: len(self.parameters)]


class _LowRankLinear(_Linear):
    r"""A last layer whose gradient is given in a basis Q of its columns (:mod:`leakage.clients.low_rank`).

    The residual of its weights is :math:`Q S + R^\top H`; only the factors are computed. The weights are large and are
    not padded, so inputs that the layer before added only for speed are ignored.
    """

    def __init__(self, plan: Plan, weight: _Parameter, bias: _Parameter | None, basis: Tensor) -> None:
        super().__init__(plan, weight, bias)
        self.basis = basis
        self.columns = _one_or_each(weight.value)

    def _enter(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(2)[..., : self.columns.shape[-2]]

    def _apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # In parts, because a single sum of so many products would have a larger rounding error than the clients' own.
        pairs = zip(torch.split(inputs, _ADDED, dim=-1), torch.split(self.columns, _ADDED, dim=-2), strict=True)
        outputs = torch.stack([part @ columns for part, columns in pairs]).sum(0)
        return outputs if bias is None else outputs.add_(bias[:, None])

    def _leave(self, by_inputs: Tensor) -> Tensor:
        return F.pad(by_inputs, [0, math.prod(self.shape[2:]) - by_inputs.shape[2]]).reshape(self.shape)

    def backward(self, delta: Tensor) -> Tensor:
        assert self.weight.shared is not None
        self.delta = delta
        self.in_basis, self.outside = split(delta, self.basis)
        self.inside = (self.in_basis.mT @ self.inputs).sub_(self.weight.shared)
        if self.bias is not None:
            by_bias = delta.sum(1)
            self.bias.residual = by_bias.zero_() if self.bias.shared is None else by_bias.sub_(self.bias.shared)
        return delta if self.first else self._leave(delta @ self.columns.mT)

    def distances(self) -> list[Tensor]:
        products = (self.outside @ self.outside.mT) * (self.inputs @ self.inputs.mT)
        parts = [self.inside.square().sum((1, 2)), products.sum((1, 2)).clamp(min=0)]
        return parts if self.bias is None else [*parts, self.bias.residual.square().sum(1)]

    def tangent(self, tangent: Tensor) -> Tensor:
        outputs = self.inputs @ self.inside.mT @ self.basis.mT
        outputs += self.inputs @ self.inputs.mT @ self.outside
        if self.bias is not None:
            outputs += self.bias.residual[:, None]
        return outputs if self.first else outputs.add_(self._apply(self._enter(tangent), self.weight.value, None))

    def tangent_backward(self, tangent: Tensor) -> Tensor:
        by_inputs = tangent @ self.columns.mT
        by_inputs += self.in_basis @ self.inside
        return self._leave(by_inputs.add_(self.delta @ self.outside.mT @ self.inputs))


class _GroupedConvolution(_Layer):
    """A convolution of maps ``(N, V * C, H, W)`` with one group per victim, or one group if they share weights."""

    def __init__(self, plan: Plan, weight: _Parameter, bias: _Parameter | None) -> None:
        super().__init__(plan, weight, bias)
        geometry = plan.geometry
        left, _, top, _ = geometry.padding
        self.geometry = geometry.stride, (top, left), geometry.dilation
        self.input_shape = weight.value.shape[2], *plan.input_shape[1:]

    def _enter(self, inputs: Tensor) -> Tensor:
        return _merge(inputs.reshape(*inputs.shape[:2], *self.input_shape))

    def _enter_back(self, delta: Tensor) -> Tensor:
        return _merge(delta)

    def _apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        groups = len(weight)
        bias = None if bias is None else bias.flatten()
        maps = F.conv2d(self._in_groups(inputs, groups), weight.flatten(0, 1), bias, *self.geometry, groups)
        return self._split(maps)

    def _transposed(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        parts = [self._backward(delta, weight, (True, False, False))[0] for delta, weight in pairs]
        return self._split(_sum([part.reshape(self.inputs.shape) for part in parts]))

    def _by_parameters(self) -> list[Tensor]:
        weight = self.weight.value.expand(self.shape[0], *self.weight.value.shape[1:])
        gradients = self._backward(self.delta, weight, (False, True, self.bias is not None))[1:]
        shapes = [weight.shape, weight.shape[:2]][: len(self.parameters)]
        return [gradient.reshape(shape) for gradient, shape in zip(gradients, shapes, strict=False)]

    def _backward(self, delta: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> list[Tensor]:
        """Return those of the derivatives by inputs, weight and bias that are wanted."""
        groups = len(weight)
        maps = self._in_groups(delta, groups), self._in_groups(self.inputs, groups), weight.flatten(0, 1)
        options = [groups * weight.shape[1]], *self.geometry, False, [0, 0], groups, wanted
        derivatives: list[Tensor] = torch.ops.aten.convolution_backward(*maps, *options)
        return derivatives

    def _in_groups(self, maps: Tensor, groups: int) -> Tensor:
        return maps.reshape(-1, maps.shape[1] * groups // self.shape[0], *maps.shape[2:])

    def _split(self, maps: Tensor) -> Tensor:
        return _split(maps.reshape(self.shape[1], -1, *maps.shape[2:]), self.shape[0])


class _PatchProduct(_Layer):
    """A convolution as the matrix product with all patches of the maps, ``(N, V, C * kH * kW, patches)``."""

    def __init__(self, plan: Plan, weight: _Parameter, bias: _Parameter | None) -> None:
        super().__init__(plan, weight, bias)
        self.geometry = plan.geometry

    def _enter(self, inputs: Tensor) -> Tensor:
        maps = inputs.reshape(*inputs.shape[:2], *self.geometry.input_shape)
        return self.geometry.unfold(maps.transpose(0, 1)).squeeze(2)

    def _enter_back(self, delta: Tensor) -> Tensor:
        return delta.transpose(0, 1).flatten(3)

    def _apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        outputs = weight.flatten(2) @ inputs
        outputs = outputs if bias is None else outputs.add_(bias[..., None])
        return outputs.view(*outputs.shape[:3], *self.geometry.output_shape[1:]).transpose(0, 1)

    def _transposed(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        maps = self.geometry.fold(_sum([weight.flatten(2).mT @ delta for delta, weight in pairs]))
        return maps.view(*maps.shape[:2], *self.geometry.input_shape).transpose(0, 1)

    def _by_parameters(self) -> list[Tensor]:
        by_weight = _over_images(self.delta @ self.inputs.mT)
        by_weight = by_weight.view(*by_weight.shape[:2], *self.weight.value.shape[2:])
        return [by_weight, _over_images(self.delta.sum(-1))][: len(self.parameters)]


@dataclass(frozen=True)
class Plan(Link):
    """A module of the chain, and how it is computed."""

    first: bool = False  # whether it is the first of the layers with weights
    more_inputs: int = 0  # channels (features for Linear) that the layer before adds where that is faster
    more_outputs: int = 0  # channels that this layer adds, whose outputs are zero after the activation
    idle: float = 0.0  # the bias of the added channels

    def step(self, state: Mapping[str, Tensor], gradients: Mapping[str, Tensor], basis: Tensor | None = None) -> Step:
        """Return the module with the weights of victims, ``(V or 1, *shape)``, and the gradients that they shared.

        ``basis`` is the basis of the last layer's gradient, if it is given in one.
        """
        module = self.module
        if isinstance(module, Normalize):
            return _Scaling(module, next(iter(gradients.values())))
        if isinstance(module, nn.AvgPool2d | AveragePooling):
            return _Pooling(self)
        if type(module) in ACTIVATIONS:
            return _Activation(module)
        if basis is not None:
            as_it_is = dataclasses.replace(self, more_inputs=0)
            weight, bias = (as_it_is._parameter(which, state, gradients) for which in ("weight", "bias"))
            return _LowRankLinear(self, cast(_Parameter, weight), bias, basis)
        weight, bias = (self._parameter(which, state, gradients) for which in ("weight", "bias"))
        weight = cast(_Parameter, weight)
        if isinstance(module, nn.Linear):
            return _Linear(self, weight, bias)
        few = weight.value.shape[2] < _FEWEST_CHANNELS and weight.value.device.type == "cpu"
        return (_GroupedConvolution if _groups_well(weight.value) and not few else _PatchProduct)(self, weight, bias)

    def _parameter(self, which: str, state: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> _Parameter | None:
        name, weight = f"{self.name}.{which}", state[f"{self.name}.weight"]
        value, shared = state.get(name), gradients.get(name)
        if (self.more_inputs or self.more_outputs) and weight.device.type == "cpu" and _groups_well(weight):
            if which == "bias" and value is None and self.idle:
                value = weight.new_zeros(weight.shape[:2])
            more = [0, self.more_outputs]
            if which == "weight":
                more = [*[0, 0] * (weight.ndim - 3), 0, self.more_inputs, *more]
            value = None if value is None else F.pad(value, more, value=self.idle if which == "bias" else 0.0)
            shared = None if shared is None else F.pad(shared, more)
        return None if value is None else _Parameter(value, shared)


def _groups_well(weight: Tensor) -> bool:
    """Return whether a grouped convolution with such weights is one operation, not a loop over the groups."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return weight.device.type != "cpu" or (weight.dtype == torch.float32 and has_onednn)


def _merge(maps: Tensor) -> Tensor:
    """Reshape ``(V, N, C, H, W)`` to ``(N, V * C, H, W)``, without a copy for outputs of convolution and pooling."""
    return maps.transpose(0, 1).flatten(1, 2).contiguous()


def _split(maps: Tensor, victims: int) -> Tensor:
    return maps.reshape(len(maps), victims, -1, *maps.shape[2:]).transpose(0, 1)


def _one_or_each(weight: Tensor) -> Tensor:
    return weight[0] if len(weight) == 1 else weight


def _over_images(tensor: Tensor) -> Tensor:
    """Return the sum over the first dimension, without a copy for a single image."""
    return tensor[0] if len(tensor) == 1 else tensor.sum(0)


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
