"""Real images that stand for the clusters of their class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leakage.condensation.synthetic_set import SyntheticSet, real_set
from leakage.errors import check_count
from leakage.seeds import derive_seed

if TYPE_CHECKING:
    from leakage.datamodules.labelled import LabelledImages

# Rounds of Lloyd's algorithm at most; what moves after them are few images between clusters alike.
_ROUNDS = 50


def kmeans_images(data: LabelledImages, images_per_class: int, seed: int = 0) -> SyntheticSet:
    r"""Of each class the real training images nearest to the centres of its clusters.

    The pixels of a class are clustered by k-means, with one centre :math:`\mu_j` per image wanted,

    .. math:: \min_\mu \sum_i \min_j \lVert x_i - \mu_j \rVert^2,

    started by k-means++. Each centre, in their order, takes the nearest image that none before it has taken. With one
    image per class that is the one nearest to the mean.

    Args:
        data: made ready (``prepare_data``, ``setup``) if it is not yet.
        images_per_class: clusters of each class.
        seed: of the start.

    Raises:
        ValueError: more images than a class has.

    References:
        Arthur and Vassilvitskii, *k-means++: The Advantages of Careful Seeding*, SODA 2007. Condensation starts from
        such images in Liu et al., *DREAM: Efficient Dataset Distillation by Representative Matching*, ICCV 2023,
        https://arxiv.org/abs/2302.14416.

    Example:
        >>> from leakage.datamodules import LabelledImages
        >>> kmeans_images(LabelledImages("sample"), images_per_class=3).images_per_class.tolist()
        [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    """
    check_count(0, seed=seed)

    def choose(members: Tensor, label: int) -> Tensor:
        pixels = data.train.images[members].flatten(1).float() / 255
        generator = torch.Generator().manual_seed(derive_seed(seed, label, "k-means"))
        distances = _squared_distances(pixels, _centres(pixels, images_per_class, generator))
        taken = []
        for centre in range(images_per_class):
            taken.append(int(distances[:, centre].argmin()))
            distances[taken[-1]] = torch.inf
        return members[taken]

    return real_set(data, images_per_class, choose)


def _centres(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres ``(count, D)`` of the clusters of points ``(M, D)``."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        # In proportion to the squared distance; where all points are alike any will do.
        weights = _squared_distances(points, centres).amin(1).double() + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(weights, 1, generator=generator)]])
    nearest = torch.empty(0, dtype=torch.int64)
    for _ in range(_ROUNDS):
        before, nearest = nearest, _squared_distances(points, centres).argmin(1)
        if torch.equal(before, nearest):
            break
        members = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(members > 0, sums / members.clamp(min=1), centres)  # one that lost all stays
    return centres


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """``(M, k)`` for points ``(M, D)`` and centres ``(k, D)``."""
    return torch.cdist(points, centres).square()
