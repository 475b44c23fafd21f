"""R-GAP: images from the inputs of the last layer, layer by layer, by linear least squares."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.clients.chain import Link
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form.features import SeparatedFeatures, check_separable, separate_features
from leakage.closed_form.inverses import apply, find_chain, invert
from leakage.closed_form.linear_system import LinearSystem
from leakage.precision import full_precision
from leakage.solvers.linear import least_squares

# Bytes for the patches and weights of the victims that are solved at once; on the CPU, they should fit the cache.
_MEMORY = {"cpu": 2**23, "cuda": 2**30}
# Largest number of iterations for one layer.
_ITERATIONS, _ITERATIONS_OF_BATCHES = 2000, 300


@dataclass
class LayerByLayer:
    """The result of :func:`invert_layers`.

    Attributes:
        images: ``(V, N, C, H, W)`` in float64, not clamped to [0, 1].
        layers: names of the S layers that were inverted, from the first to the last.
        equations: ``(V, S)``, number of equations for the inputs of each layer.
        unknowns: ``(S,)``, number of values in the inputs of each layer.
        residual: ``(V,)``, the largest relative residual of the layers' systems.
    """

    images: Tensor
    layers: tuple[str, ...]
    equations: Tensor
    unknowns: Tensor
    residual: Tensor

    @property
    def determined(self) -> Tensor:
        """``(V,)``, whether every layer has at least as many equations as unknowns."""
        return (self.equations >= self.unknowns).all(dim=1)


@torch.no_grad()
@full_precision()
def invert_layers(
    shared: SharedGradient,
    victim: Victim,
    separated: SeparatedFeatures,
    *,
    tolerance: float = 1e-8,
    max_iterations: int = _ITERATIONS,
) -> LayerByLayer:
    r"""Reconstruct the images of each victim from the inputs of its last linear layer (R-GAP, for several images).

    Layers are inverted from the last to the first. For image n, a linear layer or convolution computes
    :math:`z_n = W x_n + b`, and an activation :math:`a_n = \sigma(z_n)`. Known are :math:`a_n` and the gradient
    :math:`\partial_{a_n}` of the image's own loss, so

    .. math:: z_n = \sigma^{-1}(a_n), \qquad \delta_n = \sigma'(z_n) \, \partial_{a_n},

    and the inputs :math:`x_n` solve a linear least-squares problem: the layer's own equations, weighted by how well
    z is known, and the equations of the shared gradient of W, to which all N images contribute,

    .. math:: \sigma'(z_n) \, (W x_n + b) = \sigma'(z_n) \, z_n \quad (n = 1 \dots N), \qquad
        \frac{1}{N} \sum_n \delta_n x_n^\top = g_W

    (without 1/N with ``reduction="sum"``). Then :math:`\partial_{x_n} = W^\top \delta_n`, and the previous layer is
    next. Where a ReLU gave zero, z is unknown and :math:`\delta` is zero. The result is exact up to rounding, which
    grows from layer to layer, if every layer has as many independent equations as unknowns. If a layer has fewer, its
    inputs are those nearest to a start: a grey image, in the metric of :class:`~leakage.solvers.ImageSpectrum`, for the
    first layer, and the activations' values at 0 for others. The systems of each victim are solved by preconditioned
    conjugate gradients (CGLS) in float64, until the preconditioned norm of the gradient has fallen by ``tolerance``.

    :attr:`LayerByLayer.equations` counts the known outputs of the layer, at most as many per image as the image has
    inputs, and for each input channel the entries of the gradient of W that are not always zero, at most as many as the
    channel has unknowns. No more of either can be independent.

    Args:
        shared: what the victims shared.
        victim: their model and protocol; the network must be a plain chain (:func:`find_chain`), with one local step. A
            layer whose weight is not trained has only its own equations.
        separated: features ``(V, N, D)`` and logit gradients ``(V, N, K)`` of each image.
        tolerance: relative tolerance of the least-squares solver.
        max_iterations: largest number of iterations for one layer.

    Raises:
        ValueError: victims take several local steps, the network is no plain chain, or features have other shapes.

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
    if protocol.learning_rate is not None:
        raise ValueError(
            "Expected victims with `local_steps` 1, whose gradient is that of one network, but got "
            f"{protocol.local_steps} and `learning_rate` {protocol.learning_rate!r}."
        )
    *links, classifier = find_chain(victim)
    victim.check(shared)
    for name, tensor, width in (
        ("features", separated.features, classifier.input_shape[0]),
        ("logit_gradients", separated.logit_gradients, classifier.output_shape[0]),
    ):
        expected = (len(shared), protocol.num_images, width)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"Expected `{name}` of shape {expected}, but got {tuple(tensor.shape)}.")
    parts, at_once = [], _at_once(links, protocol.num_images, separated.features.device)
    # The last layer may have far more weights than all others, so it is handled victim by victim.
    head = shared.state[f"{classifier.name}.weight"]
    back = torch.stack(
        [
            gradient.double() @ (head[victim] if shared.own_weights else head).double()
            for victim, gradient in enumerate(separated.logit_gradients)
        ]
    )
    gradients, state = (
        {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] != classifier.name}
        for tensors in (shared.gradients, shared.state)
    )
    rest = dataclasses.replace(shared, gradients=gradients, state=state)
    for victims in torch.split(torch.arange(len(shared)), at_once):
        inversion = _Inversion(rest.select(victims), links, tolerance, max_iterations)
        parts.append(inversion.run(separated.features[victims].double(), back[victims]))
    images, equations, residual = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    layers = [link for link in links if link.is_layer]
    sizes = [protocol.num_images * math.prod(link.input_shape) for link in layers]
    unknowns = torch.tensor(sizes, dtype=torch.long, device=images.device)
    return LayerByLayer(images, tuple(link.name for link in layers), equations, unknowns, residual)


