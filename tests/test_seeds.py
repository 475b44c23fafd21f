from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

from leakage.seeds import derive_seed, hashed_normal


def test_derive_seed():
    seeds = [
        derive_seed(seed, victim, stream) for seed in (0, 1) for victim in range(50) for stream in ("weights", "start")
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 0, "weights") == 9090995700323409191, "every published figure would change"


def mixed(number: int) -> int:
    """SplitMix64's mixing, on whole numbers without a sign."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def test_hashed_normal_follows_its_formula():
    seeds, steps = [0, 12, 2**63 - 1], [1, 0, 20_000]
    found = hashed_normal(torch.tensor(seeds), torch.tensor(steps), 5)
    for row, (seed, step) in enumerate(zip(seeds, steps, strict=True)):
        inner = mixed((seed + 0x9E3779B97F4A7C15 * step) % 2**64)
        for place in range(5):
            upper, lower = divmod(mixed((inner + 0x9E3779B97F4A7C15 * place) % 2**64), 2**32)
            expected = math.sqrt(-2 * math.log((upper + 0.5) / 2**32)) * math.cos(2 * math.pi * lower / 2**32)
            assert float(found[row, place]) == pytest.approx(expected, abs=1e-12)


def test_hashed_normal_is_normal_and_independent():
    """Along a row, from step to step and from seed to neighbouring seed."""
    seeds, steps = torch.arange(40).repeat_interleave(50), torch.arange(50).repeat(40)
    numbers = hashed_normal(seeds, steps, 200)
    assert kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-3
    shaped = numbers.view(40, 50, 200)
    for dim in range(3):
        one, other = shaped.narrow(dim, 0, shaped.shape[dim] - 1), shaped.narrow(dim, 1, shaped.shape[dim] - 1)
        assert abs(float((one * other).mean())) < 4 / one.numel() ** 0.5
        assert abs(float((one.square() * other.square()).mean()) - 1) < 4 * 8**0.5 / one.numel() ** 0.5


def test_hashed_normal_of_a_row_is_its_own():
    seeds, steps = torch.tensor([3, 4, 5]), torch.tensor([7, 7, 8])
    together = hashed_normal(seeds, steps, 9)
    for row in range(3):
        assert torch.equal(hashed_normal(seeds[row : row + 1], steps[row : row + 1], 9)[0], together[row])
