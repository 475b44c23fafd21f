"""One form of error for bad input: ``Expected `x` ..., but got ...``."""

from __future__ import annotations

from collections.abc import Iterable


def check_positive(**values: float) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not value > 0:
            raise ValueError(f"Expected `{name}` to be positive, but got {value!r}.")


def check_count(**values: int) -> None:
    """Raise a ``ValueError`` naming the first of ``values`` that is not a whole number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected `{name}` to be a whole number of at least 1, but got {value!r}.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` that lists the choices unless ``value`` is one of them."""
    choices = sorted(choices)
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {choices}, but got {value!r}.")
