"""The squared gradient distance and its derivatives for networks that are a plain chain, without autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize

from leakage.clients.chain import Link, find_links
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.models.layers import AveragePooling
from leakage.objectives.chain_layers import ACTIVATIONS, Plan, Step

# On the CPU the grouped convolutions of oneDNN are fast for these numbers of channels per group, and up to several
# times slower for those between them: more channels, all zero, cost less.
_FAST_CHANNELS = (4, 8, 16)
# Where a sigmoid is exactly 0 in every precision.
_SIGMOID_ZERO = -1e4


class ChainObjective:
    r"""The squared gradient distance of V victims with its derivatives, without differentiating twice.

    For networks that are a plain chain of layers. With the residual :math:`R = g(x, t) - g^*` of the
    gradients :math:`g = \nabla_\theta \ell(\theta, x, t)`,

    .. math::
        D = \sum_l \lVert R_l \rVert^2, \qquad
        \nabla_{x, t} D = 2 \, \nabla_{x, t} \,
        \frac{d}{d \varepsilon} \ell(\theta + \varepsilon R, x, t) \Big|_{\varepsilon = 0},

    where R counts as a constant: a directional derivative that one more pass forwards and one more
    backwards through the network give (Pearlmutter's operator). These two passes and the two for g itself
    are all there is to compute: about half of what ``vmap(grad_and_value(...))`` does, in far fewer operations.

    The weights are brought into the layout of the computation once, for as long as calls give the same tensors.

    Args:
        victim: the network, its loss and reduction.

    Raises:
        ValueError: several local steps, or a network other than a chain of ``Conv2d`` (padded with zeros, one
            group), ``Linear`` (the last one), ``Sigmoid``, ``Tanh``, ``ReLU``, ``LeakyReLU``, ``SiLU``,
            ``AvgPool2d``, ``torchvision.transforms.Normalize``, and what does nothing (``Identity``, ``Flatten``,
            dropout in evaluation mode). The message names the module.

    References:
        Pearlmutter, *Fast Exact Multiplication by the Hessian*, Neural Computation 6 (1), 1994,
        https://doi.org/10.1162/neco.1994.6.1.147.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28))
        >>> images, targets = torch.rand(5, 1, 1, 28, 28), torch.eye(10)[:5, None]
        >>> shared = victim.share(images, targets.argmax(-1))
        >>> distances, by_images, by_targets = ChainObjective(victim)(shared, images, targets)
        >>> distances.shape, by_images.shape, by_targets.shape
        (torch.Size([5]), torch.Size([5, 1, 1, 28, 28]), torch.Size([5, 1, 10]))
        >>> bool((distances < 1e-6).all())
        True
    """

    def __init__(self, victim: Victim) -> None:
        if victim.protocol.local_steps != 1:
            raise ValueError(f"Expected `victim` to make one local step, but got {victim.protocol.local_steps}.")
        self._protocol = victim.protocol
        self._plans = _plans(victim)
        self._first = next(index for index, plan in enumerate(self._plans) if plan.first)
        self._made_from: list[tuple[Tensor, int]] = []
        self._steps: list[Step] = []

    @torch.no_grad()
    def __call__(
        self, shared: SharedGradient, images: Tensor, targets: Tensor, unit: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Squared distances, and their gradients by images and class probabilities.

        The square of a tiny gradient underflows, so a ``unit`` u multiplies each victim's residual before that:
        :math:`D = \sum_l \lVert u R_l \rVert^2`. If it is a power of two, all results are exactly :math:`u^2` times
        those without, as long as these are normal numbers.

        Args:
            shared: gradients and weights of V victims of this network.
            images: ``(V, N, C, H, W)``, any real values, in the precision and on the device of the weights.
            targets: class probabilities ``(V, N, K)``.
            unit: ``(V,)``, positive, in the precision and on the device of the weights; None for 1. Shared gradients
                are brought into it once, for as long as calls give the same tensor.

        Returns:
            ``(V,)``, at least 0; ``(V, N, C, H, W)``; ``(V, N, K)``.
        """
        steps = self._steps_for(shared, unit)
        learned = steps[self._first :]
        outputs = images
        for step in steps:
            outputs = step.forward(outputs)
        factor = 1 / images.shape[1] if self._protocol.reduction == "mean" else 1.0
        # The unit multiplies the loss, so the gradients and, on the way along the residual, its derivatives.
        delta, tangents = _LOSSES[self._protocol.loss](
            outputs, targets, factor, 1.0 if unit is None else unit[:, None, None]
        )
        for step in reversed(learned):
            delta = step.backward(delta)
        distances = torch.stack([distance for step in learned for distance in step.distances()]).sum(0)
        for step in learned:  # the first is a layer, which does not look at it: images have no tangent
            outputs = step.tangent(outputs)
        delta, by_targets = tangents(outputs)
        for step in reversed(steps):
            delta = step.tangent_backward(delta)
        return distances, (2 * delta).contiguous(), 2 * by_targets

    def _steps_for(self, shared: SharedGradient, unit: Tensor | None) -> list[Step]:
        """The network with the weights of the victims, made anew when a tensor is another or has changed."""
        tensors = [*shared.state.values(), *shared.gradients.values(), *([] if unit is None else [unit])]
        made_from = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if len(made_from) != len(self._made_from) or any(
            new[0] is not old[0] or new[1] != old[1] for new, old in zip(made_from, self._made_from, strict=True)
        ):
            self._steps = []  # before there are new ones
            state = {name: tensor if shared.own_weights else tensor[None] for name, tensor in shared.state.items()}
            gradients = shared.gradients
            if unit is not None:
                gradients = {
                    name: tensor * unit.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in gradients.items()
                }
            self._steps = [plan.step(state, gradients) for plan in self._plans]
            self._made_from = made_from
        return self._steps


# A loss at the logits: its derivative by them, and from their tangent that of this derivative and the derivative of the
# tangent of the loss by the class probabilities.
_Tangents = Callable[[Tensor], tuple[Tensor, Tensor]]


def _cross_entropy(logits: Tensor, targets: Tensor, factor: float, unit: Tensor | float) -> tuple[Tensor, _Tangents]:
    scale = factor * unit
    probabilities = logits.softmax(-1)
    weighted = probabilities * (scale * targets.sum(-1, keepdim=True))

    def tangents(tangent: Tensor) -> tuple[Tensor, Tensor]:
        difference = tangent - (probabilities * tangent).sum(-1, keepdim=True)
        return weighted * difference, -scale * difference

    return weighted - scale * targets, tangents


def _mean_squared_error(
    logits: Tensor, targets: Tensor, factor: float, unit: Tensor | float
) -> tuple[Tensor, _Tangents]:
    scale = factor * (2 / logits.shape[-1]) * unit
    return scale * (logits - targets), lambda tangent: (scale * tangent, -scale * tangent)


_LOSSES: dict[str, Callable[[Tensor, Tensor, float, Tensor | float], tuple[Tensor, _Tangents]]] = {
    "cross_entropy": _cross_entropy,
    "mean_squared_error": _mean_squared_error,
}


def _plans(victim: Victim) -> list[Plan]:
    """How the chain of a victim's network is computed."""
    links = find_links(victim, (*ACTIVATIONS, nn.AvgPool2d, AveragePooling, Normalize), _why_refused)
    layers = [link.name for link in links if link.is_layer]
    covered = {f"{name}.{which}" for name in layers for which in ("weight", "bias")}
    if others := sorted(set(victim.trainable) - covered):
        raise ValueError(f"Expected a plain chain of layers that hold all trainable parameters, but got {others[:5]}.")
    return _widen([Plan(**vars(link), first=link.name == layers[0]) for link in links])


def _why_refused(link: Link) -> str | None:
    if isinstance(link.module, nn.Conv2d) and link.module.groups != 1:
        return f"of {link.module.groups} groups"
    if isinstance(link.module, nn.Conv2d) and not link.geometry.symmetric:
        return "padded by more pixels on one side than on the other"
    return None


def _widen(plans: list[Plan]) -> list[Plan]:
    """The same with numbers of channels that are fast, where what follows can take them."""
    plans = list(plans)
    layers = [index for index, plan in enumerate(plans) if plan.is_layer]
    for index, following in pairwise(layers):
        channels = plans[index].output_shape[0]
        more = next((fast for fast in _FAST_CHANNELS if fast >= channels), channels) - channels
        between = [plan.module for plan in plans[index + 1 : following]]
        activations = [module for module in between if type(module) in ACTIVATIONS]
        sigmoid = any(isinstance(module, nn.Sigmoid) for module in between)
        # One activation at most, which gives 0 for the additional channels: a sigmoid right behind its layer.
        zero = len(activations) <= 1 and (not sigmoid or isinstance(between[0], nn.Sigmoid))
        zero &= not any(isinstance(module, Normalize) for module in between)
        inside = plans[index + 1 : following + 1]
        kept = all(len(plan.input_shape) == 1 or plan.input_shape[0] == channels for plan in inside)
        if isinstance(plans[index].module, nn.Conv2d) and more and zero and kept:
            plans[index] = dataclasses.replace(plans[index], more_outputs=more, idle=_SIGMOID_ZERO if sigmoid else 0.0)
            features = plans[following].input_shape
            each = features[0] // channels if len(features) == 1 else 1
            plans[following] = dataclasses.replace(plans[following], more_inputs=more * each)
    return plans
