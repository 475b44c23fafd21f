"""Distances between gradients, and the losses of the victims that made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.linalg import vector_norm

Gradients = Mapping[str, Tensor]


def squared_distance(gradients: Gradients, targets: Gradients) -> Tensor:
    r"""Sum of squared differences over all gradients of one victim, the distance of DLG and iDLG.

    .. math:: D(g, g^*) = \sum_l \lVert g_l - g_l^* \rVert_2^2

    Args:
        gradients: named gradients of the dummy images, any shapes.
        targets: named gradients that the victim shared, the same names and shapes.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: the names or shapes differ.

    Example:
        >>> squared_distance({"w": torch.ones(2, 2)}, {"w": torch.zeros(2, 2)})
        tensor(4.)
    """
    _check_same(gradients, targets)
    return torch.stack([(gradients[name] - target).square().sum() for name, target in targets.items()]).sum()


def cosine_distance(gradients: Gradients, targets: Gradients) -> Tensor:
    r"""One minus the cosine of the angle between two gradients, each taken as one long vector.

    .. math:: D(g, g^*) = 1 - \frac{\langle g, g^* \rangle}{\lVert g \rVert \, \lVert g^* \rVert + 10^{-12}}

    Args:
        gradients: named gradients of the dummy images, any shapes.
        targets: named gradients to match, the same names and shapes.

    Returns:
        A scalar from 0 to 2; the lengths of the gradients do not matter.

    Raises:
        ValueError: the names or shapes differ.

    References:
        Geiping et al., *Inverting Gradients*, NeurIPS 2020, https://arxiv.org/abs/2003.14053.

    Example:
        >>> cosine_distance({"w": torch.ones(2, 2)}, {"w": -2 * torch.ones(2, 2)})
        tensor(2.)
    """
    _check_same(gradients, targets)
    found = torch.cat([gradients[name].reshape(-1) for name in targets])
    wanted = torch.cat([target.reshape(-1) for target in targets.values()])
    lengths: Tensor = vector_norm(found) * vector_norm(wanted)
    return 1 - (found * wanted).sum() / (lengths + 1e-12)  # `@` would be rounded under autocast


def row_cosine_distance(gradients: Gradients, targets: Gradients) -> Tensor:
    r"""One minus the cosine for the weights of each output unit, summed: the distance of dataset condensation.

    The gradient of a layer's weights is taken as a matrix of one row per output (unit or channel):

    .. math::
        D(g, g^*) = \sum_l \sum_{i} 1 - \frac{\langle g_{l,i}, g^*_{l,i} \rangle}
        {\lVert g_{l,i} \rVert \, \lVert g^*_{l,i} \rVert + 10^{-6}}

    Gradients of one dimension (biases, scales of normalisation) and of none are left out.

    Args:
        gradients: named gradients of the dummy images, any shapes.
        targets: named gradients to match, the same names and shapes.

    Returns:
        A scalar from 0 to twice the number of rows.

    Raises:
        ValueError: the names or shapes differ, or all gradients have fewer than two dimensions.

    References:
        Zhao et al., *Dataset Condensation with Gradient Matching*, ICLR 2021, appendix A,
        https://arxiv.org/abs/2006.05929.

    Example:
        >>> row_cosine_distance({"w": torch.eye(2), "b": torch.ones(2)}, {"w": 3 * torch.eye(2), "b": torch.zeros(2)})
        tensor(0.00)
    """
    _check_same(gradients, targets)
    layers = [name for name, target in targets.items() if target.ndim > 1]
    if not layers:
        raise ValueError(f"Expected a gradient of at least two dimensions, but got only {sorted(targets)}.")
    return torch.stack([_one_minus_cosines(gradients[name], targets[name]).sum() for name in layers]).sum()


def _one_minus_cosines(gradient: Tensor, target: Tensor) -> Tensor:
    found, wanted = gradient.flatten(1), target.flatten(1)
    lengths: Tensor = vector_norm(found, dim=1) * vector_norm(wanted, dim=1)
    return 1 - (found * wanted).sum(1) / (lengths + 1e-6)


def _check_same(gradients: Gradients, targets: Gradients) -> None:
    if gradients.keys() != targets.keys():
        raise ValueError(
            f"Expected `gradients` and `targets` of the same names, but got {sorted(gradients)} and {sorted(targets)}."
        )
    for name, target in targets.items():
        if gradients[name].shape != target.shape:
            raise ValueError(
                f"Expected `gradients` and `targets` of the same shapes, but got "
                f"{tuple(gradients[name].shape)} and {tuple(target.shape)} for {name!r}."
            )


# What `distance` may be, for attacks and for condensation alike.
DISTANCES: dict[str, Callable[[Gradients, Gradients], Tensor]] = {
    "squared": squared_distance,
    "cosine": cosine_distance,
    "row_cosine": row_cosine_distance,
}
