"""The training losses of clients.

With :data:`OWN`, the model computes the loss itself: ``model(images, targets)`` returns it as one number.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return ``(N,)``, the cross-entropy of logits ``(N, K)`` with class probabilities ``(N, K)``."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1)


def mean_squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Return ``(N,)``, the squared difference of logits ``(N, K)`` and targets ``(N, K)``, averaged over classes."""
    return (logits - targets).square().mean(-1)


# Each maps logits (N, K) and class probabilities (N, K) to losses (N,).
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mean_squared_error": mean_squared_error,
}
#: The ``loss`` of clients whose model computes it.
OWN = "own"
