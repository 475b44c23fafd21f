"""The input of label inference: gradient, weights and inputs of the last linear layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from leakage.clients.protocol import UNKNOWN, Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim

# Networks that process the same images at once.
_NETWORKS_AT_ONCE = 8
# Images in one pass through a shared network.
_IMAGES_AT_ONCE = 250


@dataclass
class LastLayer:
    r"""The last layer of V victims: logits :math:`z = W h + b` of features h.

    With cross-entropy and N images its gradients are

    .. math:: g_b = \frac{1}{N} \sum_i (p_i - y_i), \qquad g_W = \frac{1}{N} \sum_i (p_i - y_i) \, h_i^\top

    where :math:`p_i = \mathrm{softmax}(z_i)` and :math:`y_i` is the one-hot label. With local steps, the gradients are
    also averaged over the steps.
    """

    weight_gradient: Tensor | None  # (V, K, D), None if the layer shares none
    bias_gradient: Tensor | None  # (V, K), None if the layer shares none
    weight: Tensor  # (V, K, D), or (1, K, D) if victims share their weights
    bias: Tensor  # (V, K) or (1, K); zeros if the layer has none
    features: Callable[[Tensor], Tensor]  # computes the inputs of the layer, (V or 1, M, D), for images (M, C, H, W)
    protocol: Protocol
    non_negative: bool  # whether the features can't be negative, as after a ReLU or a sigmoid
    own_weights: bool  # whether each victim has its own network, even if there is only one victim

    @property
    def rows(self) -> Tensor:
        """The weight gradient, for rules that need it."""
        assert self.weight_gradient is not None
        return self.weight_gradient

    @property
    def push(self) -> Tensor:
        """The bias gradient, for rules that need it."""
        assert self.bias_gradient is not None
        return self.bias_gradient

    @property
    def gradients(self) -> Tensor:
        """The bias gradient if there is one, else the weight gradient."""
        return self.rows if self.bias_gradient is None else self.bias_gradient

    def __len__(self) -> int:
        return len(self.gradients)

    def select(self, victims: Tensor) -> LastLayer:
        """Return the layer of these victims; :attr:`features` remain those of all victims."""
        names = ["weight_gradient", "bias_gradient", *(["weight", "bias"] if self.own_weights else [])]
        tensors = {name: getattr(self, name) for name in names}
        some: dict[str, Any] = {name: tensor[victims] for name, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(self, **some)

    @property
    def num_images(self) -> int:
        """The number of images N."""
        return self.protocol.num_images

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.weight.shape[1]

    def midway(self) -> LastLayer:
        r"""Return the layer with its weights half-way through the local steps.

        There, gradients are near their average.

        Step t is taken at :math:`\theta_0 - \eta \sum_{s<t} g_s`, so the mean over the steps is about
        :math:`\theta_0 - \eta \frac{T - 1}{2} \bar g`. For momentum and weight decay, see :func:`mean_gradient`.
        With one step, the layer is returned unchanged.
        """
        if self.protocol.local_steps == 1:
            return self
        _, way = _of_one_gradient(self.protocol)
        along = way / _scale(self.protocol)
        weight, bias = self.weight, self.bias
        if self.weight_gradient is not None:
            weight = (weight - along * self.weight_gradient) / (1 + way * self.protocol.weight_decay)
        if self.bias_gradient is not None:
            bias = (bias - along * self.bias_gradient) / (1 + way * self.protocol.weight_decay)
        return dataclasses.replace(self, weight=weight, bias=bias)


def mean_gradient(protocol: Protocol, shared: Tensor, weight: Tensor) -> Tensor:
    r"""Return the mean gradient over images and local steps, without effects of momentum and weight decay.

    If the gradients of all steps were the same g, momentum would make step t :math:`c_t = 1 + \mu c_{t-1}` times as
    long. The shared average of the steps would be :math:`\bar c` times g, so it is divided by :math:`\bar c`. Weight
    decay adds :math:`\lambda \theta` to g. This term is subtracted at the weights half-way through the steps, averaged
    with the same weighting as momentum. Without momentum and weight decay, nothing is assumed.

    If the learning rate is unknown, so is the length of the update, and the term of weight decay is not subtracted.

    Args:
        protocol: the clients' protocol.
        shared: what the clients shared of some weights, ``(V, ...)``.
        weight: these weights before the first step, ``(V or 1, ...)``.
    """
    if protocol.local_steps == 1:
        return shared * _scale(protocol)
    length, way = _of_one_gradient(protocol)
    step = shared / length
    if protocol.weight_decay and protocol.learning_rate != UNKNOWN:
        step = step - protocol.weight_decay * (weight - way * step)
    return step * _scale(protocol)


def _of_one_gradient(protocol: Protocol) -> tuple[float, float]:
    """Return the mean length of the steps for a constant gradient, and the mean distance moved before a step."""
    count, rate = protocol.local_steps, protocol.known_rate
    lengths = list(accumulate(range(1, count), lambda length, _: 1 + protocol.momentum * length, initial=1.0))
    ways = [0.0, *accumulate(lengths[:-1])]
    # By momentum, the gradient of step s also enters all later steps.
    return sum(lengths) / count, rate * sum(map(mul, lengths[::-1], ways)) / sum(lengths)


def _scale(protocol: Protocol) -> float:
    """Return the factor that turns the client's gradient into a mean over the images of one step."""
    return 1.0 if protocol.reduction == "mean" else 1 / (protocol.local_batch_size or protocol.num_images)


