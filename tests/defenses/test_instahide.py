"""InstaHide: what clients compute with, and the images behind many encodings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leakage import LeNet, Victim
from leakage.defenses import InstaHide, decode_instahide, known_defenses

SHAPE = (1, 8, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(count: int, seed: int = 0) -> Tensor:
    """Dark images with few details, which their neighbours tell much about."""
    grid = torch.rand(count, 1, 4, 4, generator=seeded(seed)) ** 2
    return nn.functional.interpolate(grid, scale_factor=2, mode="bilinear")


def many(hide: InstaHide, images: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    found = [hide.encode(images, torch.eye(len(images)), seeded(seed)) for seed in range(rounds)]
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


def test_without_the_signs_it_is_a_mixture():
    images = torch.rand(5, *SHAPE, generator=seeded())
    encodings, weights = many(InstaHide(private=4), images, 20)
    assert bool(((weights > 0).sum(1) == 4).all())
    assert float(weights.max()) == pytest.approx(0.65, abs=1e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(100))
    assert bool((weights[torch.arange(100), torch.arange(100) % 5] > 0).all())  # each image is in its own
    centred = torch.einsum("nm,mchw->nchw", weights, images) - 0.5
    torch.testing.assert_close((encodings - 0.5).abs(), centred.abs())
    flipped = (encodings - 0.5).sign() != centred.sign()
    assert float(flipped.float().mean()) == pytest.approx(0.5, abs=0.02)


def test_public_images_have_the_rest_of_the_weight_and_no_label():
    images, public = torch.ones(3, *SHAPE), torch.zeros(7, *SHAPE)  # so the pixels are the weight of the private ones
    encodings, labels = many(InstaHide(public, largest=0.4), images, 20)
    torch.testing.assert_close(labels.sum(1), torch.ones(60))
    assert bool(((labels > 0).sum(1) == 2).all())
    weight = (encodings - 0.5).abs().flatten(1)
    torch.testing.assert_close(weight.amin(1), weight.amax(1))
    assert float(weight.max()) <= 2 * 0.4 - 0.5 + 1e-6
    assert weight.unique().numel() > 40


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_many_encodings_give_the_images_away(noise):
    images, public = smooth(4), smooth(400, seed=1)
    encodings, weights = many(InstaHide(private=4), images, 10)
    encodings = encodings + noise * torch.randn(encodings.shape, generator=seeded())
    found = decode_instahide(encodings, weights, public, starts=10)
    assert found.shape == images.shape
    worst = float((found - images).square().flatten(1).mean(1).max())
    assert worst < (1e-8 if not noise else 1e-5)
    few = decode_instahide(encodings[:4], weights[:4], public, starts=2)
    assert float((few - images).square().mean()) > 100 * worst  # so few equations do not determine them
    again = decode_instahide(encodings, weights, public, starts=10)
    assert torch.equal(found, again)


def test_the_attacker_knows_all_but_the_public_images():
    defense = InstaHide(torch.rand(3, 1, 12, 12), mixed=3)
    victim = Victim(LeNet(image_size=12), image_shape=(1, 12, 12), num_images=2, defenses=[defense])
    shared = victim.share(torch.rand(2, 2, 1, 12, 12), torch.tensor([[0, 1], [2, 3]]))
    assert shared.protocol.defenses == ({"name": "InstaHide", "mixed": 3, "private": 2, "largest": 0.65},)
    (known,) = known_defenses(shared.protocol.defenses)
    assert isinstance(known, InstaHide)
    assert known.public is None
    known.check(victim, [known])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixed": 1}, "`mixed` to be a whole number of at least 2, but got 1"),
        ({"private": 0}, "`private` to be a whole number of at least 1, but got 0"),
        ({"private": 5}, "`private` of at most `mixed` = 4, but got 5"),
        ({"largest": 0.25}, "`largest` above 1 / `mixed` = 0.25, but got 0.25"),
        ({"largest": 1.5}, "`largest` to be above 0 and at most 1, but got 1.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        InstaHide(**arguments)


def test_clients_that_it_is_not_for():
    with pytest.raises(ValueError, match=r"clients of at least 2 images for InstaHide, .* but got 1"):
        Victim(LeNet(image_size=12), image_shape=(1, 12, 12), defenses=[InstaHide()])
    for public, got in ((None, "none"), (torch.rand(3, 1, 9, 9), r"shape \(3, 1, 9, 9\)")):
        with pytest.raises(ValueError, match=rf"`public` images \(M, 1, 8, 8\) .* mixes 2 of them .* got .*{got}"):
            InstaHide(public).encode(torch.rand(2, *SHAPE), torch.eye(2), seeded())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encodings": torch.rand(4, 8, 8)}, r"`encodings` of shape \(N, C, H, W\), but got \(4, 8, 8\)"),
        ({"weights": torch.eye(3)}, r"`weights` of shape \(N, M\) with N = 4 .* but got \(3, 3\)"),
        ({"weights": torch.ones(4, 5) / 5}, r"`weights` of shape .* M from 1 to N, but got \(4, 5\)"),
        ({"weights": torch.full((4, 2), 0.25)}, "rows of `weights` that add up to 1, .* got sums from 0.5 to 0.5"),
        ({"public": torch.rand(1, *SHAPE)}, r"`public` with at least 2 images of shape \(1, 8, 8\), .* \(1, 1, 8, 8\)"),
        ({"starts": 0}, "`starts` to be a whole number of at least 1, but got 0"),
        ({"seed": -1}, "`seed` to be a whole number of at least 0, but got -1"),
    ],
)
def test_what_can_not_be_decoded(change, message):
    given = {"encodings": torch.rand(4, *SHAPE), "weights": torch.eye(4), "public": torch.rand(5, *SHAPE)}
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        decode_instahide(**{**given, **change})
