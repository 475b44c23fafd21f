"""The gradient of a last layer in fewer numbers: against the whole gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from leakage import LeNet, SharedGradient, Victim
from leakage.clients import low_rank
from leakage.clients.low_rank import coordinates, has_low_rank, in_basis, is_of_low_rank, row_space
from leakage.defenses import GaussianNoise

WEIGHT = "classifier.weight"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_LARGE", 1000)


def share(images: int = 1, dtype: torch.dtype = torch.float64, **options: object) -> tuple[SharedGradient, Victim]:
    victim = Victim(LeNet(1, 8, 40).to(dtype), image_shape=(1, 8, 8), num_images=images, **options)
    pixels = draw(3, images, 1, 8, 8).sigmoid().to(dtype)
    labels = torch.randint(40, (3, images), generator=torch.Generator().manual_seed(0))
    return victim.share(pixels, labels), victim


@pytest.mark.parametrize("scale", [1.0, 1e-180, 0.0])
@pytest.mark.parametrize("images", [1, 5])
def test_holds_the_whole_gradient(images: int, scale: float) -> None:
    shared, victim = share(images)
    shared.gradients[WEIGHT] *= scale
    reduced = in_basis(shared, victim)
    assert reduced.basis is not None
    assert reduced.gradients[WEIGHT].shape == (3, images, shared.gradients[WEIGHT].shape[2])
    size = shared.gradients[WEIGHT].abs().max()
    found = reduced.basis @ reduced.gradients[WEIGHT]
    torch.testing.assert_close(found, shared.gradients[WEIGHT], rtol=0, atol=1e-14 * float(size))
    torch.testing.assert_close(reduced.basis.mT @ reduced.basis, torch.eye(images).double().expand(3, -1, -1))
    others = [name for name in shared.gradients if name != WEIGHT]
    assert all(reduced.gradients[name] is shared.gradients[name] for name in others)
    columns = reduced.state[WEIGHT]
    assert columns.is_contiguous()
    assert torch.equal(columns.mT, shared.state[WEIGHT])
    victim.check(reduced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("images", [1, 5])
def test_is_told_from_other_gradients(images: int, dtype: torch.dtype) -> None:
    shared, victim = share(images, dtype)
    assert has_low_rank(victim)
    assert is_of_low_rank(shared, victim)
    noise = draw(*shared.gradients[WEIGHT].shape[1:]).to(dtype)
    shared.gradients[WEIGHT][1] += 1e-4 * shared.gradients[WEIGHT][1].norm() * noise / noise.norm()
    assert not is_of_low_rank(shared, victim)


def test_needs_many_classes_few_images_and_one_step_that_is_left_alone() -> None:
    def has(model: nn.Module, **options: object) -> bool:
        return has_low_rank(Victim(model, image_shape=(1, 8, 8), **options))

    assert has(LeNet(1, 8, 40), num_images=10)
    assert not has(LeNet(1, 8, 40), num_images=11)
    assert not has(LeNet(1, 8, 5))
    assert not has(LeNet(1, 8, 40), local_steps=2, learning_rate=0.1)
    assert not has(LeNet(1, 8, 40), defenses=[GaussianNoise(1e-4)])
    assert not has(nn.Sequential(LeNet(1, 8, 40), nn.Softplus())), "no linear layer gives the logits"
    frozen = LeNet(1, 8, 40)
    frozen.classifier.weight.requires_grad_(False)
    assert not has(frozen)
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    assert has(tied)
    tied[3].weight = tied[1].weight
    assert not has(tied)


@pytest.mark.parametrize("images", [1, 4])
def test_coordinates_keep_all_lengths_and_products(images: int) -> None:
    basis = torch.linalg.qr(draw(30, images))[0]
    one, two = (
        (draw(images, 30, seed=seed), draw(images, 20, seed=seed + 1), *coordinates(*both, basis))
        for seed, both in ((seed, (draw(images, 30, seed=seed), draw(images, 20, seed=seed + 1))) for seed in (1, 3))
    )
    for delta, features, inside, outside in (one, two):
        whole = delta.mT @ features
        torch.testing.assert_close(inside.square().sum() + outside.square().sum(), whole.square().sum())
        # With what lies in the basis.
        torch.testing.assert_close((inside * draw(images, 20)).sum(), (whole * (basis @ draw(images, 20))).sum())


def test_coordinates_of_the_same_images_twice_and_of_no_features_can_be_differentiated() -> None:
    basis, delta = torch.linalg.qr(draw(30, 2))[0], draw(2, 30)

    def length(features: Tensor) -> Tensor:
        inside, outside = coordinates(delta, features, basis)
        return inside.square().sum() + outside.square().sum()

    for features in (draw(1, 20).expand(2, 20).clone(), torch.zeros(2, 20).double()):
        expected = grad(lambda features: (delta.mT @ features).square().sum())(features)
        torch.testing.assert_close(grad(length)(features), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_row_space_of_a_large_matrix_is_that_of_its_singular_vectors(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = draw(2, 60, rank) @ draw(2, rank, 40, seed=1)
    noisy = rows + 1e-7 * draw(2, 60, 40, seed=2)  # as rounding in single precision leaves it
    strengths, basis = row_space(noisy, rank)
    assert (strengths.shape, basis.shape) == ((2, rank), (2, rank, 40))
    monkeypatch.setattr(low_rank, "_LARGE", 10_000)
    found, space = row_space(noisy, rank)
    assert not torch.equal(found, strengths), "in another way"
    torch.testing.assert_close(strengths, found, rtol=1e-12, atol=0)
    torch.testing.assert_close(basis.mT @ basis, space.mT @ space, rtol=0, atol=1e-12)
