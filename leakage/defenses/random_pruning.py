"""Random pruning of the gradient's entries."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Gradients, Size, Sparse
from leakage.errors import check_kept


class RandomPruning(Sparse):
    r"""Keeps a random part of the gradient's entries, and sets the rest to zero.

    Of all D entries it keeps :math:`\max(1, \mathrm{round}(\rho D))`, drawn uniformly.

    An attacker who knows the defense compares only the entries that were sent.

    Args:
        share: :math:`\rho`, share of the entries to keep, above 0 and at most 1.

    Raises:
        ValueError: ``share`` is out of its range.

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
        """Return the gradients with the other entries set to zero."""
        entries = sum(tensor.numel() for tensor in gradients.values())
        kept = torch.randperm(entries, generator=generator)[: max(1, round(self.share * entries))]
        mask = torch.zeros(entries, dtype=torch.bool).index_fill_(0, kept, True)
        parts = torch.split(mask, [tensor.numel() for tensor in gradients.values()])
        return {
            name: torch.where(part.view_as(tensor).to(tensor.device), tensor, 0)
            for (name, tensor), part in zip(gradients.items(), parts, strict=True)
        }

    def size(self, before: Size, gradients: Gradients) -> Size:
        """Return the size of the kept entries, and of a 64-bit seed that determines which ones they are."""
        return Size(max(1, round(self.share * before.numbers)), before.bits, before.more + 64)
