import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from leakage.metrics import PSNR_LIMIT, Scores, VictimScore, score

SHAPES = [(1, 28, 28), (3, 12, 16), (3, 8, 7), (1, 5, 30), (2, 3, 3), (1, 2, 2), (1, 1, 1)]


def reference_ssim(found: np.ndarray, truth: np.ndarray) -> float:
    """SSIM of one (C, H, W) image by its definition, pixel by pixel, in double precision."""
    size = min(11, *truth.shape[1:])
    radius = (size - 1) // 2
    offsets = np.arange(-radius, radius + 1)
    line = np.exp(-(offsets**2) / (2 * (1.5 * radius / 5) ** 2)) if radius else np.ones(1)
    window = np.outer(line, line) / line.sum() ** 2
    pads = ((0, 0), (radius, radius), (radius, radius))
    x, y = np.pad(found, pads, mode="reflect"), np.pad(truth, pads, mode="reflect")
    c1, c2, values = 0.01**2, 0.03**2, []
    for channel, row, column in np.ndindex(*truth.shape):
        where = (channel, slice(row, row + 2 * radius + 1), slice(column, column + 2 * radius + 1))
        a, b = x[where], y[where]
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        values.append(luminance * (2 * covariance + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


def noisy(images: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return images + deviation * torch.randn(images.shape, generator=generator, dtype=images.dtype)


def labels_of(images: Tensor) -> Tensor:
    return torch.arange(images.shape[0] * images.shape[1]).view(images.shape[:2]) % 10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("deviation", [0.01, 0.5])
def test_scores_are_those_of_an_independent_implementation(
    shape: tuple[int, ...], deviation: float, generator: torch.Generator
) -> None:
    images = torch.rand(2, 1, *shape, generator=generator)
    found = noisy(images, deviation, generator)
    scores = score(found, labels_of(images), images, labels_of(images))
    for victim in range(2):
        a, b = found[victim, 0].double().numpy(), images[victim, 0].double().numpy()
        mse = float(np.mean((a - b) ** 2))
        assert scores.mse[victim, 0].item() == pytest.approx(mse, rel=1e-5)
        assert scores.psnr[victim, 0].item() == pytest.approx(10 * math.log10(1 / mse), abs=1e-4)
        assert scores.ssim[victim, 0].item() == pytest.approx(reference_ssim(a, b), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_in_every_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    images = torch.rand(3, 2, 1, 12, 12, generator=generator).to(dtype)
    found = noisy(images.double(), 0.1, generator).to(dtype)
    scores = score(found, labels_of(images), images, labels_of(images))
    exact = score(found.double(), labels_of(images), images.double(), labels_of(images))
    assert scores.mse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.mse.double(), exact.mse, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.psnr.double(), exact.psnr, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.ssim, exact.ssim)


def test_small_errors_survive_half_precision() -> None:
    images = torch.full((1, 1, 1, 8, 8), 0.5, dtype=torch.float16)
    scores = score(images + 2**-11, torch.zeros(1, 1).long(), images, torch.zeros(1, 1).long())
    assert scores.mse.item() == pytest.approx(2.0**-22)  # not a number of half precision's normal range


def test_scores_do_not_depend_on_the_other_victims(generator: torch.Generator) -> None:
    images = torch.rand(70, 2, 3, 16, 16, generator=generator)  # more than one chunk of SSIM
    found, labels = noisy(images, 0.2, generator), labels_of(images)
    together = score(found, labels, images, labels)
    for victim in (0, 21, 69):
        alone = score(*(tensor[victim : victim + 1] for tensor in (found, labels, images, labels)))
        for name in ("order", "mse", "psnr", "ssim", "label_correct"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[victim])


def test_psnr_is_averaged_per_image() -> None:
    images = torch.zeros(1, 2, 1, 8, 8)
    found = torch.stack([images[0, 0] + 0.01, images[0, 1] + 0.1])[None]  # 40 dB and 20 dB
    scores = score(found, labels_of(images), images, labels_of(images))
    assert scores.psnr[0].tolist() == pytest.approx([40.0, 20.0], abs=1e-3)
    assert scores.per_victim()[0].psnr == pytest.approx(30.0, abs=1e-3)


def test_images_and_labels_are_scored_in_the_same_matched_order(generator: torch.Generator) -> None:
    images = torch.rand(4, 3, 1, 8, 8, generator=generator)
    labels = torch.tensor([[1, 2, 3]]).expand(4, 3)
    shuffle = [2, 0, 1]
    scores = score(images[:, shuffle], labels[:, shuffle], images, labels)
    assert scores.order.tolist() == [[1, 2, 0]] * 4
    assert bool(scores.label_correct.all())
    assert bool((scores.mse == 0).all())
    unmoved = score(images[:, shuffle], labels, images, labels)  # labels that don't go with their images
    assert not bool(unmoved.label_correct.any())


def test_identical_images_have_the_best_scores_and_finite_ones(generator: torch.Generator) -> None:
    images = torch.rand(2, 2, 3, 16, 16, generator=generator)
    scores = score(images.clone(), labels_of(images), images, labels_of(images))
    assert scores.mse.unique().tolist() == [0.0]
    assert scores.psnr.unique().tolist() == [PSNR_LIMIT] == [150.0]
    torch.testing.assert_close(scores.ssim, torch.ones(2, 2))


def test_values_outside_the_range_are_not_clamped() -> None:
    images = torch.ones(1, 1, 1, 8, 8)
    scores = score(images + 1.0, labels_of(images), images, labels_of(images))
    assert scores.mse.item() == 1.0
    assert scores.psnr.item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_broken_reconstruction_gets_the_worst_scores_and_spoils_no_other(
    bad: float, generator: torch.Generator
) -> None:
    images = torch.rand(2, 2, 1, 12, 12, generator=generator)
    labels = labels_of(images)
    found = noisy(images, 0.01, generator)
    clean = score(found, labels, images, labels)
    found[0, 1, 0, 3, 3] = bad
    scores = score(found, labels, images, labels)
    assert (scores.mse[0, 1], scores.psnr[0, 1], scores.ssim[0, 1]) == (math.inf, -PSNR_LIMIT, -1.0)
    for name in ("mse", "psnr", "ssim"):
        torch.testing.assert_close(
            getattr(scores, name)[[0, 1, 1], [0, 0, 1]], getattr(clean, name)[[0, 1, 1], [0, 0, 1]]
        )
    assert scores.per_victim()[0].success == 0.5


def test_per_victim_gives_means_over_the_images() -> None:
    scores = Scores(
        order=torch.tensor([[0, 1], [1, 0]]),
        mse=torch.tensor([[1e-4, 1e-2], [1e-5, 1e-6]]),
        psnr=torch.tensor([[40.0, 20.0], [50.0, 60.0]]),
        ssim=torch.tensor([[1.0, 0.5], [1.0, 1.0]]),
        label_correct=torch.tensor([[True, False], [True, True]]),
    )
    assert len(scores) == 2
    first, second = scores.per_victim()
    assert (first.psnr, first.ssim, first.label_accuracy, first.success, first.final) == (
        30.0,
        0.75,
        0.5,
        0.5,
        True,
    )
    assert first.mse == pytest.approx(5.05e-3)
    assert (second.psnr, second.label_accuracy, second.success) == (55.0, 1.0, 1.0)
    assert [victim.success for victim in scores.per_victim(threshold=1e-1)] == [1.0, 1.0]
    assert [victim.success for victim in scores.per_victim(threshold=5e-6)] == [0.0, 0.5]
    assert not scores.per_victim(final=False)[0].final


def test_an_error_of_the_threshold_itself_is_no_success() -> None:
    half = torch.tensor([[0.25]])
    scores = Scores(torch.tensor([[0]]), half, half, half, torch.tensor([[True]]))
    assert scores.per_victim(threshold=0.25)[0].success == 0.0


def test_no_victims_have_no_scores() -> None:
    images, labels = torch.rand(0, 2, 1, 8, 8), torch.zeros(0, 2).long()
    scores = score(images, labels, images, labels)
    assert scores.mse.shape == scores.psnr.shape == scores.ssim.shape == (0, 2)
    assert scores.per_victim() == []


def test_the_arguments_are_left_as_they_were(generator: torch.Generator) -> None:
    images = torch.rand(2, 2, 1, 8, 8, generator=generator)
    found = torch.full_like(images, torch.nan).requires_grad_()
    before = images.clone()
    scores = score(found, labels_of(images), images, labels_of(images))
    assert torch.equal(images, before)
    assert bool(found.isnan().all())
    assert not scores.mse.requires_grad


def test_victim_scores_can_be_pickled() -> None:
    victim = VictimScore(mse=0.1, psnr=10.0, ssim=0.2, label_accuracy=1.0, success=0.0, final=False)
    assert pickle.loads(pickle.dumps(victim)) == victim


@pytest.mark.parametrize("threshold", [0.0, -1e-3, math.nan])
def test_the_threshold_must_be_positive(threshold: float) -> None:
    images = torch.rand(1, 1, 1, 8, 8)
    scores = score(images, labels_of(images), images, labels_of(images))
    with pytest.raises(ValueError, match=rf"Expected `threshold` to be positive and finite, but got {threshold}\."):
        scores.per_victim(threshold=threshold)


@pytest.mark.parametrize("victims", [4, 2])
def test_images_are_never_broadcast(victims: int) -> None:
    images = torch.rand(1, 1, 1, 8, 8)
    with pytest.raises(
        ValueError, match=rf"of the same shape as `images`, \(1, 1, 1, 8, 8\), but got \({victims}, 1, "
    ):
        score(torch.rand(victims, 1, 1, 8, 8), torch.zeros(victims, 1).long(), images, labels_of(images))


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-2.1, 2.6, r"Expected `images` with values in \[0, 1\], but got -2\.1 to 2\.6\."),
        (0.0, 255.0, r"but got 0 to 255\."),
        (0.0, math.nan, r"Expected `images` with values in \[0, 1\], but got nan to nan\."),
    ],
)
def test_private_images_must_lie_in_the_range(low: float, high: float, message: str) -> None:
    images = torch.tensor([low, high]).view(1, 1, 1, 1, 2)
    with pytest.raises(ValueError, match=message):
        score(torch.zeros_like(images), labels_of(images), images, labels_of(images))


@pytest.mark.parametrize(
    ("reconstructed", "labels", "message"),
    [
        (
            torch.zeros(2).long(),
            torch.zeros(2, 1).long(),
            r"`reconstructed_labels` of shape \(V, N\) = \(2, 1\), but got \(2,\)",
        ),
        (
            torch.zeros(2, 1).long(),
            torch.zeros(2, 10).long(),
            r"`labels` of shape \(V, N\) = \(2, 1\), but got \(2, 10\)",
        ),
        (
            torch.zeros(2, 1),
            torch.zeros(2, 1).long(),
            r"`reconstructed_labels` as whole numbers, but got torch.float32",
        ),
        (
            torch.zeros(2, 1).long(),
            torch.zeros(2, 1).bool(),
            r"Expected `labels` as whole numbers, but got torch.bool",
        ),
    ],
)
def test_labels_must_be_whole_numbers_of_one_shape(reconstructed: Tensor, labels: Tensor, message: str) -> None:
    images = torch.rand(2, 1, 1, 8, 8)
    with pytest.raises(ValueError, match=message):
        score(images, reconstructed, images, labels)
