"""Dataclasses as JSON: every field is written under its name, and reading is strict."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from leakage.files.tensors import shorten

Record = TypeVar("Record")

# JSON has no such numbers, so they are strings, as in Protocol Buffers. Python's `float` and JavaScript's `Number`
# read them.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_WORDS: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def to_json(value: Any) -> Any:
    """Convert a value to JSON types; numbers that are not finite become strings, such as ``"NaN"`` or ``"-Infinity"``.

    Example:
        >>> to_json({"psnr": float("inf"), "victims": (1, 2)})
        {'psnr': 'Infinity', 'victims': [1, 2]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in _NOT_FINITE.items() if str(number) == str(value))
    return value


def parse_json(content: bytes | str) -> Any:
    """Parse JSON strictly: unlike Python's parser, refuse a bare ``NaN`` or ``Infinity``.

    Raises:
        ValueError: the content is not JSON, or nested too deeply.

    Example:
        >>> parse_json('{"psnr": NaN}')
        Traceback (most recent call last):
        ValueError: NaN is not valid JSON
    """
    try:
        return json.loads(content, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def from_json(kind: type[Record], content: Any, where: str = "") -> Record:
    """Build a dataclass from the JSON that :func:`to_json` made of it.

    Args:
        kind: the dataclass. Its fields may be numbers, strings, flags, lists, dictionaries and dataclasses.
        content: the parsed JSON.
        where: the path to ``content`` in the JSON, for error messages.

    Raises:
        ValueError: a field is missing, unknown, or of the wrong type. The message gives the path to it.

    Example:
        >>> from leakage.audit.report import Figure
        >>> from_json(Figure, {"value": 0.5, "low": 0.2, "high": 0.8, "victims": "ten"})
        Traceback (most recent call last):
        ValueError: Expected `victims` as a whole number, but got 'ten'.
    """
    name = where or "the record"
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected `{name}` as an object, but got {shorten(repr(content))}.")
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    missing = [field for field in fields if field not in content]
    unknown = [field for field in content if field not in fields]
    if missing or unknown:
        got = [f"without {missing}"] * bool(missing) + [f"with {shorten(unknown)}"] * bool(unknown)
        raise ValueError(f"Expected `{name}` with the fields {fields}, but got one {' and '.join(got)}.")
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    read = {field: _read(hints[field], content[field], f"{prefix}{field}") for field in fields}
    try:
        return kind(**read)
    except ValueError as error:
        raise ValueError(f"{error} It is in `{name}`." if where else str(error)) from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not valid JSON")


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # an optional type
        return None if value is None else _read(next(one for one in arguments if one is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    if hint is Any:
        return value
    kind = origin or hint
    if kind is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"Expected `{where}` as {_WORDS[kind]}, but got {shorten(repr(value))}.")
    if kind is list:
        return [_read(arguments[0], one, f"{where}[{i}]") for i, one in enumerate(value)]
    if kind is dict:
        return {name: _read(arguments[1], one, f"{where}.{name}") for name, one in value.items()}
    return float(value) if kind is float else value
