"""One form of error, tested once here and by its message wherever it is raised."""

from __future__ import annotations

import math

import pytest

from leakage.errors import (
    check_choice,
    check_count,
    check_flag,
    check_image_size,
    check_pair,
    check_positive,
    show_shape,
)


def test_what_is_right_passes():
    check_positive(lr=1e-9, radius=3)
    check_count(victims=1, num_images=10**9)
    check_count(0, seed=0)
    check_flag(download=False)
    check_choice("loss", "b", ("a", "b"))
    assert check_pair(box=(0, math.inf)) == check_pair(box=[0.0, math.inf]) == (0, math.inf)
    assert check_image_size(28) == (28, 28)
    assert check_image_size([8, 12]) == (8, 12)


@pytest.mark.parametrize("value", [0, 0.0, -1, -1e-9, math.nan, math.inf, -math.inf, True, "1", None])
def test_not_positive(value):
    with pytest.raises(ValueError, match=r"^Expected `lr` to be positive and finite, but got "):
        check_positive(lr=value)


@pytest.mark.parametrize("value", [0, -3, 1.0, True, "3", None])
def test_not_a_count(value):
    with pytest.raises(ValueError, match=r"^Expected `victims` to be a whole number of at least 1, but got "):
        check_count(victims=value)


@pytest.mark.parametrize("value", [-1, 0.0, False, None])
def test_not_a_count_from_zero(value):
    with pytest.raises(ValueError, match=r"^Expected `seed` to be a whole number of at least 0, but got "):
        check_count(0, seed=value)


def test_too_large():
    with pytest.raises(ValueError, match=r"of at least 0 and below 2\*\*63, but got 9223372036854775808\.$"):
        check_count(0, seed=2**63)


@pytest.mark.parametrize("value", ["no", 0, 1, None])
def test_not_a_flag(value):
    with pytest.raises(ValueError, match=r"^Expected `download` to be True or False, but got "):
        check_flag(download=value)


@pytest.mark.parametrize("value", [1, None, "01", ("0", "1"), (0,), (0, 1, 2), (False, True), (0, None)])
def test_not_a_pair(value):
    with pytest.raises(ValueError, match=r"^Expected `box` as two numbers, but got "):
        check_pair(box=value)


@pytest.mark.parametrize("value", [0, (4, -1), 1.5, None, "28", (4,), (4, 4, 4)])
def test_not_an_image_size(value):
    with pytest.raises(ValueError, match=r"^Expected `image_size` (to be a whole number of at least 1|as one number)"):
        check_image_size(value)


def test_first_wrong_value_is_named():
    with pytest.raises(ValueError, match=r"`b` to be positive and finite, but got -2\.$"):
        check_positive(a=1, b=-2, c=-3)
    with pytest.raises(ValueError, match=r"`b` to be a whole number of at least 1, but got 0\.$"):
        check_count(a=1, b=0, c=-3)


def test_unknown_choice_lists_the_choices():
    with pytest.raises(ValueError, match=r"^Expected `loss` to be one of \['a', 'b'\], but got 'c'\.$"):
        check_choice("loss", "c", {"b": 1, "a": 2})


@pytest.mark.parametrize(
    ("sizes", "text"), [((), "()"), ((3,), "(3,)"), (("V", 1, 28), "(V, 1, 28)"), ((2, "..."), "(2, ...)")]
)
def test_show_shape(sizes, text):
    assert show_shape(*sizes) == text
