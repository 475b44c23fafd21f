"""Distances between gradients, and the losses of the victims that made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

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
    return torch.stack([(gradients[name] - target).square().sum() for name, target in targets.items()]).sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per image of ``logits (N, K)`` with class probabilities ``targets (N, K)``."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1)


def mean_squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the classes of the squared difference of ``logits (N, K)`` and ``targets (N, K)``."""
    return (logits - targets).square().mean(-1)


# The training losses a victim can have, each (N, K) logits and (N, K) probabilities to (N,).
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mean_squared_error": mean_squared_error,
}
