"""Networks that are a plain chain: each layer's input is the output of the one before, and follows from its output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.transforms import Normalize

from leakage.clients.chain import module_calls, not_a_chain, show_module
from leakage.clients.victim import Victim
from leakage.models.layers import AveragePooling

# How near a sigmoid's or tanh's output may come to its bounds: what is found overshoots them.
_MARGIN = 1e-9
# What is found is never exactly zero: outputs of a ReLU count as zero below the widest gap (in logarithms) that
# begins between these parts of the victim's largest output.
_NOISE = (1e-7, 1e-3)

_ONLY = (
    "Only Conv2d, Linear, Sigmoid, Tanh, LeakyReLU, ReLU, BatchNorm2d in evaluation mode and Normalize can be inverted."
)
_REFUSED: dict[tuple[type[nn.Module], ...], str] = {
    (nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish): "which is not one-to-one: two inputs give the same output",
    (
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
        *(nn.FractionalMaxPool2d, AveragePooling),
    ): "pooling that forgets most of its input",
    (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, nn.LocalResponseNorm): "a norm by the statistics of each image",
}


@dataclass(frozen=True)
class Elementwise:
    """A one-to-one function of each element, or an affine map of each channel.

    Attributes:
        name: of the module.
        module: an activation, ``BatchNorm2d`` or ``Normalize``.
        shape: of its output for one image.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    def apply(self, inputs: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Its outputs ``(V, N, *shape)`` for inputs of that many elements.

        Args:
            inputs: ``(V, N, ...)``.
            state: weights and buffers by name, ``(V, *shape)`` or ``(1, *shape)``.
        """
        inputs = inputs.reshape(*inputs.shape[:2], *self.shape)
        if type(self.module) in _INVERSES:
            return _outputs(self.module, inputs)
        scale, shift = self._affine(inputs, state)
        return inputs * scale + shift

    def invert(self, outputs: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inputs that gave ``outputs``, and the slope there, 0 where they are not known; each ``(V, N, *shape)``.

        Outputs beyond the function's range count as its nearest value.
        """
        outputs = outputs.reshape(*outputs.shape[:2], *self.shape)
        if type(self.module) in _INVERSES:
            return _INVERSES[type(self.module)](self.module, outputs)
        scale, shift = self._affine(outputs, state)
        inputs = torch.where(scale == 0, 0, (outputs - shift) / torch.where(scale == 0, 1, scale))
        return inputs, scale.expand_as(outputs)

    def _affine(self, like: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Factor and summand of each channel, ``(V or 1, 1, C, 1, 1)``."""
        if isinstance(self.module, Normalize):
            both = (self.module.mean, self.module.std)
            mean, std = (torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(1, -1) for value in both)
            scale, shift = 1 / std, -mean / std
        else:
            assert isinstance(self.module, nn.BatchNorm2d)
            mean, variance = (state[f"{self.name}.running_{which}"] for which in ("mean", "var"))
            scale = (variance + self.module.eps).rsqrt() * state.get(f"{self.name}.weight", torch.ones_like(mean))
            shift = state.get(f"{self.name}.bias", torch.zeros_like(mean)) - mean * scale
        return scale[:, None, :, None, None], shift[:, None, :, None, None]


@dataclass(frozen=True)
class Stage:
    """A linear layer and the elementwise functions behind it, up to the next linear layer.

    Attributes:
        name: of the layer.
        layer: ``Conv2d`` or ``Linear``.
        input_shape: ``(C, H, W)`` of one image; ``(D, 1, 1)`` for a ``Linear``.
        output_shape: the same of the layer's output.
        after: the functions behind it, in their order.
    """

    name: str
    layer: nn.Conv2d | nn.Linear
    input_shape: tuple[int, int, int]
    output_shape: tuple[int, int, int]
    after: tuple[Elementwise, ...]


@dataclass(frozen=True)
class Chain:
    """What stands before the classifier, in its order.

    Attributes:
        before: elementwise functions of the images.
        stages: the linear layers without the classifier.
    """

    before: tuple[Elementwise, ...]
    stages: tuple[Stage, ...]


def find_chain(victim: Victim) -> Chain:
    """The layers of a network that is a plain chain of layers that can be inverted.

    The model runs once on noise. Each of its modules must be called once, with the output of the one
    before it, flattened or not. They may be ``Conv2d`` (padded with zeros), ``Linear``, ``Sigmoid``,
    ``Tanh``, ``LeakyReLU``, ``ReLU`` (inverted where it is positive), ``BatchNorm2d`` in evaluation mode,
    ``torchvision.transforms.Normalize``, and what does nothing: ``Identity``, ``Flatten``, dropout in
    evaluation mode. Nothing is left behind on the model.

    Raises:
        ValueError: another network, or a classifier that is not a linear layer. The message names the module.

    Example:
        >>> from leakage.models import LeNet
        >>> [stage.name for stage in find_chain(Victim(LeNet(), image_shape=(1, 28, 28))).stages]
        ['features.0', 'features.2', 'features.4']
    """
    if victim.classifier is None:
        raise ValueError(
            f"Expected a network whose logits are the output of a linear layer, but got those of {victim.logits_from}."
        )
    before: list[Elementwise] = []
    stages: list[Stage] = []
    for name, module, inputs, outputs in module_calls(victim):
        if name == victim.classifier:
            break
        if isinstance(module, nn.Identity | nn.Flatten | _DropoutNd):
            continue
        if (reason := _why_refused(module, inputs, f"{name}.weight" in victim.state)) is not None:
            raise not_a_chain(f"{show_module(name, module)}, {reason}. {_ONLY}")
        if isinstance(module, nn.Conv2d | nn.Linear):
            stages.append(Stage(name, module, _three(inputs), _three(outputs), ()))
            continue
        function = Elementwise(name, module, tuple(outputs))
        if stages:
            stages[-1] = dataclasses.replace(stages[-1], after=(*stages[-1].after, function))
        else:
            before.append(function)
    return Chain(tuple(before), tuple(stages))


def _why_refused(module: nn.Module, inputs: torch.Size, has_weight: bool) -> str | None:
    """Why a module can't be inverted; None if it can."""
    if type(module) in (nn.Conv2d, nn.Linear):
        if not has_weight:
            return "whose weight is computed from other parameters"
        if isinstance(module, nn.Conv2d):
            return None if module.padding_mode == "zeros" else f"padded by {module.padding_mode!r} instead of zeros"
        return None if len(inputs) == 1 else "applied to several vectors of each image"
    if isinstance(module, _BatchNorm):
        if module.training or module.running_mean is None:
            return "which normalises by the client's own batch: call `model.eval()` if the client did not"
        return None if type(module) is nn.BatchNorm2d else "of another kind than BatchNorm2d"
    if isinstance(module, nn.LeakyReLU) and module.negative_slope <= 0:
        return f"with a negative slope of {module.negative_slope}, which is not one-to-one"
    if type(module) in (*_INVERSES, Normalize):
        return None
    for types, reason in _REFUSED.items():
        if isinstance(module, types):
            return reason
    return "which is none that can be inverted"


def _three(shape: torch.Size) -> tuple[int, int, int]:
    return (shape[0], 1, 1) if len(shape) == 1 else (shape[0], shape[1], shape[2])


def _outputs(activation: nn.Module, inputs: Tensor) -> Tensor:
    # Not the module itself, which may work in place.
    if isinstance(activation, nn.LeakyReLU):
        return F.leaky_relu(inputs, activation.negative_slope)
    return {nn.Sigmoid: torch.sigmoid, nn.Tanh: torch.tanh, nn.ReLU: torch.relu}[type(activation)](inputs)


def _sigmoid(_: nn.Module, outputs: Tensor) -> tuple[Tensor, Tensor]:
    outputs = outputs.clamp(_MARGIN, 1 - _MARGIN)
    return torch.logit(outputs), outputs * (1 - outputs)


def _tanh(_: nn.Module, outputs: Tensor) -> tuple[Tensor, Tensor]:
    outputs = outputs.clamp(_MARGIN - 1, 1 - _MARGIN)
    return torch.atanh(outputs), 1 - outputs.square()


def _leaky_relu(activation: nn.Module, outputs: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(activation, nn.LeakyReLU)
    slope = torch.where(outputs > 0, 1.0, activation.negative_slope).to(outputs)
    return outputs / slope, slope


def _relu(_: nn.Module, outputs: Tensor) -> tuple[Tensor, Tensor]:
    values = outputs.flatten(1)
    lowest, highest = _NOISE
    largest = values.amax(1, keepdim=True)
    parts = (values / torch.where(largest > 0, largest, 1)).clamp(min=lowest).sort(dim=1).values
    parts = torch.cat([torch.full_like(largest, lowest), parts], dim=1).log()
    gaps = torch.where(parts[:, :-1] < math.log(highest), parts.diff(dim=1), -1)
    threshold = parts[:, :-1].gather(1, gaps.argmax(1, keepdim=True)).exp() * (1 + 1e-9) * largest
    active = (values > threshold).to(outputs).reshape(outputs.shape)
    return outputs * active, active


# From outputs to inputs and the slope there.
_INVERSES: dict[type[nn.Module], Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]] = {
    nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh,
    nn.LeakyReLU: _leaky_relu,
    nn.ReLU: _relu,
}