def check_layers(victim: Victim) -> None:
    """Raise a ``ValueError`` unless :func:`images_by_layers` can reconstruct the images of such victims.

    Raises:
        ValueError: :func:`check_separable` or :func:`find_chain` refuses the victims, or there are several images with
            loss ``"mean_squared_error"``.
    """
    check_separable(victim)
    protocol = victim.protocol
    if protocol.loss == "mean_squared_error" and protocol.num_images > 1:
        raise ValueError(
            "Expected one image with loss 'mean_squared_error', which can't tell apart the features of several images "
            f"whose labels repeat, but got {protocol.num_images}."
        )
    find_chain(victim)


def images_by_layers(shared: SharedGradient, victim: Victim, labels: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Run R-GAP: separate the features of each image, then invert the layers down to the images.

    Args:
        shared: what V victims shared.
        victim: their model and protocol, which must pass :func:`check_layers`.
        labels: ``(V, N)``, class indices.
        seed: seed of the separation of features.

    Returns:
        Images ``(V, N, C, H, W)`` in float64, in [0, 1], and ``(V,)``, false for victims without a finite solution.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(image_size=12), image_shape=(1, 12, 12))
        >>> images, labels = torch.rand(2, 1, 1, 12, 12), torch.tensor([[3], [8]])
        >>> found, usable = images_by_layers(victim.share(images, labels), victim, labels)
        >>> bool((found - images).abs().max() < 1e-3), usable.tolist()
        (True, [True, True])
    """
    last = find_chain(victim)[-1].name
    if last == victim.classifier:
        separated = separate_features(shared, victim, labels, seed=seed)
    else:
        separated = _inputs_of(last, shared)
    # With several images, layers are seldom determined, and then further iterations do not help.
    most = _ITERATIONS_OF_BATCHES if shared.protocol.num_images > 1 else _ITERATIONS
    found = invert_layers(shared, victim, separated, max_iterations=most)
    usable = torch.isfinite(found.images).flatten(1).all(1) & torch.isfinite(found.residual)
    return found.images.clamp(0, 1), usable


def _inputs_of(layer: str, shared: SharedGradient) -> SeparatedFeatures:
    """Return the inputs of a linear layer and the gradient of its outputs, for a single image."""
    weight, outputs = (shared.gradients[f"{layer}.{name}"].double() for name in ("weight", "bias"))
    outputs = outputs[:, None]
    features = outputs @ weight / outputs.square().sum(2, keepdim=True)
    residual = (outputs.mT @ features - weight).norm(dim=(1, 2)) / weight.norm(dim=(1, 2))
    return SeparatedFeatures(features, outputs, residual)


def _at_once(links: list[Link], num_images: int, device: torch.device) -> int:
    """Return the number of victims whose patches and weights fit into memory."""
    sizes = [1]
    for geometry in (link.geometry for link in links if link.is_layer):
        positions, weights = math.prod(geometry.output_shape[1:]), geometry.output_shape[0] * geometry.patch
        sizes.append(num_images * (positions * geometry.groups * geometry.patch + weights))
    return max(1, _MEMORY.get(device.type, 2**30) // (8 * max(sizes)))


class _Inversion:
    """Inversion of the layers of some victims, from the last to the first."""

    def __init__(self, shared: SharedGradient, links: list[Link], tolerance: float, max_iterations: int) -> None:
        self.links, self.tolerance, self.max_iterations = links, tolerance, max_iterations
        self.protocol = shared.protocol
        self.scale = 1 / self.protocol.num_images if self.protocol.reduction == "mean" else 1.0
        self.gradients = {name: tensor.double() for name, tensor in shared.gradients.items()}
        self.state = {
            name: (tensor if shared.own_weights else tensor[None]).double() for name, tensor in shared.state.items()
        }

    def run(self, outputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, numbers of equations and residuals, given the last link's outputs and their gradients."""
        equations, residuals = [outputs.new_zeros(len(outputs), 0).long()], [outputs.new_zeros(len(outputs))]
        slopes = torch.ones_like(outputs)
        for number, link in reversed([*enumerate(self.links)]):
            if not link.is_layer:
                outputs, slope = invert(link, outputs, self.state)
                slopes = slopes.reshape(outputs.shape) * slope
                continue
            gradients = gradients.reshape(slopes.shape) * slopes
            first = not any(other.is_layer for other in self.links[:number])
            system = self._system(link, slopes, gradients, first=first)
            outputs, residual = self._solve(system, link.name, outputs, self._start(number))
            gradients = system.geometry.fold(system.weight.mT @ gradients.reshape(system.slopes.shape))
            slopes = torch.ones_like(outputs)
            equations.append(system.count[:, None])
            residuals.append(residual)
        images = outputs.reshape(*outputs.shape[:2], *self.protocol.image_shape)
        return images, torch.cat(equations[::-1], dim=1), torch.stack(residuals).amax(0)

    def _start(self, number: int) -> Tensor:
        """Return the start of the search for the inputs of a layer, ``(V or 1, 1, D)``."""
        first = number
        while first and not self.links[first - 1].is_layer:
            first -= 1
        shape, value = (self.links[first - 1].output_shape, 0.0) if first else (self.protocol.image_shape, 0.5)
        start = torch.full((1, 1, *shape), value).to(next(iter(self.state.values())))
        for link in self.links[first:number]:
            start = apply(link, start, self.state)
        return start.flatten(2)

    def _system(self, link: Link, slopes: Tensor, gradients: Tensor, *, first: bool) -> LinearSystem:
        geometry = link.geometry
        victims, count = slopes.shape[:2]
        grouped = (victims, count, geometry.groups, -1, math.prod(geometry.output_shape[1:]))
        weight = self.state[f"{link.name}.weight"]
        weight = weight.reshape(len(weight), 1, geometry.groups, -1, geometry.patch)
        largest = slopes.abs().flatten(1).amax(1)
        slopes = slopes.abs() / torch.where(largest > 0, largest, 1).view(-1, *[1] * (slopes.ndim - 1))
        known = f"{link.name}.weight" in self.gradients
        return LinearSystem.weighted(
            geometry,
            weight=weight.expand(victims, count, *weight.shape[2:]).contiguous(),
            slopes=slopes.reshape(grouped),
            errors=self.scale * gradients.reshape(grouped) if known else None,
            image_shape=self.protocol.image_shape if first else None,
        )

    def _solve(self, system: LinearSystem, name: str, outputs: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs ``(V, N, D)``, and the residual relative to the right-hand side."""
        victims, count = outputs.shape[:2]
        outputs = outputs.reshape(system.slopes.shape)
        if (bias := self.state.get(f"{name}.bias")) is not None:
            outputs = outputs - bias.reshape(len(bias), 1, *outputs.shape[2:4], 1)
        given = [system.slopes * outputs]
        if system.errors is not None:
            gradient = self.gradients[f"{name}.weight"]
            given.append(gradient.reshape(len(gradient), *system.weight.shape[2:]) * system.scale)
        x = start.expand(victims, count, -1).reshape(victims, -1)
        rest = [b - a for a, b in zip(system.product(x), given, strict=True)]
        x = x + least_squares(system, rest, tolerance=self.tolerance, max_products=self.max_iterations).x
        rest = [b - a for a, b in zip(system.product(x), given, strict=True)]
        left, size = _squares(rest), _squares(given)
        return x.reshape(victims, count, -1), torch.where(size > 0, left / size, left).sqrt()


def _squares(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.flatten(1).square().sum(1) for part in parts]).sum(0)
