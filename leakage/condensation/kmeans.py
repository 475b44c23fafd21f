"""Real images that stand for the clusters of their class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leakage.condensation.embeddings import embed_real
from leakage.condensation.synthetic_set import SyntheticSet, real_set
from leakage.errors import check_count
from leakage.seeds import derive_seed

if TYPE_CHECKING:
    from leakage.datamodules.labelled import LabelledImages

# Rounds of Lloyd's algorithm at most; what moves after them are few images between clusters alike.
_ROUNDS = 50
# Images of a class that are clustered for each one that a step wants. With ConvNet-3 on one thread choosing 96 of 384
# takes 0.9 s for a class, and their gradient then 0.45 s; all 5,000 of CIFAR-10 are 13 times as many.
_PER_CENTRE = 4


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
        return members[_nearest(pixels, images_per_class, generator)]

    return real_set(data, images_per_class, choose)


@dataclass(frozen=True)
class Clusters:
    r"""Real images for a step of a condensation, chosen by what the network of the step makes of them (DREAM).

    Random images of a class may be alike, and say more of its middle than of its rim. So of each class some images are
    drawn, four for each one wanted. Their embeddings :math:`f(x_i)`, the inputs of the network's last linear layer, are
    clustered by k-means with one centre per image wanted,

    .. math:: \min_\mu \sum_i \min_j \lVert f(x_i) - \mu_j \rVert^2,

    and each centre takes the nearest image that none before it has taken.

    DREAM clusters all images of a class, and its code keeps a choice for ten steps. Here all steps choose anew, so that
    one that is resumed needs to know of none before; which is why not all images are clustered: on a CPU 5,000 images
    of a class take longer than a step.

    Attributes:
        data: made ready.
        layer: see :func:`~leakage.condensation.embeddings.embedding_layer`.
        size: images of each class.

    Raises:
        ValueError: a class with fewer images than ``size``.

    References:
        Liu et al., *DREAM: Efficient Dataset Distillation by Representative Matching*, ICCV 2023,
        https://arxiv.org/abs/2302.14416.
    """

    data: LabelledImages
    layer: str
    size: int

    def __post_init__(self) -> None:
        counts = torch.bincount(self.data.train.labels, minlength=self.data.num_classes)
        label = int(counts.argmin())
        if self.size > counts[label]:
            raise ValueError(
                f"Expected `batch_size` of at most {int(counts[label])} with real_images='kmeans', the training images "
                f"of class {label} ({self.data.class_names[label]}) of {self.data.name!r}, but got {self.size}."
            )

    def choose(self, network: nn.Module, generator: torch.Generator) -> list[Tensor]:
        """Of each class ``(size, C, H, W)`` as the data set has them, on the network's device."""
        train, like = self.data.train, next(network.parameters())
        chosen = []
        for label in range(self.data.num_classes):
            members = (train.labels == label).nonzero().flatten()
            drawn = torch.randperm(len(members), generator=generator)[: self.size * _PER_CENTRE]
            images = train.images[members[drawn]].to(like.device)
            points = embed_real(network, self.layer, images, lambda some: self.data.normalise(some).to(like.dtype))
            chosen.append(images[_nearest(points.cpu(), self.size, generator)])
        return chosen


def _nearest(points: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Which points are nearest to the centres of ``count`` clusters, all of them different."""
    distances = _squared_distances(points, _centres(points, count, generator))
    taken = []
    for centre in range(count):
        taken.append(int(distances[:, centre].argmin()))
        distances[taken[-1]] = torch.inf
    return taken


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
