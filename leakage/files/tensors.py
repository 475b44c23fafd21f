"""Tensors in safetensors files: written atomically, and read without running code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leakage.files.whole import whole_file

_VERSION = "1"
# The number of characters of a file's content that an error message quotes.
_QUOTED = 300


def write_safetensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, with ``kind`` as the ``format`` in its header.

    Raises:
        OSError: the file can't be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        try:
            save_file(contiguous, partial, metadata={"format": kind, "version": _VERSION, **(header or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_safetensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the header and the tensors of a file that :func:`write_safetensors` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a safetensors file at '{path}', but got no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # A well-formed header may still claim a type that torch lacks, or a size that does not fit in memory.
    except Exception as error:
        raise ValueError(
            f"Expected a whole safetensors file, but got '{path}', which is truncated or of another kind "
            f"(pickles, such as .pt and .pth, are refused): {shorten(error)}"
        ) from error
    if header.get("format") != kind or header.get("version") != _VERSION:
        raise ValueError(
            f"Expected format {kind!r} of version {_VERSION} in the header of '{path}', but got "
            f"{shorten(repr(header.get('format')))} of version {shorten(repr(header.get('version')))}."
        )
    return header, tensors


def header_value(header: Mapping[str, str], name: str) -> Any:
    """Parse an entry of a header that holds JSON.

    Raises:
        ValueError: the entry is missing, not JSON, or nested too deeply.
    """
    if name not in header:
        raise ValueError(f"{name!r} missing")
    try:
        return json.loads(header[name])
    except RecursionError as error:
        raise ValueError(f"{name!r} nested too deeply") from error


def shorten(words: object) -> str:
    """Cut a text that quotes a file, and may be of any length, to the beginning that an error message shows.

    Example:
        >>> len(shorten("long " * 1000)), shorten("short")
        (303, 'short')
    """
    text = str(words)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
