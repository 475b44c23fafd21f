"""Gradients of single images, clipped one by one: what DP-SGD does inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from leakage.clients.smoothing import smoothed, without_sharpness

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.victim import Victim

# Images whose gradients are in memory at once.
_AT_ONCE = 16


def clipped_examples(
    victim: Victim, state: Mapping[str, Tensor], images: Tensor, targets: Tensor, norm: float
) -> dict[str, Tensor]:
    r"""Of one victim's images, :math:`\sum_n g_n \min(1, C / \lVert g_n \rVert_2)`, over N where the loss is a mean.

    Twice differentiable, and made for ``vmap``.

    Args:
        victim: of one step, whose images do not see one another.
        state: weights and buffers by name.
        images: ``(N, C, H, W)``.
        targets: class probabilities ``(N, K)``.
        norm: C.
    """
    fixed, sharpness = without_sharpness({name: state[name] for name in state if name not in victim.trainable})
    weights = {name: state[name] for name in victim.trainable}

    def loss(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        with smoothed(sharpness):
            logits = functional_call(victim.model, (weights, fixed), (image[None],))
        return victim.loss(logits, target[None])

    def clipped(image: Tensor, target: Tensor) -> dict[str, Tensor]:
        return shortened(grad(loss)(weights, image, target), norm)

    found = vmap(clipped, chunk_size=_AT_ONCE)(images, targets)
    reduce = torch.mean if victim.protocol.reduction == "mean" else torch.sum
    return {name: reduce(tensor, 0) for name, tensor in found.items()}


def shortened(gradients: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    """Gradients of at most this norm, of one victim and differentiable; near 0 without a division by it."""
    largest = torch.stack([tensor.detach().abs().amax() for tensor in gradients.values()]).amax()
    largest = torch.where(largest > 0, largest, 1.0)
    squares = torch.stack([(tensor / largest).square().sum() for tensor in gradients.values()]).sum()
    length = torch.where(squares > 0, largest * torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
    factor = norm / torch.where(length > norm, length, norm)
    return {name: factor * tensor for name, tensor in gradients.items()}