def last_layer(shared: SharedGradient, victim: Victim, *, non_negative: bool | None = None) -> LastLayer:
    """Return the last layer of all victims, whose logits are the output of a linear layer.

    Args:
        shared: what the victims shared.
        victim: the victims' network and protocol.
        non_negative: whether features can't be negative; by default the result of :func:`has_non_negative_features`.
    """
    protocol = shared.protocol
    names = [f"{victim.classifier}.weight", f"{victim.classifier}.bias"]
    weight = shared.state[names[0]]
    bias = shared.state.get(names[1], torch.zeros_like(weight[..., 0]))
    if not shared.own_weights:
        weight, bias = weight[None], bias[None]
    gradients = [
        mean_gradient(protocol, shared.gradients[name], start) if name in shared.gradients else None
        for name, start in zip(names, (weight, bias), strict=True)
    ]
    return LastLayer(
        weight_gradient=gradients[0],
        bias_gradient=gradients[1],
        weight=weight,
        bias=bias,
        features=_Features(shared, victim),
        protocol=protocol,
        non_negative=has_non_negative_features(victim) if non_negative is None else non_negative,
        own_weights=shared.own_weights,
    )


@torch.no_grad()
def has_non_negative_features(victim: Victim) -> bool:
    """Return whether the inputs of the last layer can't be negative, tested on a few images of noise."""
    noise = torch.rand(8, *victim.protocol.image_shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(victim.state[victim.trainable[0]])
    features = functional_call(_without_classifier(victim), victim.state, noise)
    return bool((features >= 0).all())


class _Features:
    """The victims' networks without their last layer."""

    def __init__(self, shared: SharedGradient, victim: Victim) -> None:
        self.network = _without_classifier(victim)
        known = {name for name, _ in (*self.network.named_parameters(), *self.network.named_buffers())}
        self.state = {name: tensor for name, tensor in shared.state.items() if name in known}
        self.own_weights = shared.own_weights
        self.like = shared.gradients[victim.trainable[0]]
        # BatchNorm in training mode normalises over the images of one step.
        self.together = None
        if any(isinstance(module, _BatchNorm) and module.training for module in victim.model.modules()):
            self.together = shared.protocol.local_batch_size or shared.protocol.num_images

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        size, count = self.together or _IMAGES_AT_ONCE, len(images)
        order = torch.arange(count)
        if self.together is not None:
            # Shuffle, because images may be sorted by class, and fill the last pass up to the size of the others.
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
            images = images[torch.cat([order, order[: -count % size]]) if size < count else order]
        run: Callable[..., Tensor] = partial(functional_call, self.network)
        if self.own_weights:
            run = vmap(run, in_dims=(0, None), chunk_size=_NETWORKS_AT_ONCE)
        parts = [run(self.state, part) for part in torch.split(images.to(self.like), size)]
        features = torch.cat(parts, dim=-2)[..., order.argsort(), :]
        return features if self.own_weights else features[None]


def _without_classifier(victim: Victim) -> nn.Module:
    """Return the model with its last layer replaced by the identity, so that it outputs the features."""
    network = copy.deepcopy(victim.model)
    assert victim.classifier is not None
    parent, _, name = victim.classifier.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return network
