"""Real images that stand for the clusters of their class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.condensation import kmeans_images, random_images
from leakage.condensation.kmeans import Clusters, _centres
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
        ValueError, match=r"Expected `images_per_class` of at most 2, the number .* of class 1 \(class 1\).*got 3"
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


def test_clusters_are_of_what_the_network_makes_of_the_images(kit: Any) -> None:
    """An image of each group that the network sees, be they of one colour."""
    images = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    images[:10] = torch.arange(100, 110, dtype=torch.uint8)[:, None, None, None]
    images[10:, :, :, :4] = 200  # a group of its own: few among many
    train = LabelledTensors(images.repeat(2, 1, 1, 1), torch.arange(2).repeat_interleave(12), ("a", "b"))
    data = LabelledImages((train, train))
    data.setup()
    network = kit.network(num_classes=2).eval()
    for seed in range(5):
        for own in Clusters(data, "classifier", 3).choose(network, torch.Generator().manual_seed(seed)):
            assert own.shape == (3, 1, 8, 8)
            assert len({image.numpy().tobytes() for image in own}) == 3
            assert (own == 200).flatten(1).any(1).any(), "the few are there"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_centre_takes_the_nearest_of_the_images_drawn(kit: Any, size: int) -> None:
    data, network = kit.data(), kit.network().double().eval()
    data.setup()
    found = Clusters(data, "classifier", size).choose(network, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    for label, own in enumerate(found):
        images = data.train.images[data.train.labels == label]
        drawn = images[torch.randperm(len(images), generator=generator)[: 4 * size]]
        with torch.no_grad():
            points = torch.stack([network.features(data.normalise(image).double()[None]).flatten() for image in drawn])
        left = list(range(len(drawn)))
        for centre, image in zip(_centres(points, size, generator), own, strict=True):
            (taken,) = (i for i in left if torch.equal(drawn[i], image))
            distances = {i: float((points[i] - centre).norm()) for i in left}
            # Two images in a cluster are equally near to its centre.
            assert distances[taken] == pytest.approx(min(distances.values()), abs=1e-9)
            left.remove(taken)


def test_clusters_hold_images_of_the_class_and_each_once(kit: Any) -> None:
    data, network = kit.data(), kit.network().eval()
    data.setup()
    first, again, other = (
        Clusters(data, "classifier", 5).choose(network, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    for label, own in enumerate(first):
        members = data.train.images[data.train.labels == label]
        assert (own[:, None] == members[None]).flatten(2).all(2).any(0).sum() == 5
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_a_pool_chooses_real_images_once_for_each_state(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, calls = Clusters.choose, []

    def noted(self: Clusters, *arguments: Any) -> Any:
        calls.append(arguments)
        return choose(self, *arguments)

    monkeypatch.setattr(Clusters, "choose", noted)
    run = kit.condense(pool=2, iterations=20, real_images="kmeans", data_batch_size=2)
    assert len(calls) == 2 * 4
    assert run.real_images_seen == 2 * 4 * 3 * 2
    random = kit.condense(pool=2, iterations=20, data_batch_size=2)
    assert len(calls) == 2 * 4
    assert not torch.equal(kit.images(run), kit.images(random))


def test_clusters_refuse_what_they_cannot_choose_from(kit: Any) -> None:
    message = (
        r"Expected `batch_size` of at most 5 with real_images='kmeans', the number of training images of class "
        r"1 \(middle\) of 'stripes', but got 6"
    )
    with pytest.raises(ValueError, match=message):
        kit.condense(real_images="kmeans", iterations=1)
    with pytest.raises(ValueError, match=r"of at most 5 with real_images='kmeans'.*but got 256"):
        kit.condense(real_images="kmeans", iterations=1, data=kit.data())
    assert kit.condense(real_images="kmeans", iterations=1, data_batch_size=5).real_images_seen == 15
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"logits are the output of an nn\.Linear layer.*but got Sequential"):
        kit.condense(real_images="kmeans", iterations=1, data_batch_size=5, network=network)
