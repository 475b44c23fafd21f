"""A random part of the gradient's entries."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Gradients, Size, Sparse
from leakage.errors import check_kept


class RandomPruning(Sparse):
    r"""Keeps entries of the gradient that are drawn at random, and sets the rest to zero.

    Of all D entries it keeps :math:`\max(1, \mathrm{round}(\rho D))`, each of them as likely as any other.

    An attacker who knows of it compares only what was sent; of the rest nothing is known.

    Args:
        share: :math:`\rho`, above 0 and at most 1.

    Raises:
        ValueError: ``share`` out of its range.

    References:
        Konečný et al., *Federated Learning: Strategies for Improving Communication Efficiency*, 2016, "random mask",
        https://arxiv.org/abs/1610.05492.

    Example:
        >>> pruned = RandomPruning(0.25)({"weight": torch.ones(4, 2)}, torch.Generator().manual_seed(0))
        >>> int(pruned["weight"].sum())
        2
    """

    def __init__(self, share: float) -> None:
        check_kept(share=share)
        self.share = share

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """The gradients, sparse."""
        entries = sum(tensor.numel() for tensor in gradients.values())
        kept = torch.randperm(entries, generator=generator)[: max(1, round(self.share * entries))]
        mask = torch.zeros(entries, dtype=torch.bool).index_fill_(0, kept, True)
        parts = torch.split(mask, [tensor.numel() for tensor in gradients.values()])
        return {
            name: torch.where(part.view_as(tensor).to(tensor.device), tensor, 0)
            for (name, tensor), part in zip(gradients.items(), parts, strict=True)
        }

    def size(self, before: Size, gradients: Gradients) -> Size:
        """The seed of the draw tells which entries they are."""
        return Size(max(1, round(self.share * before.numbers)), before.bits, before.more + 64)
