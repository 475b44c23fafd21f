"""Defenses that send fewer numbers, or smaller ones, against slow plain references, client by client."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakage.defenses import Defense, HalfPrecision, Quantise, RandomPruning, Sign
from tests.defenses.test_stock import assert_like, entries, gradients, seeded

BITS = st.sampled_from([1, 2, 3, 8, 16])


def values(largest: float, bits: int) -> Tensor:
    """All that there is to send."""
    if bits == 1:
        return torch.tensor([-largest, largest], dtype=torch.float64)
    steps = 2 ** (bits - 1) - 1
    return torch.arange(-steps, steps + 1, dtype=torch.float64) * (largest / steps)


def rounding(tensor: Tensor) -> float:
    return 4 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())


@given(gradients(), BITS)
def test_quantise_takes_the_nearest_value(given, bits):
    defended = Quantise(bits)(given, seeded())
    assert_like(defended, given)
    for name, tensor in given.items():
        allowed = values(float(tensor.abs().max()), bits)
        expected = [float(allowed[(allowed - value).abs().argmin()]) for value in entries({"": tensor})]
        found = defended[name].flatten()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=rounding(tensor))


@given(gradients(), BITS, st.integers(0, 2**32 - 1))
def test_quantise_by_chance_takes_one_of_the_two_values_around(given, bits, seed):
    defended = Quantise(bits, stochastic=True)(given, seeded(seed))
    assert_like(defended, given)
    for name, tensor in given.items():
        allowed, slack = values(float(tensor.abs().max()), bits), rounding(tensor)
        step = float(allowed[1] - allowed[0])
        for before, after in zip(entries({"": tensor}), entries({"": defended[name]}), strict=True):
            assert float((allowed - after).abs().min()) <= slack
            assert abs(after - before) <= step + slack


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 16])
def test_quantise_by_chance_is_right_on_average(bits):
    draws, numbers = 20_000, torch.tensor([1.0, -1.0, 0.9, 0.3, 0.123, 0.0, -0.01, -0.5, -0.77])
    defended = Quantise(bits, stochastic=True)({"weight": numbers.repeat(draws, 1)}, seeded())["weight"].double()
    step = float(values(1.0, bits).diff()[0])
    for number, found in zip(numbers.double().tolist(), defended.unbind(1), strict=True):
        above = (number + 1) / step % 1
        if math.isclose(above, round(above), abs_tol=1e-6):
            assert found.unique().tolist() == pytest.approx([number], abs=1e-6)
            continue
        assert len(found.unique()) == 2
        spread = step * math.sqrt(above * (1 - above) / draws)
        assert float(found.mean()) == pytest.approx(number, abs=5 * spread)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 12, 16])
def test_quantise_leaves_zero_zero(bits, stochastic):
    """As a defense before it may have left it."""
    for seed in range(50):
        given = {"weight": torch.randn(8, generator=seeded(seed)).abs(), "bias": torch.zeros(3)}
        given["weight"][3] = 0
        defended = Quantise(bits, stochastic)(given, seeded(seed))
        assert float(defended["weight"][3]) == 0
        assert entries({"": defended["bias"]}) == [0, 0, 0]


def test_quantise_with_few_bits_shares_few_values():
    given = {"weight": torch.linspace(-0.3, 0.3, 1000), "bias": torch.linspace(-7, 7, 1000)}
    for bits, number in ((1, 2), (2, 3), (3, 7), (5, 31)):
        for stochastic in (False, True):
            defended = Quantise(bits, stochastic)(given, seeded())
            assert [len(tensor.unique()) for tensor in defended.values()] == [number, number]


@given(gradients(), st.booleans())
def test_sign(given, scaled):
    given["zero"] = torch.zeros(3)
    defended = Sign(scaled)(given, seeded())
    assert_like(defended, given)
    for name, tensor in given.items():
        numbers = entries({"": tensor})
        size = math.fsum(map(abs, numbers)) / len(numbers) if scaled else 1
        expected = [size * ((number > 0) - (number < 0)) for number in numbers]
        found = defended[name].flatten()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-5, atol=0)


FORMATS = {"bfloat16": (8, -126, (2 - 2**-7) * 2.0**127), "float16": (11, -14, 65504.0)}


def in_half(number: float, dtype: str) -> float:
    """The nearest number of so many bits, of two the even one."""
    bits, smallest, largest = FORMATS[dtype]
    if number == 0:
        return number
    unit = Fraction(2) ** (max(math.frexp(number)[1] - 1, smallest) - bits + 1)
    return float(max(-Fraction(largest), min(Fraction(largest), round(Fraction(number) / unit) * unit)))


@given(gradients(), st.sampled_from([*FORMATS]))
def test_half_precision(given, dtype):
    defended = HalfPrecision(dtype)(given, seeded())
    assert_like(defended, given)
    assert entries(defended) == [in_half(number, dtype) for number in entries(given)]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        ("float16", [1e6, -1e6, 65504.0, 65519.0, 65536.0], [65504.0, -65504.0, 65504.0, 65504.0, 65504.0]),
        ("float16", [2.0**-24, 1.4 * 2.0**-24, -(2.0**-25), 1e-9], [2.0**-24, 2.0**-24, 0.0, 0.0]),
        ("float16", [1 + 2**-11, 1 + 3 * 2**-11, 1 - 2**-12], [1.0, 1 + 2**-9, 1.0]),
        ("bfloat16", [3.4e38, -3.4e38], [FORMATS["bfloat16"][2], -FORMATS["bfloat16"][2]]),
        ("bfloat16", [1 + 2**-8, 1 + 3 * 2**-8, 1e-30], [1.0, 1 + 2**-6, in_half(1e-30, "bfloat16")]),
    ],
)
def test_half_precision_at_its_limits(dtype, before, after, precision):
    given = {"weight": torch.tensor(before, dtype=precision)}
    assert entries(HalfPrecision(dtype)(given, seeded())) == after


def test_half_precision_of_what_only_double_precision_holds():
    given = {"weight": torch.tensor([1e300, -1e39], dtype=torch.float64)}
    assert entries(HalfPrecision("bfloat16")(given, seeded())) == [FORMATS["bfloat16"][2], -FORMATS["bfloat16"][2]]


@given(gradients(), st.floats(1e-6, 1), st.integers(0, 2**32 - 1))
def test_random_pruning_keeps_its_number(given, share, seed):
    defended = RandomPruning(share)(given, seeded(seed))
    assert_like(defended, given)
    before, after = entries(given), entries(defended)
    assert all(found in (0, number) for number, found in zip(before, after, strict=True))
    assert sum(found != 0 for found in after) == max(1, round(share * len(before)))


def test_random_pruning_keeps_every_entry_and_every_two_equally_often():
    given, draws = {"weight": torch.ones(3, 4), "bias": torch.ones(4)}, 4000
    generator = seeded()
    kept = torch.stack([torch.tensor(entries(RandomPruning(0.25)(given, generator))) for _ in range(draws)])
    assert kept.sum(1).unique().tolist() == [4]
    together = (kept.T @ kept) / draws
    for row in range(16):
        for column in range(16):
            expected = 4 / 16 if row == column else 4 / 16 * 3 / 15
            spread = math.sqrt(expected * (1 - expected) / draws)
            assert float(together[row, column]) == pytest.approx(expected, abs=5 * spread)


def test_random_pruning_of_all_keeps_all():
    given = {"weight": torch.randn(5, 6, generator=seeded()), "bias": torch.tensor(0.0)}
    defense = RandomPruning(1.0)
    for found in (defense(given, seeded()), defense.simulate(given, given)):
        assert entries(found) == entries(given)


DEFENSES = [Quantise(3), Quantise(3, stochastic=True), Sign(), Sign(scaled=True), HalfPrecision(), RandomPruning(0.5)]


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_gradients_are_not_changed_in_place(defense: Defense):
    given = {"weight": torch.randn(5, 6, generator=seeded())}
    before = given["weight"].clone()
    assert not torch.equal(defense(given, seeded())["weight"], before)
    assert torch.equal(given["weight"], before)


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_a_gradient_of_zero_stays_so(defense: Defense):
    given = {"weight": torch.zeros(5, 6), "bias": torch.zeros(())}
    assert set(entries(defense(given, seeded()))) == {0}


@pytest.mark.parametrize(
    ("defense", "arguments", "message"),
    [
        (Quantise, (0,), "`bits` to be a whole number of at least 1, but got 0"),
        (Quantise, (17,), r"`bits` from 1 to 16, but got 17"),
        (Quantise, (2.0,), "`bits` to be a whole number of at least 1, but got 2.0"),
        (Quantise, (True,), "`bits` to be a whole number of at least 1, but got True"),
        (Quantise, (8, 1), "`stochastic` to be True or False, but got 1"),
        (Sign, ("yes",), "`scaled` to be True or False, but got 'yes'"),
        (HalfPrecision, ("half",), r"`dtype` to be one of \['bfloat16', 'float16'\], but got 'half'"),
        (HalfPrecision, (torch.float16,), r"`dtype` to be one of \['bfloat16', 'float16'\], but got torch.float16"),
        (RandomPruning, (0.0,), "`share` to be positive and finite, but got 0.0"),
        (RandomPruning, (1.5,), "`share` to be above 0 and at most 1, but got 1.5"),
    ],
)
def test_wrong_arguments(defense, arguments, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        defense(*arguments)


@pytest.mark.parametrize(
    ("defense", "description", "text"),
    [
        (Quantise(8), {"name": "Quantise", "bits": 8, "stochastic": False}, "bits=8, stochastic=False"),
        (Sign(scaled=True), {"name": "Sign", "scaled": True}, "scaled=True"),
        (HalfPrecision("float16"), {"name": "HalfPrecision", "dtype": "float16"}, "dtype='float16'"),
        (RandomPruning(0.1), {"name": "RandomPruning", "share": 0.1}, "share=0.1"),
    ],
)
def test_descriptions(defense, description, text):
    assert defense.describe() == description
    assert repr(defense) == f"{description['name']}({text})"
