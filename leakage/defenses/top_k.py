"""Top-k sparsification of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Gradients, Size, Sparse
from leakage.errors import check_kept


class TopK(Sparse):
    r"""Keeps the largest entries of the gradient by magnitude, and sets the rest to zero.

    Of all D entries of the whole gradient it keeps :math:`\max(1, \mathrm{round}(\rho D))`. A layer with small entries
    may lose all of them.

    An attacker who knows the defense compares only the entries that were sent. It does not use the fact that all other
    entries are smaller: in measurements, that gave no better images and took more time.

    Args:
        share: :math:`\rho`, share of the entries to keep, above 0 and at most 1.

    Raises:
        ValueError: ``share`` is out of its range.

    References:
        Aji and Heafield, *Sparse Communication for Distributed Gradient Descent*, EMNLP 2017,
        https://arxiv.org/abs/1704.05021; as a defense: Zhu et al., *Deep Leakage from Gradients*, NeurIPS 2019,
        section 5, https://arxiv.org/abs/1906.08935.

    Example:
        >>> TopK(0.5)({"weight": torch.tensor([3.0, -4.0, 0.5]), "bias": torch.tensor([1.0])}, torch.Generator())
        {'weight': tensor([ 3., -4.,  0.]), 'bias': tensor([0.])}
    """

    def __init__(self, share: float) -> None:
        check_kept(share=share)
        self.share = share

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradients with all but the largest entries set to zero."""
        flat = torch.cat([tensor.flatten() for tensor in gradients.values()])
        kept = flat.abs().topk(max(1, round(self.share * len(flat)))).indices
        sparse = torch.zeros_like(flat).index_copy(0, kept, flat[kept])
        parts = torch.split(sparse, [tensor.numel() for tensor in gradients.values()])
        return {name: part.view_as(tensor) for (name, tensor), part in zip(gradients.items(), parts, strict=True)}

    def size(self, before: Size, gradients: Gradients) -> Size:
        """Return the size of the kept entries with their places: 32 bits each, or one bit per entry if that is less."""
        kept = max(1, round(self.share * before.numbers))
        return Size(kept, before.bits, before.more + min(32 * kept, before.numbers))
