"""Guesses that look at no gradient, and whether a reconstruction tells its own image from others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leakage.metrics import baseline_guesses, below_baseline, identified, score


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_guesses_image_by_image() -> None:
    images, public = random(3, 2, 3, 4, 5), random(7, 3, 4, 5, seed=1)
    guesses = baseline_guesses(images, public)
    assert list(guesses) == ["grey", "mean_colour", "mean_image", "nearest"]
    for v in range(3):
        for n in range(2):
            image = images[v, n]
            assert torch.equal(guesses["grey"][v, n], torch.full((3, 4, 5), 0.5))
            for channel in range(3):
                colour = guesses["mean_colour"][v, n, channel]
                torch.testing.assert_close(colour, torch.full((4, 5), image[channel].mean().item()))
            torch.testing.assert_close(guesses["mean_image"][v, n], sum(public) / 7)
            errors = [float((image - other).square().mean()) for other in public]
            assert torch.equal(guesses["nearest"][v, n], public[errors.index(min(errors))])


def test_without_public_images_there_are_two_guesses_which_are_scored_as_reconstructions_are() -> None:
    images = random(2, 1, 1, 8, 8)
    guesses = baseline_guesses(images)
    assert list(guesses) == ["grey", "mean_colour"]
    labels = torch.zeros(2, 1, dtype=torch.long)
    psnr = {name: score(guess, labels, images, labels).psnr for name, guess in guesses.items()}
    expected = -10 * (images - 0.5).square().mean((2, 3, 4)).log10()
    torch.testing.assert_close(psnr["grey"], expected)
    assert bool((psnr["mean_colour"] >= psnr["grey"]).all()), "the mean has the least squared error"


def test_names_what_a_score_does_not_beat() -> None:
    baselines = {"grey": 11.7, "mean_colour": 12.7, "nearest": 16.0}
    assert below_baseline(20.0, baselines) == []
    assert below_baseline(12.7, baselines) == ["mean_colour", "nearest"]
    assert below_baseline(float("nan"), baselines) == list(baselines)


@pytest.mark.parametrize("by_features", [False, True])
def test_identified_is_nearest_of_all(by_features: bool) -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh()) if by_features else None
    images, others = random(20, 2, 3, 4, 4), random(30, 3, 4, 4, seed=1)
    reconstructed = images + 0.6 * torch.randn(images.shape)
    found = identified(reconstructed, images, others, features)
    see = features or nn.Flatten()
    with torch.no_grad():
        for v in range(20):
            for n in range(2):
                guess = see(reconstructed[v, n][None])
                own = (guess - see(images[v, n][None])).norm()
                best = min((guess - see(other[None])).norm() for other in others)
                assert bool(found[v, n]) == bool(own < best)
    assert 0 < int(found.sum()) < 40, "the case tells both apart"


def test_identified_among_images_of_its_class() -> None:
    images, others = random(20, 2, 1, 3, 3), random(30, 1, 3, 3, seed=1)
    labels, other_labels = torch.arange(40).view(20, 2) % 5, torch.arange(30) % 4  # none of class 4
    reconstructed = images + 0.6 * random(20, 2, 1, 3, 3, seed=2)
    found = identified(reconstructed, images, others, classes=(labels, other_labels))
    for label in range(5):
        rivals = others[other_labels == label] if label < 4 else others
        here = labels == label
        alone = identified(reconstructed[here][:, None], images[here][:, None], rivals)[:, 0]
        assert torch.equal(found[here], alone)
    assert found.sum() > identified(reconstructed, images, others).sum(), "fewer rivals make it easier"
    with pytest.raises(ValueError, match=r"Expected `classes` of shapes \[\(20, 2\), \(30,\)\], .* \(29,\)"):
        identified(reconstructed, images, others, classes=(labels, other_labels[1:]))


def test_a_guess_that_knows_nothing_identifies_nobody_by_a_tie_or_by_chance() -> None:
    images = random(5, 1, 1, 4, 4)
    assert not bool(identified(random(5, 1, 1, 4, 4, seed=2), images, images.flatten(0, 1)).any())
    # What is no number is no reconstruction, with features too.
    broken = images.clone()
    broken[0, 0, 0, 0, 0] = float("nan")
    for features in (None, nn.Flatten()):
        found = identified(broken, images, random(9, 1, 4, 4, seed=3), features)
        assert found.flatten().tolist() == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            torch.rand(5, 3, 4, 5),
            r"of shape \(M, C, H, W\) = \(M, 3, 4, 4\) with at least one image, but got \(5, 3, 4",
        ),
        (torch.rand(0, 3, 4, 4), r"with at least one image, but got \(0, 3, 4, 4\)"),
        (torch.zeros(5, 3, 4, 4, dtype=torch.uint8), r"as floating-point numbers in \[0, 1\], but got torch.uint8"),
    ],
)
def test_refuses_others_that_do_not_fit(others: Tensor, message: str) -> None:
    images = random(2, 1, 3, 4, 4)
    with pytest.raises(ValueError, match=f"Expected `public` .*{message}"):
        baseline_guesses(images, others)
    with pytest.raises(ValueError, match=f"Expected `others` .*{message}"):
        identified(images, images, others)
    with pytest.raises(ValueError, match="Expected `reconstructed` of the same shape as `images`"):
        identified(random(2, 2, 3, 4, 4), images, random(5, 3, 4, 4))
