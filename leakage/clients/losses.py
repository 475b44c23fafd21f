"""The training losses that a client can have."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


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
