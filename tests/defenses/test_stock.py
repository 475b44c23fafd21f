"""The stock defenses against slow plain references, client by client."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakage.defenses import Clip, Defense, GaussianNoise, TopK

SIZES = st.floats(1e-3, 1e3)


@st.composite
def gradients(draw: st.DrawFn) -> dict[str, Tensor]:
    """A few tensors of one client, some without dimensions, of any size; no two entries are of one magnitude."""
    shapes = draw(st.lists(st.sampled_from([(), (3,), (2, 3), (4, 1, 2, 2)]), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-30, 15))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return {
        f"{index}.weight": (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for index, shape in enumerate(shapes)
    }


def entries(tensors: dict[str, Tensor]) -> list[float]:
    """All entries as Python's numbers."""
    return [value for tensor in tensors.values() for value in tensor.flatten().tolist()]


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(math.fsum(value * value for value in entries(tensors)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_like(defended: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in part.items()} for part in (defended, given)]
    assert shapes[0] == shapes[1]


@given(gradients(), SIZES, st.booleans(), st.integers(0, 2**32 - 1))
def test_gaussian_noise(given, std, relative, seed):
    defended = GaussianNoise(std, relative=relative)(given, seeded(seed))
    assert_like(defended, given)
    scale = std * norm(given) / math.sqrt(len(entries(given))) if relative else std
    generator = seeded(seed)
    for name, tensor in given.items():
        drawn = torch.randn(tensor.shape, generator=generator)
        expected = torch.tensor(
            [
                value + scale * noise
                for value, noise in zip(tensor.flatten().tolist(), drawn.flatten().tolist(), strict=True)
            ],
            dtype=tensor.dtype,
        )
        torch.testing.assert_close(defended[name].flatten(), expected)


def test_gaussian_noise_is_of_its_size():
    flat = {"weight": torch.full((200, 100), 3.0), "bias": torch.full((10_000,), -3.0)}
    for defense, size in ((GaussianNoise(0.5), 0.5), (GaussianNoise(0.5, relative=True), 1.5)):
        noise = torch.tensor(entries(defense(flat, seeded()))) - torch.tensor(entries(flat))
        assert abs(noise.mean()) < 0.02 * size
        assert noise.std() == pytest.approx(size, rel=0.02)


@given(gradients(), SIZES)
def test_clip(given, largest):
    defended = Clip(largest)(given, seeded())
    assert_like(defended, given)
    before, after = norm(given), norm(defended)
    assert after <= min(before, largest) * (1 + 1e-6)
    if before <= largest:
        assert entries(defended) == entries(given)
    else:
        assert after == pytest.approx(largest, rel=1e-6)
        for name, tensor in given.items():
            torch.testing.assert_close(defended[name], (tensor.double() * (largest / before)).to(tensor.dtype))


def test_clip_of_nothing():
    assert entries(Clip(0.1)({"weight": torch.zeros(3)}, seeded())) == [0, 0, 0]


@given(gradients(), st.floats(1e-6, 1))
def test_top_k(given, share):
    defended = TopK(share)(given, seeded())
    assert_like(defended, given)
    before, after = entries(given), entries(defended)
    kept = max(1, round(share * len(before)))
    smallest = sorted(map(abs, before))[-kept]
    assert after == [value if abs(value) >= smallest else 0 for value in before]
    assert sum(value != 0 for value in after) == kept


def test_top_k_keeps_exactly_its_share_of_equal_entries():
    assert sum(entries(TopK(0.25)({"weight": torch.ones(4, 10), "bias": torch.ones(20)}, seeded()))) == 15


@pytest.mark.parametrize("defense", [GaussianNoise(0.1, relative=True), Clip(1e-3), TopK(0.1)], ids=repr)
def test_gradients_are_not_changed_in_place(defense: Defense):
    given = {"weight": torch.randn(5, 6, generator=seeded())}
    before = given["weight"].clone()
    assert not torch.equal(defense(given, seeded())["weight"], before)
    assert torch.equal(given["weight"], before)


@pytest.mark.parametrize(
    ("defense", "arguments", "message"),
    [
        (GaussianNoise, (0.0,), "`std` to be positive and finite, but got 0.0"),
        (GaussianNoise, (math.inf,), "`std` to be positive and finite, but got inf"),
        (GaussianNoise, (0.1, 1), "`relative` to be True or False, but got 1"),
        (Clip, (-1.0,), "`norm` to be positive and finite, but got -1.0"),
        (Clip, (math.nan,), "`norm` to be positive and finite, but got nan"),
        (Clip, ("1",), "`norm` to be positive and finite, but got '1'"),
        (TopK, (0,), "`share` to be positive and finite, but got 0"),
        (TopK, (1.1,), "`share` to be above 0 and at most 1, but got 1.1"),
    ],
)
def test_wrong_arguments(defense, arguments, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        defense(*arguments)


@pytest.mark.parametrize(
    ("defense", "description", "text"),
    [
        (GaussianNoise(1e-4), {"name": "GaussianNoise", "std": 1e-4, "relative": False}, "std=0.0001, relative=False"),
        (Clip(2.0), {"name": "Clip", "norm": 2.0}, "norm=2.0"),
        (TopK(0.1), {"name": "TopK", "share": 0.1}, "share=0.1"),
    ],
)
def test_descriptions(defense, description, text):
    assert defense.describe() == description
    assert repr(defense) == f"{description['name']}({text})"
