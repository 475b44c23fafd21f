r"""The gradient of a last layer with many classes, represented with as few numbers as its rank allows.

For N images with features H ``(N, D)`` and derivatives :math:`\Delta` ``(N, K)`` by the logits, the gradient of the
last layer's weights is :math:`\Delta^\top H`, which has rank N. With an orthonormal basis Q ``(K, N)`` of its columns,
the shared gradient is :math:`G = Q B`, and the gradient of other images differs from it by

.. math::
    \lVert \Delta^\top H - G \rVert^2 = \lVert Q^\top \Delta^\top H - B \rVert^2 + \lVert R^\top H \rVert^2, \qquad
    R = \Delta - \Delta Q Q^\top

No digits are lost near the solution, and no term has K times D numbers. As this is an orthogonal change of coordinates,
it is valid for every distance that does not depend on coordinates, such as an angle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.linalg import cholesky_ex, qr, svd, vector_norm

from leakage.clients.activations import Activation, recorded
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.smoothing import smoothed, without_sharpness

if TYPE_CHECKING:  # a victim computes gradients in these coordinates
    from leakage.clients.victim import Victim

# Size of a gradient from which on the representation saves time, and the least factor by which it must be smaller.
_LARGE, _FEWER = 2**19, 4
# What may lie outside the basis, in units of the precision of the shared gradient, and the least value of such a unit.
_ROUNDING, _LEAST = 16.0, 1e-14
# Number of subspace iterations, each of which reduces the relative rounding error of the space by a factor equal to its
# initial size, and number of spare directions.
_REPEATED, _SPARE = 3, 8
# Number of rows of a gradient that are converted to double precision at once.
_ROWS = 512


def has_low_rank(victim: Victim) -> bool:
    """Return whether the last layer's gradient is large, undefended, and computed from few images in one step."""
    protocol, model = victim.protocol, victim.model
    name = f"{victim.classifier}.weight"
    if victim.classifier is None or name not in victim.trainable or protocol.local_steps > 1 or protocol.defenses:
        return False
    weight = model.get_parameter(name)
    users = sum(own is weight for module in model.modules() for own in module.parameters(recurse=False))
    classes, features = weight.shape
    return users == 1 and weight.numel() >= _LARGE and _FEWER * protocol.num_images <= min(classes, features)


def is_of_low_rank(shared: SharedGradient, victim: Victim) -> bool:
    """Return whether the shared gradients have the low rank that :func:`has_low_rank` predicts, up to rounding."""
    if not has_low_rank(victim):
        return False
    gradients = shared.gradients[f"{victim.classifier}.weight"]
    unit = _ROUNDING * max(torch.finfo(gradients.dtype).eps, _LEAST)
    for gradient in gradients:
        basis, inside = _factorised(gradient, victim.protocol.num_images)
        if bool(vector_norm(gradient - basis @ inside) > unit * vector_norm(inside)):
            return False
    return True


def in_basis(shared: SharedGradient, victim: Victim) -> SharedGradient:
    """Replace the gradient of the last layer by B ``(V, N, D)``, and store Q ``(V, K, N)`` as :attr:`basis`.

    The weights of the layer are transposed to ``(V, D, K)`` or ``(D, K)``, so that products with them, and with their
    transpose, read memory in order.
    """
    name = f"{victim.classifier}.weight"
    gradients = shared.gradients[name]
    factors = [_factorised(gradient, victim.protocol.num_images) for gradient in gradients]
    basis, inside = (torch.stack(parts).to(gradients) for parts in zip(*factors, strict=True))
    return dataclasses.replace(
        shared,
        gradients={**shared.gradients, name: inside},
        state={**shared.state, name: shared.state[name].mT.contiguous()},
        basis=basis,
    )


