"""The result of a rule, and the rounding of estimates to whole numbers of images that sum to N."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LabelCounts:
    """The labels that a rule inferred for V victims.

    Attributes:
        counts: ``(V, K)`` int64, number of images of each class; each row sums to N.
        scores: ``(V, K)``; a higher score means more images of the class. For rules that count, these are the estimated
            numbers of images before rounding.
        present: ``(V, K)`` bool, whether the rule considers the class present. If a rule finds only the set of
            classes, ``counts`` spreads the N images over them.
        rule: name of the rule; for ``"auto"``, the rule that it chose.
    """

    counts: Tensor
    scores: Tensor
    present: Tensor
    rule: str

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def labels(self) -> Tensor:
        """The sorted class indices of each victim's images, ``(V, N)``."""
        victims, classes = self.counts.shape
        every = torch.arange(classes, device=self.counts.device).repeat(victims)
        return every.repeat_interleave(self.counts.flatten()).view(victims, -1)

    @staticmethod
    def cat(parts: list[LabelCounts]) -> LabelCounts:
        """Concatenate the victims of several parts that come from the same rule."""
        fields = ("counts", "scores", "present")
        counts, scores, present = (torch.cat([getattr(part, name) for part in parts]) for name in fields)
        return LabelCounts(counts, scores, present, parts[0].rule)


def round_counts(estimates: Tensor, num_images: int) -> Tensor:
    """Round estimates ``(V, K)`` to whole numbers ``(V, K)`` that sum to N.

    Estimates that are negative or not finite count as zero. The others are scaled to sum to N and rounded by
    the largest remainder method. If all estimates are zero, N is spread evenly.

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
    # Ranks of the remainders: the classes with the largest get one more image each.
    order = (estimates - whole).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (whole + (order < left)).long()


def spread_evenly(present: Tensor, scores: Tensor, num_images: int) -> Tensor:
    """Spread N images evenly over the classes that are present; the classes with the highest scores get the rest.

    All tensors are ``(V, K)``. If no class is present, the images are spread over all classes.

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
    """Count one image for the class with the lowest push ``(V, K)``, add its share ``(V,)`` back; repeat up to N."""
    push, counts, share = push.clone(), counts.clone(), share[:, None].expand_as(push)
    for _ in range(num_images - int(counts.sum(1).min())):
        most = push.argmin(dim=1, keepdim=True)
        wanting = (counts.sum(1, keepdim=True) < num_images).long()
        counts.scatter_add_(1, most, wanting)
        push.scatter_add_(1, most, share.gather(1, most) * wanting)
    return counts
