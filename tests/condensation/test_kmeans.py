"""Real images that stand for the clusters of their class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leakage.condensation import kmeans_images, random_images
from leakage.condensation.kmeans import _centres
from leakage.datamodules import LabelledImages, LabelledTensors


def of_greys(greys: list[list[int]]) -> LabelledImages:
    """A data set of plain images, a list of greys per class."""
    labels = torch.cat([torch.full((len(own),), label) for label, own in enumerate(greys)])
    pixels = torch.tensor([grey for own in greys for grey in own], dtype=torch.uint8)
    images = pixels[:, None, None, None].expand(-1, 1, 4, 4).clone()
    names = tuple(f"class {label}" for label in range(len(greys)))
    train = LabelledTensors(images, labels, names)
    return LabelledImages((train, train))


def greys_of(data: LabelledImages, images_per_class: int, **options: Any) -> list[list[int]]:
    synthetic = kmeans_images(data, images_per_class, **options)
    assert bool((synthetic.images == synthetic.images[:, :, :1, :1]).all())
    greys = (255 * synthetic.images[:, 0, 0, 0]).round().int()
    return [sorted(greys[synthetic.labels == label].tolist()) for label in range(synthetic.num_classes)]


@pytest.mark.parametrize("seed", range(5))
def test_takes_the_image_nearest_to_the_middle_of_each_cluster(seed: int) -> None:
    data = of_greys([[0, 10, 22, 240, 244, 249], [100, 110, 119]])
    assert greys_of(data, 2, seed=seed)[0] == [10, 244]
    assert greys_of(data, 1, seed=seed) == [[22], [110]], "nearest to the means, 127.5 and 109.67"


def test_images_are_different_even_where_all_are_alike() -> None:
    data = of_greys([[7] * 4, [9, 9, 9, 200]])
    assert greys_of(data, 3) == [[7, 7, 7], [9, 9, 200]]
    assert greys_of(data, 4) == [[7] * 4, [9, 9, 9, 200]]


def test_the_centres_are_those_of_a_plain_loop() -> None:
    """Each point belongs to the nearest centre, which is the mean of its points: where Lloyd's algorithm ends."""
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(1))
    centres = _centres(points, 5, torch.Generator().manual_seed(2))
    nearest = torch.stack([(points - centre).square().sum(1) for centre in centres]).argmin(0)
    means = torch.stack([points[nearest == j].mean(0) for j in range(5)])
    torch.testing.assert_close(centres, means)


def spread(data: LabelledImages, images: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the training images to the nearest chosen one of their class."""
    total = 0.0
    for label in range(data.num_classes):
        pixels = data.train.images[data.train.labels == label].flatten(1) / 255
        total += float(torch.cdist(pixels, images[labels == label].flatten(1)).square().amin(1).sum())
    return total / len(data.train)


def test_stand_for_the_class_better_than_random_images() -> None:
    data = LabelledImages("sample")
    clusters, randoms = kmeans_images(data, 5), random_images(data, 5)
    assert clusters.labels.tolist() == randoms.labels.tolist()
    assert (clusters.mean, clusters.std, clusters.dataset) == (randoms.mean, randoms.std, randoms.dataset)
    assert spread(data, clusters.images, clusters.labels) < 0.9 * spread(data, randoms.images, randoms.labels)


def test_depend_on_the_seed_alone() -> None:
    data = LabelledImages("sample")
    torch.manual_seed(1)
    first = kmeans_images(data, 5, seed=3).images
    torch.manual_seed(2)
    assert torch.equal(first, kmeans_images(data, 5, seed=3).images)
    assert not torch.equal(first, kmeans_images(data, 5, seed=4).images)


def test_names_bad_numbers() -> None:
    data = of_greys([[1, 2, 3, 4], [5, 6]])
    with pytest.raises(
        ValueError, match=r"Expected `images_per_class` of at most 2, the training images of class 1 \(class 1\).*got 3"
    ):
        kmeans_images(data, 3)
    with pytest.raises(ValueError, match="Expected `images_per_class` to be a whole number of at least 1, but got 0"):
        kmeans_images(data, 0)
    with pytest.raises(ValueError, match="Expected `seed` to be a whole number of at least 0, but got -1"):
        kmeans_images(data, 1, seed=-1)


def test_a_condensation_starts_from_them(kit: Any) -> None:
    run = kit.condense(3, initialization="kmeans", iterations=1, learning_rate=1e-30, loops=(1, 1))
    pixels = (run.synthetic_set().images * 255).round().byte()
    data = kit.data()
    data.setup()
    found = (pixels[:, None] == data.train.images[None]).flatten(2).all(2).any(1)
    assert bool(found.all())
    with pytest.raises(ValueError, match="Expected `images_per_class` of at most 5"):
        kit.condense(6, initialization="kmeans", iterations=1, loops=(1, 1))
