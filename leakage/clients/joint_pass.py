"""One pass through a network for the images of V victims that gives the gradient of each victim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from leakage.clients.activations import Activation, recorded
from leakage.clients.joint_layers import Convolution, Layer, Linear, Parameter, Scaling, normalised
from leakage.clients.losses import LOSSES
from leakage.clients.smoothing import smoothed
from leakage.clients.victim import Victim

# Tolerances for the gradients of a trial, in units of their own norm and of the norm of all gradients. Rounding errors,
# and ReLUs that they switch, are far below; a wrong gradient is above.
_TOLERANCES = 1e-2, 1e-4


class JointPass:
    r"""The gradients of V victims, and derivatives of functions of them, by ordinary autograd on all their images.

    If every parameter belongs to a convolution, a linear layer or a normalisation (not by the batch's own statistics),
    the outputs of these layers are affine in it: :math:`y = P(x, \theta)`. One forward and one backward pass for all
    images give the derivatives :math:`\delta = \partial \ell / \partial y`. From these and the inputs follows the
    gradient :math:`g = P^\top(x) \, \delta` of each victim. For an objective whose derivative by g is v, the derivative
    of :math:`\langle v, g \rangle` is that of

    .. math:: \sum_{\text{layers}} \langle \delta, P(x, v) \rangle

    in which parameters are constants. Compared with differentiating twice under ``vmap``, this avoids unneeded
    derivatives by parameters, computes shared layers for all victims together, and runs each victim's own convolutions
    as one grouped convolution.

    Args:
        victim: a victim with one local step.
        state: weights and buffers by name.
        own_weights: whether ``state`` has a leading victims' dimension.
        images: ``(V, N, C, H, W)``.
        targets: class probabilities ``(V, N, K)``.
        modules: names of the modules whose activations are recorded.
        sharpness: ``(V,)``, see :func:`~leakage.clients.smoothing.smoothed`.

    Attributes:
        gradients: name to ``(V, *shape)``.
        activations: name to the activations ``(V, N, ...)`` of a module.

    Raises:
        ValueError: the network uses its parameters in another way.

    Example:
        >>> from leakage import LeNet
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28))
        >>> images, targets = torch.rand(5, 1, 1, 28, 28), torch.eye(10)[:5, None]
        >>> found = JointPass(victim, victim.state, False, images, targets)
        >>> found.gradients["classifier.bias"].shape
        torch.Size([5, 10])
        >>> slopes = {("gradients", name): gradient for name, gradient in found.gradients.items()}
        >>> [by.shape for by in found.pull_back(slopes)]
        [torch.Size([5, 1, 1, 28, 28]), torch.Size([5, 1, 10])]
    """

    @torch.enable_grad()
    def __init__(
        self,
        victim: Victim,
        state: Mapping[str, Tensor],
        own_weights: bool,
        images: Tensor,
        targets: Tensor,
        modules: Sequence[str] = (),
        sharpness: Tensor | None = None,
    ) -> None:
        self._victims, protocol = len(images), victim.protocol
        self._dummies = [dummy.detach().transpose(0, 1).flatten(0, 1).requires_grad_() for dummy in (images, targets)]
        tape = _Tape(state, frozenset(victim.trainable), own_weights, self._victims, len(self._dummies[0]))
        with recorded(victim.model, modules) as activations, tape, smoothed(sharpness, jointly=True):
            logits = functional_call(victim.model, dict(state), (self._dummies[0],))
        losses = LOSSES[protocol.loss](logits, self._dummies[1])
        loss = losses.sum() / (protocol.num_images if protocol.reduction == "mean" else 1)
        found = torch.autograd.grad(loss, tape.edges, create_graph=True, allow_unused=True)
        pairs = zip(tape.layers, found, strict=True)
        self._layers = [(layer, delta) for layer, delta in pairs if delta is not None]
        self.gradients = self._collect(victim, state, own_weights)
        self._activations = activations
        self.activations = {name: Activation(*map(self._parted, seen)) for name, seen in activations.items()}

    @torch.no_grad()
    def _collect(self, victim: Victim, state: Mapping[str, Tensor], own_weights: bool) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for layer, delta in self._layers:
            for name, gradient in layer.gradients(delta).items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        shapes = {name: state[name].shape[1:] if own_weights else state[name].shape for name in victim.trainable}
        missing = {name: state[name].new_zeros(self._victims, *shapes[name]) for name in shapes.keys() - gradients}
        return {name: gradients[name] if name in gradients else missing[name] for name in shapes}

    def pull_back(self, slopes: Mapping[tuple[str, str], Tensor]) -> tuple[Tensor, Tensor]:
        """Differentiate by images and targets, given the derivatives by gradients and activations.

        This method can be called once, because it frees the graph.

        Args:
            slopes: derivatives ``(V, ...)`` of a function, with keys ``("gradients", name)``, ``("inputs", module)``
                and ``("outputs", module)``. Missing ones count as zero; other keys are ignored.

        Returns:
            The derivatives by images, ``(V, N, C, H, W)``, and by targets, ``(V, N, K)``.
        """
        direction = {name: slope for (kind, name), slope in slopes.items() if kind == "gradients"}
        pairs = []
        with torch.enable_grad():
            for layer, delta in self._layers:
                if layer.names & direction.keys():
                    tangent = layer.tangent(direction)
                    pairs += [(delta, tangent.detach()), (tangent, delta.detach())]
        for (kind, name), slope in slopes.items():
            if kind in ("inputs", "outputs"):
                pairs.append((getattr(self._activations[name], kind), slope.transpose(0, 1).flatten(0, 1)))
        pairs = [(output, by) for output, by in pairs if output.requires_grad]
        if not pairs:
            return self._parted(torch.zeros_like(self._dummies[0])), self._parted(torch.zeros_like(self._dummies[1]))
        outputs, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, self._dummies, given, materialize_grads=True)
        return self._parted(found[0]), self._parted(found[1])

    def _parted(self, tensor: Tensor) -> Tensor:
        """Reshape ``(N * V, ...)`` to ``(V, N, ...)``."""
        return tensor.reshape(-1, self._victims, *tensor.shape[1:]).transpose(0, 1)


@torch.no_grad()
def has_joint_pass(victim: Victim, state: Mapping[str, Tensor], own_weights: bool) -> bool:
    """Return whether :class:`JointPass` gives the right gradients for a network, by a trial with random images.

    Args:
        victim: the model and the protocol.
        state: weights and buffers by name, as for :class:`JointPass`; if each victim has its own, the first and the
            last victim are tested.
        own_weights: whether ``state`` has a leading victims' dimension.
    """
    protocol = victim.protocol
    if protocol.local_steps > 1 or protocol.loss not in LOSSES:
        return False
    if own_weights:
        state = {name: tensor[[0, -1]] for name, tensor in state.items()}
    like = state[victim.trainable[0]]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, protocol.num_images, *protocol.image_shape, generator=generator).to(like)
    targets = torch.rand(2, protocol.num_images, protocol.num_classes, generator=generator).to(like)
    expected = vmap(victim.gradients, in_dims=(0 if own_weights else None, 0, 0))(dict(state), images, targets)
    try:
        found = JointPass(victim, state, own_weights, images, targets).gradients
    except (ValueError, RuntimeError, TypeError, IndexError):  # or the network's own error
        return False
    own, of_all = _TOLERANCES
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    least = of_all * math.hypot(*norms.values())
    return all(float((found[name] - expected[name]).norm()) <= own * norms[name] + least for name in norms)


class _Tape(TorchFunctionMode):
    """Records the layers of a forward pass.

    Args:
        state: weights and buffers by name.
        trainable: names of the parameters whose gradients are shared.
        own: whether each victim has its own network.
        victims: V.
        batch: N * V.
    """

    def __init__(
        self, state: Mapping[str, Tensor], trainable: frozenset[str], own: bool, victims: int, batch: int
    ) -> None:
        self.layers: list[Layer] = []
        self.edges: list[GradientEdge] = []
        # Buffers and frozen parameters that victims share need no special treatment.
        self._names = {id(tensor): name for name, tensor in state.items() if own or name in trainable}
        self._trainable, self._own, self._victims, self._batch = trainable, own, victims, batch

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(id(value) in self._names for value in tree_iter((args, kwargs))):
            return function(*args, **kwargs)
        if function not in _LAYERS:
            raise ValueError(f"Expected parameters in layers, but got one in {function}.")
        layer = _LAYERS[function](self, *args, **kwargs)
        if len(layer.inputs) != self._batch:
            raise ValueError(f"Expected layers of {self._batch} images, but got one of {tuple(layer.inputs.shape)}.")
        outputs = layer.outputs()
        if layer.names:
            if not outputs.requires_grad:
                raise ValueError("Expected layers whose inputs depend on the images, but got one whose inputs do not.")
            self.layers.append(layer)
            # The edge belongs to these outputs even if they are changed in place later.
            self.edges.append(get_gradient_edge(outputs))
        return outputs

    # One method for each kind of layer function, with the arguments of that function.

    def _parameter(self, value: Tensor) -> Parameter:
        name = self._names.get(id(value))
        return Parameter(value, name if name in self._trainable else None)

    def _parts(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
        """Return the constructor arguments that all layers have."""
        if weight is None:
            raise ValueError("Expected layers with a weight, but got one without.")
        parameters = self._parameter(weight), None if bias is None else self._parameter(bias)
        both = dict(zip(("weight", "bias"), parameters, strict=True))
        return both | {"inputs": inputs, "victims": self._victims, "own": self._own}

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Layer:  # noqa: A002 - torch's name
        return Linear(**self._parts(input, weight, bias))

    def _convolution(
        self,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Layer:
        count = input.ndim - 2
        strides, dilations = ([part] * count if isinstance(part, int) else [*part] for part in (stride, dilation))
        paddings: list[int]
        if padding == "same":
            over = [step * (size - 1) for step, size in zip(dilations, weight.shape[-count:], strict=True)]
            if any(both % 2 for both in over):
                raise ValueError("Expected convolutions padded alike on both sides, but got padding='same'.")
            paddings = [both // 2 for both in over]
        elif isinstance(padding, str):  # "valid"
            paddings = [0] * count
        else:
            paddings = [padding] * count if isinstance(padding, int) else [*padding]
        parts = self._parts(input, weight, bias)
        return Convolution(**parts, stride=strides, padding=paddings, dilation=dilations, groups=groups)

    def _batch_norm(
        self,
        input: Tensor,  # noqa: A002
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Layer:
        if training or running_mean is None or running_var is None:
            raise ValueError("Expected BatchNorm by running statistics, but got one by those of the batch.")
        rate = (running_var + eps).rsqrt()
        return Scaling(**self._parts(input, weight, bias), middle=1, mean=running_mean, rate=rate)

    def _group_norm(
        self,
        input: Tensor,  # noqa: A002
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Layer:
        outputs = normalised(input, len(input) * num_groups, eps)
        return Scaling(**self._parts(outputs, weight, bias), middle=1, mean=None, rate=None)

    def _layer_norm(
        self,
        input: Tensor,  # noqa: A002
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Layer:
        rows = input.numel() // math.prod(normalized_shape)
        outputs = normalised(input, rows, eps)
        return Scaling(**self._parts(outputs, weight, bias), middle=rows // len(input), mean=None, rate=None)


_LAYERS: dict[Callable[..., Any], Callable[..., Layer]] = {
    F.linear: _Tape._linear,
    F.conv1d: _Tape._convolution,
    F.conv2d: _Tape._convolution,
    F.conv3d: _Tape._convolution,
    F.batch_norm: _Tape._batch_norm,
    F.group_norm: _Tape._group_norm,
    F.layer_norm: _Tape._layer_norm,
}
