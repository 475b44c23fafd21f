"""One form of error for bad input: ``Expected `x` ..., but got ...``."""

from __future__ import annotations

import math
from collections.abc import Iterable


def check_positive(**values: float) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a finite number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"Expected `{name}` to be positive and finite, but got {value!r}.")


def check_count(at_least: int = 1, /, **values: int) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a whole number of at least ``at_least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
            limit = " and below 2**63" if isinstance(value, int) and value >= 2**63 else ""
            raise ValueError(
                f"Expected `{name}` to be a whole number of at least {at_least}{limit}, but got {value!r}."
            )


def check_flag(**values: bool) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"Expected `{name}` to be True or False, but got {value!r}.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` that lists the choices unless ``value`` is one of them."""
    choices = sorted(choices)
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {choices}, but got {value!r}.")