def evaluate_in_basis(
    victim: Victim, state: Mapping[str, Tensor], images: Tensor, targets: Tensor, modules: Sequence[str], basis: Tensor
) -> tuple[dict[str, Tensor], dict[str, Activation]]:
    """Do :meth:`Victim.evaluate` for one step, without building the full gradient of the last layer's weights."""
    assert victim.classifier is not None
    layer, name = victim.classifier, f"{victim.classifier}.weight"
    weights = {own: state[own] for own in victim.trainable if own != name}
    fixed = {own: tensor for own, tensor in state.items() if own not in weights} | {name: state[name].mT}
    fixed, sharpness = without_sharpness(fixed)

    def loss(weights: dict[str, Tensor], shift: Tensor) -> tuple[Tensor, dict[str, Activation]]:
        with recorded(victim.model, [*modules, layer]) as activations, smoothed(sharpness):
            logits = functional_call(victim.model, (weights, fixed), (images,))
        return victim.loss(logits + shift, targets), activations

    (gradients, delta), activations = grad(loss, argnums=(0, 1), has_aux=True)(weights, torch.zeros_like(targets))
    inside, outside = coordinates(delta, activations[layer].inputs, basis)
    gradients |= {name: inside, f"{name} outside": outside}
    return gradients, {own: activations[own] for own in modules}


def coordinates(delta: Tensor, features: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    r"""Split the gradient :math:`\Delta^\top H` of one victim's last layer into its parts inside and outside a basis.

    The part outside, :math:`R^\top H`, is represented by :math:`R^\top L` with :math:`L L^\top = H H^\top`, which has
    the same norm.

    Args:
        delta: derivatives by the logits, ``(N, K)``.
        features: ``(N, D)``.
        basis: orthonormal columns, ``(K, N)``.

    Returns:
        The coordinates inside, ``(N, D)``, and the part outside, ``(K, N)``, both differentiable.
    """
    in_basis, outside = split(delta, basis)
    products = features @ features.mT
    # Two images may have the same features, for example if they start from the same values.
    tiny = torch.finfo(products.dtype).eps * products.diagonal().sum() + torch.finfo(products.dtype).tiny
    root = cholesky_ex(products + len(features) * tiny * torch.eye(len(features)).to(products))[0]
    return in_basis.mT @ features, outside.mT @ root


def split(delta: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of ``delta`` in a basis ``(K, N)``, and the remainder; for one or V victims."""
    in_basis = delta @ basis
    outside = delta - in_basis @ basis.mT
    # Project twice: otherwise the rounding error of the first product would count on both sides.
    more = outside @ basis
    return in_basis + more, outside - more @ basis.mT


def row_space(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the N largest singular values ``(V, N)`` of matrices ``(V, K, D)``, and right vectors ``(V, N, D)``.

    For large matrices, which must have rank N up to rounding, they are found by subspace iteration.
    """
    if matrices[0].numel() < _LARGE or _FEWER * rank > min(matrices.shape[1:]):
        _, strengths, rows = svd(matrices, full_matrices=False)
        return strengths[:, :rank], rows[:, :rank]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(matrices.shape[2], rank + _SPARE, generator=generator).to(matrices)
    for _ in range(_REPEATED):
        basis = qr(matrices.mT @ (matrices @ basis))[0]
    _, strengths, turned = svd(matrices @ basis, full_matrices=False)
    return strengths[:, :rank], (turned @ basis.mT)[:, :rank]


def _factorised(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return Q and B of one victim's gradient ``(K, D)``, in double precision."""
    columns = torch.randn(gradient.shape[1], rank, generator=torch.Generator().manual_seed(0)).to(gradient)
    rows = _orthonormal(gradient.mT @ _orthonormal(gradient @ columns).to(gradient))
    # Computed from the row space and in double precision, so that no digits are lost, whatever the first columns were.
    parts = torch.split(gradient, _ROWS)
    basis = _orthonormal(torch.cat([part.double() @ rows for part in parts]))
    pairs = zip(torch.split(basis, _ROWS), parts, strict=True)
    return basis, torch.stack([of_basis.mT @ part.double() for of_basis, part in pairs]).sum(0)


def _orthonormal(columns: Tensor) -> Tensor:
    columns = columns.double()
    largest = columns.abs().amax()  # squares of tiny gradients would vanish
    basis: Tensor = qr(columns / torch.where(largest > 0, largest, 1.0))[0]
    return basis
