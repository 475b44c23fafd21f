"""The squared gradient distance and its derivatives for plain chains of layers, without autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torchvision.transforms import Normalize

from leakage.clients.chain import Link, find_links
from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.models.derivatives import ACTIVATIONS
from leakage.models.layers import AveragePooling
from leakage.objectives.chain_layers import Plan, Step
from leakage.objectives.terms import Gradients, Simulate

# On the CPU, the grouped convolutions of oneDNN are fast for these numbers of channels per group and up to several
# times slower for numbers in between, so it is cheaper to add channels of zeros.
_FAST_CHANNELS = (4, 8, 16)
# An input for which a sigmoid is exactly 0 in every precision.
_SIGMOID_ZERO = -1e4


class ChainObjective:
    r"""The squared gradient distance of V victims with its derivatives, without double backward.

    It is for networks that are a plain chain of layers. With the residual :math:`R = g(x, t) - g^*` of the
    gradients :math:`g = \nabla_\theta \ell(\theta, x, t)`,

    .. math::
        D = \sum_l \lVert R_l \rVert^2, \qquad
        \nabla_{x, t} D = 2 \, \nabla_{x, t} \,
        \frac{d}{d \varepsilon} \ell(\theta + \varepsilon R, x, t) \Big|_{\varepsilon = 0},

    where R counts as a constant. This directional derivative takes one more forward pass and one more
    backward pass through the network (Pearlmutter's operator). Together with the two passes for g, this is about
    half of the work of ``vmap(grad_and_value(...))``, in far fewer operations.

    The weights are converted to the layout of the computation once, as long as calls pass the same tensors.

    With ``simulate``, :math:`R = J_s^\top (s(g) - g^*)` and :math:`D = \lVert s(g) - g^* \rVert^2`, with what clients
    would have shared of g, :math:`s(g)`, and its Jacobian :math:`J_s`.

    Args:
        victim: the network, its loss and reduction.
        simulate: the clients' defenses as an attacker simulates them, see :data:`leakage.objectives.terms.Simulate`.

    Raises:
        ValueError: the protocol has several local steps, or the network is not a chain of ``Conv2d`` (zero padding, one
            group), ``Linear`` (the last one), ``Sigmoid``, ``Tanh``, ``ReLU``, ``LeakyReLU``, ``SiLU``,
            ``AvgPool2d``, ``torchvision.transforms.Normalize``, and modules without effect (``Identity``, ``Flatten``,
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

    def __init__(self, victim: Victim, simulate: Simulate | None = None) -> None:
        if victim.protocol.local_steps != 1:
            raise ValueError(f"Expected `victim` to make one local step, but got {victim.protocol.local_steps}.")
        self._protocol, self._simulate = victim.protocol, simulate
        self._plans = _plans(victim)
        self._first = next(index for index, plan in enumerate(self._plans) if plan.first)
        self._made_from: list[tuple[Tensor, int]] = []
        self._steps: list[Step] = []
        self._heads: list[_Head] = []

    @torch.no_grad()
    def __call__(
        self, shared: SharedGradient, images: Tensor, targets: Tensor, unit: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return squared distances, and their derivatives by images and class probabilities.

        The square of a tiny gradient underflows, so a ``unit`` u first multiplies each victim's residual:
        :math:`D = \sum_l \lVert u R_l \rVert^2`. If u is a power of two, all results are exactly :math:`u^2` times
        the results without it, as long as these are normal numbers.

        Args:
            shared: gradients and weights of V victims of this network.
            images: ``(V, N, C, H, W)``, any real values, in the precision and on the device of the weights.
            targets: class probabilities, ``(V, N, K)``.
            unit: ``(V,)``, positive, in the precision and on the device of the weights; None for 1. Shared gradients
                are multiplied by it once, as long as calls pass the same tensor.

        Returns:
            Distances ``(V,)``, at least 0; derivatives by images ``(V, N, C, H, W)``; and derivatives by class
            probabilities ``(V, N, K)``.
        """
        self._make_steps(shared, unit)
        learned = self._steps[self._first :]
        outputs = images
        for step in self._steps:
            outputs = step.forward(outputs)
        delta = _joined([head.backward(outputs, targets) for head in self._heads])
        for step in reversed(learned):
            delta = step.backward(delta)
        if self._simulate is None:
            squares = [step.distances() for step in learned]
            squares.append([_joined(parts) for parts in zip(*(head.distances() for head in self._heads), strict=True)])
            distances = torch.stack([square for of_step in squares for square in of_step]).sum(0)
        else:
            distances = self._defend(self._simulate, shared.gradients, unit)
        for step in learned:  # the first is a layer, which ignores its input here: images have no tangent
            outputs = step.tangent(outputs)
        pairs = [head.tangent_backward(outputs) for head in self._heads]
        delta, by_targets = (_joined(parts) for parts in zip(*pairs, strict=True))
        for step in reversed(self._steps):
            delta = step.tangent_backward(delta)
        return distances, (2 * delta).contiguous(), 2 * by_targets

    def _defend(self, simulate: Simulate, shared: Gradients, unit: Tensor | None) -> Tensor:
        """Replace the gradients that layers hold by the residual of what is simulated; returns its squared norms."""
        held: dict[str, Tensor] = {}
        for plan, step in zip(self._plans, [*self._steps, self._heads[0].layer], strict=True):
            names = [f"{plan.name}.{which}" for which in ("weight", "bias")]
            for name, parameter in zip(names, step.parameters, strict=False):
                if name in shared:  # without channels of zeros
                    held[name] = parameter.residual[tuple(map(slice, shared[name].shape))]

        def times(factors: Tensor | None, tensor: Tensor) -> Tensor:
            return tensor if factors is None else tensor * factors.view(-1, *[1] * (tensor.ndim - 1))

        inverse = None if unit is None else 1 / unit
        found, pull_back = simulate({name: times(inverse, tensor) for name, tensor in held.items()}, shared)
        residuals = {name: times(unit, found[name] - shared[name]) for name in held}
        pulled = pull_back(residuals)
        for name, tensor in held.items():
            tensor.copy_(pulled[name] if name in pulled else torch.zeros_like(tensor))
        return torch.stack([vector_norm(each.flatten(1), dim=1).square() for each in residuals.values()]).sum(0)

    def _make_steps(self, shared: SharedGradient, unit: Tensor | None) -> None:
        """Build the network with the victims' weights, again only if a tensor was replaced or changed."""
        others = [tensor for tensor in (shared.basis, unit) if tensor is not None]
        tensors = [*shared.state.values(), *shared.gradients.values(), *others]
        made_from = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if len(made_from) == len(self._made_from) and all(
            new[0] is old[0] and new[1] == old[1] for new, old in zip(made_from, self._made_from, strict=True)
        ):
            return
        self._steps, self._heads = [], []  # free the old ones first
        state = {name: tensor if shared.own_weights else tensor[None] for name, tensor in shared.state.items()}
        gradients: Gradients = shared.gradients
        if self._simulate is not None:  # layers then hold gradients, see `_defend`
            gradients = {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in gradients.items()}
        elif unit is not None:
            gradients = {name: tensor * unit.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in gradients.items()}
        *plans, last = self._plans
        self._steps = [plan.step(state, gradients) for plan in plans]
        lanes = [slice(None)]
        if shared.basis is not None and shared.own_weights:  # weights so large that one lane fills the caches
            lanes = [slice(lane, lane + 1) for lane in range(len(shared))]
        self._heads = [_Head(last, self._protocol, state, gradients, shared.basis, unit, lane) for lane in lanes]
        self._made_from = made_from


class _Head:
    """The last layer and the loss of some of the lanes.

    The weights read for the logits are still in the caches for the backward pass.
    """

    def __init__(
        self,
        plan: Plan,
        protocol: Protocol,
        state: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        basis: Tensor | None,
        unit: Tensor | None,
        lanes: slice,
    ) -> None:
        state, gradients = ({name: tensor[lanes] for name, tensor in part.items()} for part in (state, gradients))
        self.layer = plan.step(state, gradients, None if basis is None else basis[lanes])
        self.loss = _LOSSES[protocol.loss]
        self.factor = 1 / protocol.num_images if protocol.reduction == "mean" else 1.0
        # The unit multiplies the loss, and with it the gradients and the derivatives along the residual.
        self.unit: Tensor | float = 1.0 if unit is None else unit[lanes, None, None]
        self.lanes = lanes

    def backward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the loss's derivative by the features."""
        logits = self.layer.forward(features[self.lanes])
        delta, self.tangents = self.loss(logits, targets[self.lanes], self.factor, self.unit)
        return self.layer.backward(delta)

    def distances(self) -> list[Tensor]:
        return self.layer.distances()

    def tangent_backward(self, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives along the residual of the result of :meth:`backward`, and of the loss by targets."""
        delta, by_targets = self.tangents(self.layer.tangent(tangent[self.lanes]))
        return self.layer.tangent_backward(delta), by_targets


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


# From the tangent of the logits: the tangent of the loss's derivative by the logits, and the derivative of the loss's
# tangent by the class probabilities.
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
    """Plan how the chain of a victim's network is computed."""
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
    """Add channels of zeros to reach fast numbers of channels, where the following modules allow it."""
    plans = list(plans)
    layers = [index for index, plan in enumerate(plans) if plan.is_layer]
    for index, following in pairwise(layers):
        channels = plans[index].output_shape[0]
        more = next((fast for fast in _FAST_CHANNELS if fast >= channels), channels) - channels
        between = [plan.module for plan in plans[index + 1 : following]]
        activations = [module for module in between if type(module) in ACTIVATIONS]
        sigmoid = any(isinstance(module, nn.Sigmoid) for module in between)
        # At most one activation, which must return 0 for the added channels; a sigmoid must directly follow its layer.
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
