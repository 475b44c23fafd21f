"""Real images that represent the clusters of their class."""

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

# The most rounds of Lloyd's algorithm; after them only a few images still move, between similar clusters.
_ROUNDS = 50
# Images of a class that are clustered for each image that a step needs. With ConvNet-3 on one thread, choosing 96 of
# 384 takes 0.9 s per class, and their gradient 0.45 s; all 5,000 images of a class of CIFAR-10 are 13 times as many.
_PER_CENTRE = 4


def kmeans_images(data: LabelledImages, images_per_class: int, seed: int = 0) -> SyntheticSet:
    r"""Choose the real training images of each class that are nearest to the centres of its clusters.

    The images of a class are clustered in pixel space by k-means, with one centre :math:`\mu_j` per chosen image,

    .. math:: \min_\mu \sum_i \min_j \lVert x_i - \mu_j \rVert^2,

    initialised by k-means++. Each centre in turn takes the nearest image that no earlier one has taken. With one image
    per class this is the image nearest to the mean.

    Args:
        data: the data set; prepared (``prepare_data``, ``setup``) if necessary.
        images_per_class: number of clusters, and so of images, of each class.
        seed: seed of k-means++.

    Raises:
        ValueError: a class has fewer than ``images_per_class`` images.

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
    r"""Real images for a step of a condensation, chosen by clustering their embeddings (DREAM).

    Random images of a class may be similar, and represent its centre better than its margins. Therefore four times as
    many images of each class are drawn as are needed. Their embeddings :math:`f(x_i)`, the inputs of the last linear
    layer of the network of this step, are clustered by k-means with one centre per needed image,

    .. math:: \min_\mu \sum_i \min_j \lVert f(x_i) - \mu_j \rVert^2,

    and each centre takes the nearest image that no earlier one has taken.

    DREAM clusters all images of a class, and its code keeps a choice for ten steps. Here every step chooses anew, so
    that a resumed run does not depend on earlier steps. Clustering all images would take too long for that: on a CPU,
    5,000 images of a class take longer than a step.

    Attributes:
        data: the data set, already set up.
        layer: the layer of the embedding, see :func:`~leakage.condensation.embeddings.embedding_layer`.
        size: number of images to choose of each class.

    Raises:
        ValueError: a class has fewer than ``size`` images.

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
                f"Expected `batch_size` of at most {int(counts[label])} with real_images='kmeans', the number of "
                f"training images of class {label} ({self.data.class_names[label]}) of {self.data.name!r}, but got "
                f"{self.size}."
            )

    def choose(self, network: nn.Module, generator: torch.Generator) -> list[Tensor]:
        """Choose images ``(size, C, H, W)`` of each class, not normalised, on the network's device."""
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
    """Return the indices of the points nearest to the centres of ``count`` clusters, all of them different."""
    distances = _squared_distances(points, _centres(points, count, generator))
    taken = []
    for centre in range(count):
        taken.append(int(distances[:, centre].argmin()))
        distances[taken[-1]] = torch.inf
    return taken


def _centres(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the centres ``(count, D)`` of the clusters of points ``(M, D)``."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        # In proportion to the squared distance; if all points are equal, any will do.
        weights = _squared_distances(points, centres).amin(1).double() + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(weights, 1, generator=generator)]])
    nearest = torch.empty(0, dtype=torch.int64)
    for _ in range(_ROUNDS):
        before, nearest = nearest, _squared_distances(points, centres).argmin(1)
        if torch.equal(before, nearest):
            break
        members = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(members > 0, sums / members.clamp(min=1), centres)  # empty clusters keep their centre
    return centres


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """Return the squared distances ``(M, k)`` between points ``(M, D)`` and centres ``(k, D)``."""
    return torch.cdist(points, centres).square()
