import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leakage.datamodules.draws import draw_victims

DISTRIBUTIONS = ["uniform", "single-class", "dirichlet:0.1", "dirichlet:100"]
LABELS = torch.arange(1000).flip(0) % 10


def frequencies(labels: Tensor, num_classes: int) -> Tensor:
    """Share of each class for each victim, ``(V, K)``."""
    return torch.stack([torch.bincount(row, minlength=num_classes) for row in labels]) / labels.shape[1]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_images", [1, 8, 100])
def test_every_victim_holds_so_many_different_images(distribution: str, num_images: int) -> None:
    drawn = draw_victims(LABELS, victims=20, num_images=num_images, distribution=distribution)
    assert drawn.shape == (20, num_images)
    assert drawn.dtype == torch.int64
    assert 0 <= drawn.min() <= drawn.max() < 1000
    assert all(len(row.unique()) == num_images for row in drawn)
    assert len({tuple(row) for row in drawn.tolist()}) > 15


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_victims_images_depend_on_seed_and_number_alone(distribution: str) -> None:
    def draw(victims: int, seed: int) -> Tensor:
        return draw_victims(LABELS, victims=victims, num_images=8, distribution=distribution, seed=seed)

    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    drawn = draw(12, 5)
    assert torch.equal(drawn, draw(12, 5))
    assert torch.equal(drawn[:7], draw(7, 5))
    assert draw(0, 5).shape == (0, 8)
    assert not (drawn == draw(12, 6)).all(1).any()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before[1:]  # noqa: NPY002


def test_uniform_draws_have_the_data_sets_frequencies() -> None:
    labels = torch.tensor([0] * 700 + [1] * 200 + [5] * 100)
    drawn = draw_victims(labels, victims=500, num_images=8)
    found = frequencies(labels[drawn], 6).mean(0)
    # Three standard errors of 4,000 images are .022 at most.
    torch.testing.assert_close(found, torch.tensor([0.7, 0.2, 0, 0, 0, 0.1]), atol=0.022, rtol=0)
    # Every image comes about as often, at every place.
    torch.testing.assert_close(drawn.double().mean(0), torch.full((8,), 499.5).double(), atol=40, rtol=0)


def test_a_single_class_is_any_that_has_enough_images() -> None:
    labels = torch.tensor([3] * 50 + [4] * 7 + [7] * 8 + [9] * 20)
    of_victim = labels[draw_victims(labels, victims=300, num_images=8, distribution="single-class")]
    assert bool((of_victim == of_victim[:, :1]).all())
    counts = torch.bincount(of_victim[:, 0], minlength=10)
    assert counts.nonzero().flatten().tolist() == [3, 7, 9]  # 4 has one too few
    assert counts.max() < 130  # each class alike, not each image
    assert counts[counts > 0].min() > 70


def test_distinct_images_are_of_as_many_classes_each_as_likely() -> None:
    labels = torch.tensor([3] * 50 + [4] * 7 + [7] * 8 + [9] * 20)
    drawn = draw_victims(labels, victims=600, num_images=2, distribution="distinct", seed=1)
    of_victim = labels[drawn]
    assert bool((of_victim[:, 0] != of_victim[:, 1]).all())
    counts = torch.bincount(of_victim.flatten(), minlength=10)[[3, 4, 7, 9]]
    assert counts.min() > 250, "each class alike, not each image"
    assert len(drawn[of_victim == 3].unique()) > 45
    assert torch.equal(draw_victims(labels, victims=7, num_images=2, distribution="distinct", seed=1), drawn[:7])
    assert draw_victims(labels, victims=3, num_images=4, distribution="distinct").shape == (3, 4)
    with pytest.raises(ValueError, match=r"Expected at most 4 images for each victim, the number of classes,.* got 5"):
        draw_victims(labels, victims=3, num_images=5, distribution="distinct")


@pytest.mark.parametrize("concentration", [0.1, 1.0, 100.0])
def test_proportions_spread_as_those_of_a_dirichlet(concentration: float) -> None:
    labels = torch.arange(6000) % 5
    drawn = draw_victims(labels, victims=600, num_images=100, distribution=f"dirichlet:{concentration}")
    shares = frequencies(labels[drawn], 5).double()
    torch.testing.assert_close(shares.mean(0), torch.full((5,), 0.2).double(), atol=0.06, rtol=0)
    # The Dirichlet's variance, and the multinomial's on top of it.
    variance = 0.2 * 0.8 / (5 * concentration + 1)
    variance += (0.2 * 0.8 - variance) / 100
    assert shares.var(0).mean().item() == pytest.approx(variance, rel=0.15)


