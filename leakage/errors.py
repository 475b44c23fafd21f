"""Checks of arguments that raise errors of one form: ``Expected `x` ..., but got ...``."""

from __future__ import annotations

import math
from collections.abc import Iterable


def check_positive(**values: float) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a finite number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"Expected `{name}` to be positive and finite, but got {value!r}.")


def check_limit(**values: float) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a number above zero (infinity is allowed)."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"Expected `{name}` to be positive, but got {value!r}.")


def check_not_negative(**values: float) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a finite number of at least zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"Expected `{name}` of at least 0, but got {value!r}.")


def check_share(**values: float) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a number above zero and below one."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"Expected `{name}` to be above 0 and below 1, but got {value!r}.")


def check_kept(**values: float) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a number above zero and at most one."""
    check_positive(**values)
    for name, value in values.items():
        if value > 1:
            raise ValueError(f"Expected `{name}` to be above 0 and at most 1, but got {value!r}.")


def check_count(at_least: int = 1, /, **values: int) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a whole number of at least ``at_least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
            limit = " and below 2**63" if isinstance(value, int) and value >= 2**63 else ""
            raise ValueError(
                f"Expected `{name}` to be a whole number of at least {at_least}{limit}, but got {value!r}."
            )


def check_pair(**values: object) -> tuple[float, float]:
    """Return a pair of numbers as floats; raise a ``ValueError`` naming the argument if it is not one."""
    ((name, value),) = values.items()
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or any(isinstance(number, bool) or not isinstance(number, int | float) for number in pair):
        raise ValueError(f"Expected `{name}` as two numbers, but got {value!r}.")
    return pair


def check_flag(**values: bool) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"Expected `{name}` to be True or False, but got {value!r}.")


def check_image_size(image_size: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """Return ``image_size`` as (height, width), where one number means square; raise a ``ValueError`` otherwise."""
    sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(f"Expected `image_size` as one number or as height and width, but got {image_size!r}.")
    for side in sides:
        check_count(image_size=side)
    return sides[0], sides[1]


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` that lists the choices unless ``value`` is one of them."""
    choices = sorted(choices)
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {choices}, but got {value!r}.")


def show_shape(*sizes: int | str) -> str:
    """Format a shape that may have letters for free sizes, such as ``(V, 1, 28, 28)``."""
    return f"({', '.join(str(size) for size in sizes)}{',' if len(sizes) == 1 else ''})"
