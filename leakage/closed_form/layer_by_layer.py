"""R-GAP: images from the last layer's inputs, layer by layer, by linear least squares alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form.features import SeparatedFeatures
from leakage.closed_form.linear_system import LinearSystem, conjugate_gradients, geometry_of
from leakage.closed_form.stages import Chain, Elementwise, Stage, find_chain

# Bytes that the patches and weights of the victims solved at once may take: on the CPU they should stay in its cache.
_MEMORY = {"cpu": 2**23, "cuda": 2**30}


@dataclass
class LayerByLayer:
    """What :func:`invert_layers` found.

    Attributes:
        images: ``(V, N, C, H, W)`` in float64, not clamped to [0, 1].
        layers: names of the S layers that were inverted, from the first to the last.
        equations: ``(V, S)``, whole numbers, how many equations each layer's inputs have.
        unknowns: ``(S,)``, whole numbers, how many numbers its inputs are.
        residual: ``(V,)``, the largest relative residual of the layers' systems.
    """

    images: Tensor
    layers: tuple[str, ...]
    equations: Tensor
    unknowns: Tensor
    residual: Tensor

    @property
    def determined(self) -> Tensor:
        """``(V,)``, whether every layer has as many equations as unknowns."""
        return (self.equations >= self.unknowns).all(dim=1)


@torch.no_grad()
def invert_layers(
    shared: SharedGradient,
    victim: Victim,
    separated: SeparatedFeatures,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = 2000,
) -> LayerByLayer:
    r"""The images of each victim from the inputs of its last linear layer (R-GAP, for several images).

    From the last layer to the first: a linear layer (convolution or not) has given :math:`z_n = W x_n + b` of image
    n, then the activation :math:`a_n = \sigma(z_n)`. Known are :math:`a_n` and the gradient
    :math:`\partial_{a_n}` of the image's own loss, so

    .. math:: z_n = \sigma^{-1}(a_n), \qquad \delta_n = \sigma'(z_n) \, \partial_{a_n},

    and the inputs :math:`x_n` solve a linear least-squares problem: the layer's own equations, weighted by how well
    z is known, and those of the shared gradient of W, which all N images share,

    .. math:: \sigma'(z_n) \, (W x_n + b) = \sigma'(z_n) \, z_n \quad (n = 1 \dots N), \qquad
        \frac{1}{N} \sum_n \delta_n x_n^\top = g_W

    (the sum itself with ``reduction="sum"``). Then :math:`\partial_{x_n} = W^\top \delta_n`, and on to the layer
    before. Where a ReLU gave zero, z is unknown and :math:`\delta` is zero. It is exact up to rounding,
    which grows from layer to layer, where every layer has as many independent equations as unknowns. Where it has
    fewer, its inputs are those nearest to a start (for images grey, in the metric of
    :class:`~leakage.solvers.ImageSpectrum`; otherwise what the activations give for 0). Each victim's systems are
    solved by preconditioned conjugate gradients (CGLS) in float64, until the gradient's preconditioned norm has
    fallen by ``tolerance``.

    :attr:`LayerByLayer.equations` counts the outputs of the layer that are known, at most as many per image as the
    image has inputs, and for each input channel the entries of the gradient of W that are not zero throughout, at
    most as many as the channel has unknowns: no more of either can be independent.

    Args:
        shared: what the victims shared.
        victim: their model and protocol: a plain chain (:func:`find_chain`), one local step. A layer whose weight is
            not trained has its own equations only.
        separated: features ``(V, N, D)`` and logit gradients ``(V, N, K)`` of each image.
        tolerance: see above.
        max_iterations: of one layer.

    Raises:
        ValueError: several local steps, a network that is no plain chain, features of other shapes.

    References:
        Zhu and Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021,
        https://arxiv.org/abs/2010.07733.

    Example:
        For one image the features follow from the gradient of the classifier:

        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(image_size=12), image_shape=(1, 12, 12))
        >>> images = torch.rand(2, 1, 1, 12, 12)
        >>> shared = victim.share(images, torch.tensor([[3], [8]]))
        >>> weight, bias = (shared.gradients[f"classifier.{name}"].double() for name in ("weight", "bias"))
        >>> features = (bias[:, None] @ weight) / bias.square().sum(1)[:, None, None]
        >>> found = invert_layers(shared, victim, SeparatedFeatures(features, bias[:, None], torch.zeros(2)))
        >>> bool((found.images - images).abs().max() < 1e-3), found.determined.tolist()
        (True, [True, True])
    """
    protocol = shared.protocol
    if protocol.local_steps > 1:
        raise ValueError(
            "Expected victims with `local_steps` 1, whose gradient is that of one network, but got "
            f"{protocol.local_steps}."
        )
    chain = find_chain(victim)
    victim.check(shared)
    classifier = victim.model.get_submodule(str(victim.classifier))
    assert isinstance(classifier, nn.Linear)
    for name, tensor, width in (
        ("features", separated.features, classifier.in_features),
        ("logit_gradients", separated.logit_gradients, classifier.out_features),
    ):
        expected = (len(shared), protocol.num_images, width)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"Expected `{name}` of shape {expected}, but got {tuple(tensor.shape)}.")
    parts = []
    size = _at_once(chain, protocol.num_images, separated.features.device)
    for victims in torch.split(torch.arange(len(shared)), size):
        part = _Inversion(shared.select(victims), victim, chain, tolerance, max_iterations)
        parts.append(part.run(separated.features[victims], separated.logit_gradients[victims]))
    return LayerByLayer(
        images=torch.cat([part.images for part in parts]),
        layers=parts[0].layers,
        equations=torch.cat([part.equations for part in parts]),
        unknowns=parts[0].unknowns,
        residual=torch.cat([part.residual for part in parts]),
    )


def _at_once(chain: Chain, num_images: int, device: torch.device) -> int:
    """Victims whose patches and weights fit the memory."""
    size = max((num_images * (_patches(stage) + stage.layer.weight.numel()) for stage in chain.stages), default=1)
    return max(1, _MEMORY.get(device.type, 2**30) // (8 * size))


def _patches(stage: Stage) -> int:
    """Numbers that one image's patches hold."""
    return math.prod(stage.output_shape[1:]) * stage.input_shape[0] * math.prod(geometry_of(stage).kernel)


