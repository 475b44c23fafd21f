"""Checks whether a chain can be inverted layer by layer, and inverses of the functions between its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import Normalize

from leakage.clients.chain import Link, find_links
from leakage.clients.victim import Victim
from leakage.models.derivatives import ACTIVATIONS
from leakage.models.drawing import Drawing
from leakage.models.layers import AveragePooling

# Smallest distance of a sigmoid's or tanh's output from its bounds; reconstructed outputs may overshoot them.
_MARGIN = 1e-9
# Reconstructed outputs are never exactly zero: outputs of a ReLU count as zero below the widest gap (in logarithms)
# that begins between these fractions of the victim's largest output.
_NOISE = (1e-7, 1e-3)

_REFUSED: dict[tuple[type[nn.Module], ...], str] = {
    (nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish): "which is not one-to-one: two inputs give the same output",
    (
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
        *(nn.FractionalMaxPool2d, AveragePooling),
    ): "pooling that loses most of its input",
    (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, nn.LocalResponseNorm): "a norm by the statistics of each image",
}


def find_chain(victim: Victim) -> list[Link]:
    """Return the layers and functions of a plain chain that can be inverted, with the classifier last.

    Each module must be called once, with the output of the previous one, flattened or not. Supported modules are
    ``Conv2d`` (padded with zeros), ``Linear``, ``Sigmoid``, ``Tanh``, ``LeakyReLU``, ``ReLU`` (inverted where it is
    positive), ``BatchNorm2d`` in evaluation mode, ``torchvision.transforms.Normalize``, and modules without effect:
    ``Identity``, ``Flatten``, dropout in evaluation mode.

    With one image, a chain may also end at the first layer of a module that draws random numbers, such as the
    bottleneck of :class:`~leakage.defenses.PRECODE`: the gradient of this layer gives its input away, and what follows
    does not matter.

    Raises:
        ValueError: the network is no such chain, or the classifier is not a linear layer. The message names the module.

    Example:
        >>> from leakage.models import LeNet
        >>> [link.name for link in find_chain(Victim(LeNet(), image_shape=(1, 28, 28))) if link.is_layer]
        ['features.0', 'features.2', 'features.4', 'classifier']
    """
    return find_links(victim, (*_INVERSES, nn.BatchNorm2d, Normalize), _why_refused, _before_draws(victim))


def _before_draws(victim: Victim) -> str | None:
    """Return the layer of a drawing module whose gradient gives the input of a single image away, if there is one."""
    modules = {name: victim.model.get_submodule(name) for name in victim.draws}
    layers = [
        f"{name}.{module.first_layer}"
        for name, module in modules.items()
        if isinstance(module, Drawing) and module.first_layer
    ]
    if victim.protocol.num_images > 1 or not layers:
        return None
    return layers[0] if {f"{layers[0]}.weight", f"{layers[0]}.bias"} <= {*victim.trainable} else None


def _why_refused(link: Link) -> str | None:
    module = link.module
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        return "which normalises by the client's own batch: call `model.eval()` if the client did not"
    if isinstance(module, nn.LeakyReLU) and module.negative_slope <= 0:
        return f"with a negative slope of {module.negative_slope}, which is not one-to-one"
    return next((reason for types, reason in _REFUSED.items() if isinstance(module, types)), None)


def apply(link: Link, inputs: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return the outputs ``(V, N, *shape)`` of a function between layers.

    Args:
        link: a link that is not a layer.
        inputs: its inputs, ``(V, N, ...)``, with as many numbers as the outputs.
        state: weights and buffers by name, ``(V or 1, *shape)``.
    """
    inputs = inputs.reshape(*inputs.shape[:2], *link.output_shape)
    if type(link.module) in _INVERSES:
        # The module itself may work in place.
        return ACTIVATIONS[type(link.module)](link.module, inputs)[0]
    scale, shift = _affine(link, inputs, state)
    return inputs * scale + shift


def invert(link: Link, outputs: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the inputs that gave ``outputs``, and the slope there, each ``(V, N, *shape)``.

    The slope is 0 where the inputs are unknown. Outputs beyond the function's range are clamped to it. Arguments are
    those of :func:`apply`, with ``outputs`` in place of ``inputs``.
    """
    outputs = outputs.reshape(*outputs.shape[:2], *link.output_shape)
    if type(link.module) in _INVERSES:
        return _INVERSES[type(link.module)](link.module, outputs)
    scale, shift = _affine(link, outputs, state)
    inputs = torch.where(scale == 0, 0, (outputs - shift) / torch.where(scale == 0, 1, scale))
    return inputs, scale.expand_as(outputs)


def _affine(link: Link, like: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of each channel, ``(V or 1, 1, C, 1, 1)``."""
    if isinstance(link.module, Normalize):
        both = (link.module.mean, link.module.std)
        mean, std = (torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(1, -1) for value in both)
        scale, shift = 1 / std, -mean / std
    else:
        assert isinstance(link.module, nn.BatchNorm2d)
        mean, variance = (state[f"{link.name}.running_{which}"] for which in ("mean", "var"))
        scale = (variance + link.module.eps).rsqrt() * state.get(f"{link.name}.weight", torch.ones_like(mean))
        shift = state.get(f"{link.name}.bias", torch.zeros_like(mean)) - mean * scale
    return scale[:, None, :, None, None], shift[:, None, :, None, None]


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


# Each maps outputs to inputs, and to the slope at these inputs.
_INVERSES: dict[type[nn.Module], Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]] = {
    nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh,
    nn.LeakyReLU: _leaky_relu,
    nn.ReLU: _relu,
}
