"""What label inference looks at: the gradient of the last linear layer, its weights and its inputs."""

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

# Networks whose features of the same images are computed at once.
_NETWORKS_AT_ONCE = 8
# Images of one pass through a network that is shared.
_IMAGES_AT_ONCE = 250


@dataclass
class LastLayer:
    r"""The last layer of V victims: logits :math:`z = W h + b` of features h.

    With cross-entropy and N images its gradients are

    .. math:: g_b = \frac{1}{N} \sum_i (p_i - y_i), \qquad g_W = \frac{1}{N} \sum_i (p_i - y_i) \, h_i^\top

    where :math:`p_i = \mathrm{softmax}(z_i)` and :math:`y_i` is the one-hot label: the mean over images, and with local
    steps over steps.
    """

    weight_gradient: Tensor | None  # (V, K, D), None if the layer shares none
    bias_gradient: Tensor | None  # (V, K), None if the layer shares none
    weight: Tensor  # (V, K, D), or (1, K, D) where victims share their weights
    bias: Tensor  # (V, K) or (1, K); zeros if the layer has none
    features: Callable[[Tensor], Tensor]  # the inputs of the layer, (V or 1, M, D), for images (M, C, H, W)
    protocol: Protocol
    non_negative: bool  # whether the features can't be negative, as behind a ReLU or a sigmoid
    own_weights: bool  # whether each victim has a network of its own, be it a single victim

    @property
    def rows(self) -> Tensor:
        """The weights' gradient, for rules that need it."""
        assert self.weight_gradient is not None
        return self.weight_gradient

    @property
    def push(self) -> Tensor:
        """The bias' gradient, for rules that need it."""
        assert self.bias_gradient is not None
        return self.bias_gradient

    @property
    def gradients(self) -> Tensor:
        """Whichever gradient there is, the bias' if there are both."""
        return self.rows if self.bias_gradient is None else self.bias_gradient

    def __len__(self) -> int:
        return len(self.gradients)

    def select(self, victims: Tensor) -> LastLayer:
        """Some of the victims; :attr:`features` stay those of all."""
        names = ["weight_gradient", "bias_gradient", *(["weight", "bias"] if self.own_weights else [])]
        tensors = {name: getattr(self, name) for name in names}
        some: dict[str, Any] = {name: tensor[victims] for name, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(self, **some)

    @property
    def num_images(self) -> int:
        """N."""
        return self.protocol.num_images

    @property
    def num_classes(self) -> int:
        """K."""
        return self.weight.shape[1]

    def midway(self) -> LastLayer:
        r"""The same with the weights half-way through the local steps, where gradients are near their average.

        Step t is taken at :math:`\theta_0 - \eta \sum_{s<t} g_s`, so the mean over the steps is about
        :math:`\theta_0 - \eta \frac{T - 1}{2} \bar g`; with momentum and weight decay see :func:`mean_gradient`.
        With one step this changes nothing.
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
    r"""The gradient of an image, on average over the images and local steps, that is behind what was shared.

    Were the gradients of all steps the same g, momentum would make step t :math:`c_t = 1 + \mu c_{t-1}` times as long,
    and the average of the steps, which is shared, :math:`\bar c` times g; that is divided out. Weight decay adds
    :math:`\lambda \theta` to g, which is taken off at the weights half-way, weighted as momentum weighs them. Without
    both nothing is assumed.

    Where the learning rate is not told neither is the length of the update, and the weights' share stays in it.

    Args:
        protocol: of the clients.
        shared: what they shared of some weights, ``(V, ...)``.
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
    """How long steps of one and the same gradient are on average, and how far they have come where they are made."""
    count, rate = protocol.local_steps, protocol.known_rate
    lengths = list(accumulate(range(1, count), lambda length, _: 1 + protocol.momentum * length, initial=1.0))
    ways = [0.0, *accumulate(lengths[:-1])]
    # The gradient of step s is in all later ones too, as often as the first is in the step as far from it.
    return sum(lengths) / count, rate * sum(map(mul, lengths[::-1], ways)) / sum(lengths)


def _scale(protocol: Protocol) -> float:
    """That makes a mean over the images of one step of the client's gradient."""
    return 1.0 if protocol.reduction == "mean" else 1 / (protocol.local_batch_size or protocol.num_images)


def last_layer(shared: SharedGradient, victim: Victim, *, non_negative: bool | None = None) -> LastLayer:
    """That of all victims, whose logits are the output of a linear layer.

    Args:
        shared: what they shared.
        victim: their network and protocol.
        non_negative: see :func:`has_non_negative_features`, which is asked by default.
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
    """Whether the inputs of the last layer can't be negative, tried on a few images of noise."""
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
            # In any order but the one given, which may be that of the classes; the last pass as large as the others.
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
            images = images[torch.cat([order, order[: -count % size]]) if size < count else order]
        run: Callable[..., Tensor] = partial(functional_call, self.network)
        if self.own_weights:
            run = vmap(run, in_dims=(0, None), chunk_size=_NETWORKS_AT_ONCE)
        parts = [run(self.state, part) for part in torch.split(images.to(self.like), size)]
        features = torch.cat(parts, dim=-2)[..., order.argsort(), :]
        return features if self.own_weights else features[None]


def _without_classifier(victim: Victim) -> nn.Module:
    """The model with its last layer replaced by the identity: its output are the features."""
    network = copy.deepcopy(victim.model)
    assert victim.classifier is not None
    parent, _, name = victim.classifier.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return network
