"""The stock defenses against slow plain references, client by client."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakage.defenses import (
    DPSGD,
    Clip,
    Defense,
    GaussianNoise,
    HalfPrecision,
    LaplaceNoise,
    Quantise,
    Sign,
    Soteria,
    TopK,
)

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


@given(gradients(), SIZES, st.booleans(), st.integers(0, 2**32 - 1))
def test_laplace_noise_is_of_one_shape_in_units_of_its_size(given, std, relative, seed):
    defended = LaplaceNoise(std, relative=relative)(given, seeded(seed))
    assert_like(defended, given)
    unit = LaplaceNoise(1.0)({name: torch.zeros_like(tensor) for name, tensor in given.items()}, seeded(seed))
    scale = std * norm(given) / math.sqrt(len(entries(given))) if relative else std
    for name, tensor in given.items():
        expected = [
            v + scale * noise for v, noise in zip(entries({"": tensor}), entries({"": unit[name]}), strict=True)
        ]
        torch.testing.assert_close(defended[name].flatten(), torch.tensor(expected, dtype=tensor.dtype))


def test_laplace_noise_has_the_size_and_the_tails_of_its_distribution():
    noise = LaplaceNoise(2.0)({"weight": torch.zeros(500_000), "bias": torch.zeros(500_000)}, seeded())
    flat = torch.cat([noise["weight"], noise["bias"]]).double() / 2.0
    assert abs(flat.mean()) < 5e-3
    assert flat.std() == pytest.approx(1, rel=5e-3)
    assert (flat / flat.std()).pow(4).mean() == pytest.approx(6, rel=0.05)
    for size in (0.1, 0.5, 1.0, 3.0, 6.0):
        beyond = math.exp(-math.sqrt(2) * size)
        for side in (flat, -flat):
            share = float((side > size).double().mean())
            assert share == pytest.approx(beyond / 2, abs=5 * math.sqrt(beyond / 2 / len(flat)))
    assert abs(torch.corrcoef(torch.stack([noise["weight"], noise["bias"]]))[0, 1]) < 5e-3


@pytest.mark.parametrize("drawn", [0.0, 0.5, 1 - 2**-24])
def test_laplace_noise_is_finite_whatever_is_drawn(drawn, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, drawn))
    noise = LaplaceNoise(1.0)({"weight": torch.zeros(2)}, seeded())["weight"]
    assert bool(noise.isfinite().all())
    assert noise.sign().tolist() == [{0.0: -1, 0.5: 0}.get(drawn, 1)] * 2


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


@pytest.mark.parametrize("given", [TopK(1.0), Clip(1e9), DPSGD(0.0, 1e9)], ids=repr)
def test_at_its_least_a_defense_does_nothing(given):
    gradients = {"weight": torch.randn(5, 6, generator=seeded()), "bias": torch.randn((), generator=seeded(1))}
    for found in (given(gradients, seeded()), given.simulate(gradients, gradients)):
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            name: tensor.tolist() for name, tensor in gradients.items()
        }


@pytest.mark.parametrize(
    "defense",
    [GaussianNoise(0.1, relative=True), LaplaceNoise(0.1), Clip(1e-3), TopK(0.1), DPSGD(0.1, 1e-3)],
    ids=repr,
)
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
        (LaplaceNoise, (-0.1,), "`std` to be positive and finite, but got -0.1"),
        (LaplaceNoise, (0.1, None), "`relative` to be True or False, but got None"),
        (DPSGD, (-0.1, 1.0), "`noise_multiplier` of at least 0, but got -0.1"),
        (DPSGD, (math.inf, 1.0), "`noise_multiplier` of at least 0, but got inf"),
        (DPSGD, (1.0, 0.0), "`norm` to be positive and finite, but got 0.0"),
        (DPSGD, (True, 1.0), "`noise_multiplier` of at least 0, but got True"),
        (Soteria, (0.0,), "`share` to be above 0 and below 1, but got 0.0"),
        (Soteria, (1.0,), "`share` to be above 0 and below 1, but got 1.0"),
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
        (LaplaceNoise(0.5, True), {"name": "LaplaceNoise", "std": 0.5, "relative": True}, "std=0.5, relative=True"),
        (
            DPSGD(0.5, norm=2.0),
            {"name": "DPSGD", "noise_multiplier": 0.5, "norm": 2.0},
            "noise_multiplier=0.5, norm=2.0",
        ),
        (Soteria(), {"name": "Soteria", "share": 0.8, "layer": "classifier"}, "share=0.8, layer='classifier'"),
    ],
)
def test_descriptions(defense, description, text):
    assert defense.describe() == description
    assert repr(defense) == f"{description['name']}({text})"


@pytest.mark.parametrize(
    "defense",
    [
        GaussianNoise(0.3),
        GaussianNoise(2.0, relative=True),
        LaplaceNoise(0.3),
        LaplaceNoise(0.5, relative=True),
        DPSGD(0.1, norm=1e6),
        HalfPrecision("float16"),
        HalfPrecision("bfloat16"),
        Quantise(8),
        Quantise(12, stochastic=True),
    ],
    ids=repr,
)
def test_an_attacker_knows_how_large_errors_are(defense):
    scale = 1e3 if isinstance(defense, DPSGD) else 1.0  # whose noise is in units of the norm
    given = {
        "weight": scale * torch.randn(200, 300, generator=seeded(1)),
        "bias": 5 * scale * torch.randn(40, generator=seeded(2)),
    }
    defended = defense(given, seeded(3))
    size = norm({name: (defended[name] - tensor).double() for name, tensor in given.items()})
    shared = {name: torch.stack([tensor, 10 * tensor]) for name, tensor in defended.items()}
    told = torch.as_tensor(defense.noise_variance(shared, 1)).expand(2)
    assert float(told[0]) == pytest.approx(size**2 / len(entries(given)), rel=0.3)
    by_size = getattr(defense, "relative", not isinstance(defense, DPSGD))
    assert float(told[1] / told[0]) == pytest.approx(100.0 if by_size else 1.0, rel=1e-3)


def test_of_intervals_it_knows_little():
    shared = {"weight": torch.randn(2, 20, 30, generator=seeded(1))}
    for defense in (Sign(), Sign(scaled=True), Quantise(2), Quantise(4, stochastic=True)):
        told = defense.noise_variance(shared, 1)
        torch.testing.assert_close(told, 1e-4 * shared["weight"].double().square().mean((1, 2)))
    assert TopK(0.1).noise_variance(shared, 1) == Clip(1.0).noise_variance(shared, 1) == 0
