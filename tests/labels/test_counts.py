"""Whole numbers that sum to N, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leakage.labels.counts import one_by_one, round_counts, spread_evenly

NUMBERS = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, math.nan, math.inf, -math.inf]))
ROWS = st.integers(1, 7).flatmap(
    lambda classes: st.lists(st.lists(NUMBERS, min_size=classes, max_size=classes), min_size=1, max_size=4)
)


def rounded(row: list[float], total: int) -> list[int]:
    values = [value if math.isfinite(value) and value > 0 else 0.0 for value in row]
    if not any(values):
        values = [1.0] * len(values)
    whole = sum(values)
    values = [value * (total / whole) for value in values]
    counts = [math.floor(value) for value in values]
    by_remainder = sorted(range(len(values)), key=lambda k: counts[k] - values[k])  # stable: the first of equals
    for label in by_remainder[: total - sum(counts)]:
        counts[label] += 1
    return counts


@given(rows=ROWS, total=st.integers(1, 40))
def test_rounding_is_that_of_the_largest_remainder(rows: list[list[float]], total: int) -> None:
    estimates = torch.tensor(rows, dtype=torch.float64)
    kept = estimates.clone()
    counts = round_counts(estimates, total)
    torch.testing.assert_close(estimates, kept, rtol=0, atol=0, equal_nan=True)
    assert counts.dtype == torch.int64
    assert (counts.sum(1) == total).all()
    assert (counts >= 0).all()
    for row, found in zip(rows, counts.tolist(), strict=True):
        expected = rounded(row, total)
        # Sums may differ in the last bit, and with it which of two equal remainders is the larger.
        assert sum(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 2
        clean = torch.tensor(row, dtype=torch.float64).nan_to_num(0, 0, 0).clamp(min=0)
        clean = clean if clean.any() else torch.ones_like(clean)
        exact = clean * total / clean.sum()
        assert ((exact - torch.tensor(found)).abs() <= 1 + 1e-9).all()
        costs = [(exact - torch.tensor(each)).abs().sum().item() for each in (found, expected)]
        assert costs[0] == pytest.approx(costs[1], abs=1e-9)


@pytest.mark.parametrize(
    ("estimates", "total", "expected"),
    [
        ([0.0, 0.0, 0.0], 5, [2, 2, 1]),
        ([math.nan, math.nan], 3, [2, 1]),
        ([-1.0, -2.0, 0.0], 3, [1, 1, 1]),
        ([math.inf, 1.0], 3, [0, 3]),
        ([3.0, 1.0, 0.0, 0.0], 4, [3, 1, 0, 0]),
        ([0.4, 0.3, 0.2, 0.1], 1, [1, 0, 0, 0]),
        ([1e-30, 0.0], 7, [7, 0]),
        ([1.0] * 5, 2, [1, 1, 0, 0, 0]),
        ([7.0], 1024, [1024]),
    ],
)
def test_rounding_at_the_edges(estimates: list[float], total: int, expected: list[int]) -> None:
    assert round_counts(torch.tensor([estimates]), total).tolist() == [expected]


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=100), noise=st.floats(0, 0.2))
def test_estimates_near_whole_numbers_stay(counts: list[int], noise: float) -> None:
    truth = torch.tensor([[*counts, 1]])
    signs = torch.ones_like(truth)
    signs[:, ::2] = -1
    estimates = truth + noise / truth.shape[1] * signs
    assert torch.equal(round_counts(estimates, int(truth.sum())), truth)


def spread(present: list[bool], scores: list[float], total: int) -> list[int]:
    there = [k for k, is_there in enumerate(present) if is_there] or [*range(len(present))]
    best_first = sorted(there, key=lambda k: -scores[k])
    counts = [0] * len(present)
    for image in range(total):
        counts[best_first[image % len(there)]] += 1
    return counts


@given(
    rows=st.integers(1, 6).flatmap(
        lambda classes: st.lists(
            st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=classes, max_size=classes),
            min_size=1,
            max_size=4,
        )
    ),
    total=st.integers(1, 15),
)
def test_spreading_is_one_to_each_in_turn(rows: list[list[tuple[bool, int]]], total: int) -> None:
    present = torch.tensor([[is_there for is_there, _ in row] for row in rows])
    scores = torch.tensor([[float(score) for _, score in row] for row in rows])
    counts = spread_evenly(present, scores, total)
    assert counts.dtype == torch.int64
    expected = [spread(*map(list, pair), total) for pair in zip(present.tolist(), scores.tolist(), strict=True)]
    assert counts.tolist() == expected


def greedy(push: list[float], share: list[float], counts: list[int], total: int) -> list[int]:
    push, counts = [*push], [*counts]
    while sum(counts) < total:
        lowest = min(range(len(push)), key=lambda k: push[k])
        counts[lowest] += 1
        push[lowest] += share[lowest]
    return counts


@given(seed=st.integers(0, 2**16), classes=st.integers(1, 8), total=st.integers(1, 30))
def test_one_by_one(seed: int, classes: int, total: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    push = torch.randn(5, classes, generator=generator)
    share = torch.rand(5, generator=generator)
    counts = torch.randint(total // classes + 1, (5, classes), generator=generator)
    kept = push.clone(), counts.clone()
    found = one_by_one(push, share, counts, total)
    assert torch.equal(push, kept[0])
    assert torch.equal(counts, kept[1])
    shares = share[:, None].expand(-1, classes)
    rows = zip(push.tolist(), shares.tolist(), counts.tolist(), strict=True)
    assert found.tolist() == [greedy(*row, total) for row in rows]


def test_one_by_one_with_nothing_left_to_count() -> None:
    counts = torch.tensor([[2, 1], [0, 3]])
    assert torch.equal(one_by_one(torch.zeros(2, 2), torch.ones(2), counts, 3), counts)
