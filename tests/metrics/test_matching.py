from itertools import permutations

import pytest
import torch
from torch import Tensor

from leakage.metrics import match, matching


def brute_force(reconstructed: Tensor, images: Tensor) -> Tensor:
    """The best of all permutations, tried one by one."""
    victims, count = images.shape[:2]
    best = []
    for victim in range(victims):

        def total(order: tuple[int, ...], victim: int = victim) -> float:
            return (reconstructed[victim, list(order)] - images[victim]).double().square().sum().item()

        best.append(list(min(permutations(range(count)), key=total)))
    return torch.tensor(best)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_match_finds_the_best_of_all_permutations(count: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    images = torch.rand(6, count, 2, 3, 4, generator=generator).to(dtype)
    reconstructed = torch.rand(6, count, 2, 3, 4, generator=generator).to(dtype)
    order = match(reconstructed, images)
    assert order.dtype == torch.int64
    assert torch.equal(order, brute_force(reconstructed.double(), images.double()))


def test_match_undoes_a_shuffle_victim_by_victim(generator: torch.Generator) -> None:
    images = torch.rand(20, 8, 1, 4, 4, generator=generator)
    shuffles = torch.stack([torch.randperm(8, generator=generator) for _ in range(20)])
    shuffled = images[torch.arange(20)[:, None], shuffles] + 1e-3
    order = match(shuffled, images)
    assert torch.equal(shuffles.gather(1, order), torch.arange(8).expand(20, 8))


def test_match_keeps_to_allowed_pairs_where_it_can(generator: torch.Generator) -> None:
    images = torch.rand(1, 3, 1, 4, 4, generator=generator)
    shuffled = images[:, [2, 0, 1]]
    allowed = torch.tensor([[[True, False, False], [False, True, True], [False, True, True]]])
    assert match(shuffled, images, allowed)[0, 0] == 0
    assert match(shuffled, images, ~torch.eye(3, dtype=torch.bool)[None]).tolist() == [[1, 2, 0]]
    assert match(shuffled, images, torch.zeros(1, 3, 3, dtype=torch.bool)).tolist() == [[1, 2, 0]], "none is possible"


def test_match_uses_no_reconstruction_twice_where_the_nearest_one_would() -> None:
    images = torch.tensor([0.4, 0.6]).view(1, 2, 1, 1, 1)
    reconstructed = torch.tensor([0.5, 9.0]).view(1, 2, 1, 1, 1)
    # The nearest reconstruction of both images is the first; in total (0, 1) costs least only as
    # (0.4 with 0.5, 0.6 with 9.0): the distance to 9 is shorter from 0.6.
    assert match(reconstructed, images).tolist() == [[0, 1]]


def test_match_tells_errors_apart_that_are_small_beside_the_images() -> None:
    # Both pairings have errors near 1e-8 of the images' squared norm, below the rounding of a
    # distance that is computed as |a|^2 - 2ab + |b|^2 in single precision.
    images = torch.full((1, 2, 1, 28, 28), 1.0)
    images[0, 1] -= 2e-4
    assert match(images.flip(1), images).tolist() == [[1, 0]]


def test_match_computes_nothing_for_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(matching, "linear_sum_assignment")
    monkeypatch.delattr(matching, "_costs")
    images = torch.rand(5, 1, 1, 4, 4)
    assert match(images.roll(1, 0), images).tolist() == [[0]] * 5


def test_match_of_no_victims_is_empty() -> None:
    assert match(torch.rand(0, 2, 1, 4, 4), torch.rand(0, 2, 1, 4, 4)).shape == (0, 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_match_gives_a_broken_reconstruction_what_the_others_leave_over(bad: float, generator: torch.Generator) -> None:
    images = torch.rand(1, 4, 1, 4, 4, generator=generator)
    reconstructed = images[:, [3, 2, 1, 0]].clone()
    reconstructed[0, 1, 0, 2, 2] = bad  # belonged to image 2
    assert match(reconstructed, images).tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize("size", [10.0, 1e4, 1e8, 1e15])
def test_match_lets_no_diverged_reconstruction_take_the_image_of_a_good_one(size: float) -> None:
    images = torch.tensor([0.2, 1.0, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 4, 4)
    # The first diverged from image 0.2, and is nearest to 1.0, whose own reconstruction is exact.
    reconstructed = torch.tensor([size, 1.0, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 4, 4)
    assert match(reconstructed, images).tolist() == [[0, 1, 2]]


def test_match_of_normal_noise_is_on_the_whole_error(generator: torch.Generator) -> None:
    images = torch.rand(6, 4, 1, 8, 8, generator=generator)
    noise = torch.randn(6, 4, 1, 8, 8, generator=generator)
    assert torch.equal(match(noise, images), brute_force(noise, images))


def test_match_survives_only_broken_reconstructions() -> None:
    images = torch.rand(2, 3, 1, 4, 4)
    order = match(torch.full_like(images, torch.nan), images)
    assert order.sort(1).values.tolist() == [[0, 1, 2]] * 2


def test_match_takes_images_that_require_gradients() -> None:
    images = torch.rand(1, 2, 1, 4, 4)
    assert match(images.flip(1).requires_grad_(), images).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("reconstructed", "images", "message"),
    [
        (
            (4, 2, 1, 8, 8),
            (1, 2, 1, 8, 8),
            r"Expected `reconstructed` of the same shape as `images`, \(1, 2, 1, 8, 8\), ",
        ),
        ((2, 1, 1, 8, 8), (2, 3, 1, 8, 8), r"but got \(2, 1, 1, 8, 8\)\."),
        (
            (2, 1, 8, 8),
            (2, 1, 8, 8),
            r"Expected `images` of shape \(V, N, C, H, W\), but got \(2, 1, 8, 8\)\.",
        ),
        ((2, 0, 1, 8, 8), (2, 0, 1, 8, 8), r"Expected `images` of shape \(V, N, C, H, W\), but got \(2, 0, "),
        (
            (2, 8, 8),
            (2, 1, 1, 8, 8),
            r"Expected `reconstructed` of shape \(V, N, C, H, W\), but got \(2, 8, 8\)\.",
        ),
    ],
)
def test_match_never_broadcasts(reconstructed: tuple[int, ...], images: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(torch.rand(reconstructed), torch.rand(images))


def test_match_refuses_whole_numbers() -> None:
    images = torch.randint(0, 256, (1, 2, 1, 4, 4), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"Expected `images` as floating-point numbers, but got torch\.uint8\."):
        match(images.float(), images)
