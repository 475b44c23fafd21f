"""What rules find: counts, and from estimates to whole numbers of images that sum to N."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LabelCounts:
    """The labels of V victims as a rule found them.

    Attributes:
        counts: ``(V, K)`` int64, images of each class; each row sums to N.
        scores: ``(V, K)``, the higher the more of that class; for rules that count, images before rounding.
        present: ``(V, K)`` bool, the classes that the rule holds to be there. A rule that finds the set of
            classes only spreads the N images over them in ``counts``.
        rule: the rule's name; of ``"auto"`` the one that it chose.
    """

    counts: Tensor
    scores: Tensor
    present: Tensor
    rule: str

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def labels(self) -> Tensor:
        """``(V, N)`` class indices, sorted."""
        victims, classes = self.counts.shape
        every = torch.arange(classes, device=self.counts.device).repeat(victims)
        return every.repeat_interleave(self.counts.flatten()).view(victims, -1)

    @staticmethod
    def cat(parts: list[LabelCounts]) -> LabelCounts:
        """Victims of several parts after one another, of one rule."""
        fields = ("counts", "scores", "present")
        counts, scores, present = (torch.cat([getattr(part, name) for part in parts]) for name in fields)
        return LabelCounts(counts, scores, present, parts[0].rule)


def round_counts(estimates: Tensor, num_images: int) -> Tensor:
    """Whole numbers ``(V, K)`` that sum to N and are nearest to the estimates ``(V, K)``.

    Estimates that are negative or not finite count as zero. The others are scaled so that they sum to N, and rounded by
    the method of the largest remainder. All zero means that nothing is known: N is spread evenly.

    Example:
        >>> round_counts(torch.tensor([[1.8, -0.3, 0.9, 0.5]]), 3)
        tensor([[2, 0, 1, 0]])
    """
    estimates = estimates.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
    totals = estimates.sum(1, keepdim=True)
    estimates = torch.where(totals > 0, estimates, 1.0)
    estimates = estimates * (num_images / estimates.sum(1, keepdim=True))
    whole = estimates.floor()
    left = num_images - whole.sum(1, keepdim=True)
    # ranks of the remainders: the largest get one more each
    order = (estimates - whole).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (whole + (order < left)).long()


def spread_evenly(present: Tensor, scores: Tensor, num_images: int) -> Tensor:
    """N images over the classes that are present, as evenly as possible; the rest to those of the highest scores.

    All are ``(V, K)``; no class that is present counts as all.

    Example:
        >>> spread_evenly(torch.tensor([[True, False, True]]), torch.tensor([[0.1, 0.9, 0.3]]), 3)
        tensor([[1, 0, 2]])
    """
    present = present | ~present.any(1, keepdim=True)
    classes = present.sum(1, keepdim=True)
    best_first = scores.where(present, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    share = num_images // classes + (best_first < num_images % classes)
    return torch.where(present, share, 0)


def one_by_one(push: Tensor, share: Tensor, counts: Tensor, num_images: int) -> Tensor:
    """Count one image of the class of the lowest push ``(V, K)``, add its share ``(V,)`` back, and so on up to N."""
    push, counts, share = push.clone(), counts.clone(), share[:, None].expand_as(push)
    for _ in range(num_images - int(counts.sum(1).min())):
        most = push.argmin(dim=1, keepdim=True)
        wanting = (counts.sum(1, keepdim=True) < num_images).long()
        counts.scatter_add_(1, most, wanting)
        push.scatter_add_(1, most, share.gather(1, most) * wanting)
    return counts