def test_a_small_concentration_gives_few_classes_in_mixed_order() -> None:
    def mean_classes(distribution: str) -> float:
        of_victim = LABELS[draw_victims(LABELS, victims=200, num_images=24, distribution=distribution)]
        return sum(len(row.unique()) for row in of_victim) / 200

    assert mean_classes("dirichlet:0.01") < 1.6 < mean_classes("dirichlet:0.1") < 4 < 8 < mean_classes("dirichlet:100")
    of_victim = LABELS[draw_victims(LABELS, victims=50, num_images=24, distribution="dirichlet:1")]
    # Local steps take images in this order: classes must not come one after the other.
    assert sum(bool((row.diff() >= 0).all()) for row in of_victim) == 0


def test_what_a_small_class_lacks_comes_from_the_others_in_proportion() -> None:
    labels = torch.tensor([0] * 2 + [1] * 500 + [2] * 500)
    of_victim = labels[draw_victims(labels, victims=300, num_images=40, distribution="dirichlet:1000")]
    shares = frequencies(of_victim, 3) * 40
    assert shares[:, 0].unique().tolist() == [2.0]  # some 13 were asked for
    torch.testing.assert_close(shares.mean(0), torch.tensor([2.0, 19.0, 19.0]), atol=0.6, rtol=0)


@pytest.mark.parametrize("concentration", ["1e-300", "1e-5", "0.1", "1e100"])
def test_all_images_can_be_drawn(concentration: str) -> None:
    labels = torch.tensor([0] * 3 + [1] + [2] * 4 + [7])
    drawn = draw_victims(labels, victims=20, num_images=9, distribution=f"dirichlet:{concentration}")
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(9).expand(20, 9))
    assert len({tuple(row) for row in drawn.tolist()}) > 10


def test_a_tiny_concentration_still_takes_every_class_alike() -> None:
    labels = torch.arange(40) % 4
    of_victim = labels[draw_victims(labels, victims=400, num_images=15, distribution="dirichlet:1e-9")]
    shares = frequencies(of_victim, 4)
    assert sorted(set((shares * 15).round().int().flatten().tolist())) == [0, 5, 10]  # one class, then another
    torch.testing.assert_close(shares.mean(0), torch.full((4,), 0.25), atol=0.06, rtol=0)


def draw(**changes: Any) -> Tensor:
    settings: dict[str, Any] = {"labels": LABELS, "victims": 2, "num_images": 4} | changes
    return draw_victims(settings.pop("labels"), **settings)


@pytest.mark.parametrize("distribution", ["normal", "dirichlet", "Uniform", "", None, 0.1])
def test_an_unknown_distribution_is_refused_with_the_choices(distribution: Any) -> None:
    choices = r"\['dirichlet:A', 'distinct', 'single-class', 'uniform'\]"
    with pytest.raises(ValueError, match=rf"Expected `distribution` to be one of {choices}, but got {distribution!r}"):
        draw(distribution=distribution)


@pytest.mark.parametrize("number", ["A", "", "0", "-1", "nan", "inf", "1e101", "0.1:0.2"])
def test_the_concentration_must_be_a_positive_number(number: str) -> None:
    with pytest.raises(ValueError, match=rf"'dirichlet:A' with a positive number A .*, but got 'dirichlet:{number}'\."):
        draw(distribution=f"dirichlet:{number}")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_there_must_be_enough_images(distribution: str) -> None:
    with pytest.raises(ValueError, match=r"at most 1000 images for each victim, the size of the data set, .* 1001\."):
        draw(num_images=1001, distribution=distribution)


def test_one_class_must_have_enough_images() -> None:
    assert draw(num_images=100, distribution="single-class").shape == (2, 100)
    with pytest.raises(
        ValueError, match=r"at most 100 images for each victim, the size of the largest class, .*, but got 101\."
    ):
        draw(num_images=101, distribution="single-class")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.empty(0).long()}, r"Expected `labels` of shape \(M,\) with M at least 1, but got \(0,\)\."),
        ({"labels": torch.zeros(2, 3).long()}, r"Expected `labels` of shape \(M,\) .*, but got \(2, 3\)\."),
        ({"labels": torch.zeros(9)}, r"Expected `labels` as whole numbers, but got torch\.float32\."),
        ({"labels": torch.zeros(9).bool()}, r"Expected `labels` as whole numbers, but got torch\.bool\."),
        ({"victims": -1}, r"Expected `victims` to be a whole number of at least 0, but got -1\."),
        ({"num_images": 0}, r"Expected `num_images` to be a whole number of at least 1, but got 0\."),
        ({"seed": -1}, r"Expected `seed` to be a whole number of at least 0, but got -1\."),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**changes)
