"""Gradients of single images, clipped one by one, as DP-SGD needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import grad, vmap

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.victim import Victim

# Number of images whose gradients are in memory at once.
_AT_ONCE = 16


def clipped_examples(
    victim: Victim,
    state: Mapping[str, Tensor],
    images: Tensor,
    targets: Tensor,
    norm: float,
    shares: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""Sum the clipped gradients of the images of one step, :math:`\sum_n g_n \min(1, C / \lVert g_n \rVert_2)`.

    If the loss is a mean over images, the sum is divided by the size of the step. The result is twice differentiable
    and works under ``vmap``.

    Args:
        victim: a victim whose network treats each image independently.
        state: weights and buffers by name.
        images: ``(N, C, H, W)``.
        targets: class probabilities ``(N, K)``.
        norm: C.
        shares: ``(N,)``, how much of each image is in the step, by default all.
    """
    fixed = {name: state[name] for name in state if name not in victim.trainable}
    weights = {name: state[name] for name in victim.trainable}

    def loss(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return victim.step_loss(weights, fixed, image[None], target[None])[0]

    def clipped(image: Tensor, target: Tensor) -> dict[str, Tensor]:
        return shortened(grad(loss)(weights, image, target), norm)

    found = vmap(clipped, chunk_size=_AT_ONCE)(images, targets)
    if shares is None:
        reduce = torch.mean if victim.protocol.reduction == "mean" else torch.sum
        return {name: reduce(tensor, 0) for name, tensor in found.items()}
    size = 1 if victim.protocol.reduction == "sum" else victim.protocol.step_size
    return {name: torch.tensordot(shares, tensor, 1) / size for name, tensor in found.items()}


def shortened(gradients: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    """Clip the gradients of one victim to a norm; differentiable, and without division by norms near 0."""
    largest = torch.stack([tensor.detach().abs().amax() for tensor in gradients.values()]).amax()
    largest = torch.where(largest > 0, largest, 1.0)
    squares = torch.stack([(tensor / largest).square().sum() for tensor in gradients.values()]).sum()
    length = torch.where(squares > 0, largest * torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
    factor = norm / torch.where(length > norm, length, norm)
    return {name: factor * tensor for name, tensor in gradients.items()}
