"""Activations with their first and second derivatives, for differentiation without autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

# An activation's outputs, first derivative and second derivative (None where that is 0).
_Derivatives = tuple[Tensor, Tensor, Tensor | None]


def _sigmoid(_: nn.Module, inputs: Tensor) -> _Derivatives:
    outputs = inputs.sigmoid()
    slope = torch.addcmul(outputs, outputs, outputs, value=-1)
    return outputs, slope, torch.addcmul(slope, slope, outputs, value=-2)


def _tanh(_: nn.Module, inputs: Tensor) -> _Derivatives:
    outputs = inputs.tanh()
    slope = 1 - outputs.square()
    return outputs, slope, -2 * outputs * slope


def _silu(_: nn.Module, inputs: Tensor) -> _Derivatives:
    sigmoid, slope, _curvature = _sigmoid(_, inputs)
    outputs = inputs * sigmoid
    return outputs, torch.addcmul(sigmoid, inputs, slope), slope * (2 + inputs - 2 * outputs)


def _relu(_: nn.Module, inputs: Tensor) -> _Derivatives:
    outputs = inputs.relu()
    return outputs, (outputs > 0).to(inputs), None


def _leaky_relu(module: nn.Module, inputs: Tensor) -> _Derivatives:
    slope = torch.full_like(inputs, cast(nn.LeakyReLU, module).negative_slope).masked_fill_(inputs > 0, 1)
    return inputs * slope, slope, None


ACTIVATIONS: dict[type[nn.Module], Callable[[nn.Module, Tensor], _Derivatives]] = {
    nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh,
    nn.SiLU: _silu,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
}
