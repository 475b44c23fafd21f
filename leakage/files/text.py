"""Text, JSON and CSV files, written atomically."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from leakage.files.whole import whole_file


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically.

    Raises:
        OSError: the file can't be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file atomically, with null for numbers that are not finite."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_csv(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically, with eight significant digits for floats."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{value:.8g}" if isinstance(value, float) else value for value in row])


def _finite(content: Any) -> Any:
    """Replace infinity and NaN, which JSON does not support, by None."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