class _Inversion:
    """Some victims' layers, from the last to the first."""

    def __init__(
        self, shared: SharedGradient, victim: Victim, chain: Chain, tolerance: float, max_iterations: int
    ) -> None:
        self.chain, self.tolerance, self.max_iterations = chain, tolerance, max_iterations
        self.protocol = shared.protocol
        self.scale = 1 / self.protocol.num_images if self.protocol.reduction == "mean" else 1.0
        self.gradients = {name: tensor.double() for name, tensor in shared.gradients.items()}
        self.state = {
            name: (tensor if shared.own_weights else tensor[None]).double() for name, tensor in shared.state.items()
        }
        self.classifier_weight = self.state[f"{victim.classifier}.weight"]

    def run(self, features: Tensor, logit_gradients: Tensor) -> LayerByLayer:
        outputs = features.double()
        gradients = logit_gradients.double() @ self.classifier_weight
        equations, residuals = [], [outputs.new_zeros(len(outputs))]
        for number in reversed(range(len(self.chain.stages))):
            stage = self.chain.stages[number]
            outputs, slopes = self._invert(stage.after, outputs.reshape(*outputs.shape[:2], -1))
            gradients = gradients.reshape(outputs.shape) * slopes
            shape = (*outputs.shape[:2], *stage.output_shape)
            outputs, slopes, gradients = (tensor.reshape(shape) for tensor in (outputs, slopes, gradients))
            system = self._system(stage, slopes, gradients, first=number == 0)
            equations.append(system.count)
            outputs, residual = self._solve(system, stage, outputs, self._start(number))
            residuals.append(residual)
            gradients = system.geometry.fold(system.weight.mT @ system.per_group(gradients), shape[:2])
        images, _ = self._invert(self.chain.before, outputs)
        victims, device = len(images), images.device
        empty = torch.zeros(victims, 0, dtype=torch.long, device=device)
        return LayerByLayer(
            images=images.reshape(victims, -1, *self.protocol.image_shape),
            layers=tuple(stage.name for stage in self.chain.stages),
            equations=torch.stack(equations[::-1], dim=1) if equations else empty,
            unknowns=torch.tensor(
                [self.protocol.num_images * math.prod(stage.input_shape) for stage in self.chain.stages],
                dtype=torch.long,
                device=device,
            ),
            residual=torch.stack(residuals).amax(0),
        )

    def _invert(self, functions: tuple[Elementwise, ...], outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the functions and their slopes there."""
        slopes = torch.ones_like(outputs)
        for function in reversed(functions):
            outputs, slope = function.invert(outputs, self.state)
            slopes = slopes.reshape(outputs.shape) * slope
        return outputs, slopes

    def _start(self, number: int) -> Tensor:
        """Where the search for the inputs of a layer begins, ``(V or 1, 1, D)``."""
        stages = self.chain.stages
        functions = stages[number - 1].after if number else self.chain.before
        shape = stages[number - 1].output_shape if number else self.protocol.image_shape
        start = torch.full((1, 1, *shape), 0.0 if number else 0.5).to(self.classifier_weight)
        for function in functions:
            start = function.apply(start, self.state)
        return start.flatten(2)

    def _system(self, stage: Stage, slopes: Tensor, gradients: Tensor, *, first: bool) -> LinearSystem:
        geometry = geometry_of(stage)
        victims, count = slopes.shape[:2]
        grouped = (victims, count, geometry.groups, -1, math.prod(geometry.output_size))
        weight = self.state[f"{stage.name}.weight"]
        weight = weight.reshape(len(weight), 1, geometry.groups, -1, geometry.patch)
        largest = slopes.abs().flatten(1).amax(1)
        slopes = slopes.abs() / torch.where(largest > 0, largest, 1).reshape(-1, 1, 1, 1, 1)
        errors = None
        if f"{stage.name}.weight" in self.gradients:
            errors = self.scale * gradients.reshape(grouped)
        system = LinearSystem(
            geometry=geometry,
            weight=weight.expand(victims, count, *weight.shape[2:]).contiguous(),
            slopes=slopes.reshape(grouped),
            errors=errors,
        )
        system.prepare(self.protocol.image_shape if first else None)
        return system

    def _solve(self, system: LinearSystem, stage: Stage, outputs: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        outputs = system.per_group(outputs)
        if (bias := self.state.get(f"{stage.name}.bias")) is not None:
            outputs = outputs - bias.reshape(len(bias), 1, *outputs.shape[2:4], 1)
        given = [system.slopes * outputs]
        if system.errors is not None:
            gradient = self.gradients[f"{stage.name}.weight"]
            given.append(gradient.reshape(len(gradient), *system.weight.shape[2:]) * system.scale)
        victims, count = outputs.shape[:2]
        start = start.expand(victims, count, -1).reshape(victims, -1)
        found = conjugate_gradients(system, given, start, self.tolerance, self.max_iterations)
        left = sum((b - a).flatten(1).square().sum(1) for a, b in zip(system.product(found), given, strict=True))
        size = sum(part.flatten(1).square().sum(1) for part in given)
        assert isinstance(left, Tensor)
        assert isinstance(size, Tensor)
        residual = torch.where(size > 0, left / size, left).sqrt()
        return found.reshape(victims, count, -1), residual
