"""The one way to write a file: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes its place at once when it is whole; until then an earlier one stays.

    Its folder is made.

    Raises:
        OSError: the file can't be written; nothing is left of it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, whole_file(f"{folder}/new/notes.txt") as partial:
        ...     _ = partial.write_text("all of it")
    """
    path = Path(path)
    partial = beside(path, f".{os.getpid()}.partial")  # no other process writes to this one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(f"Expected to write '{path}', but got: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone once it has replaced the earlier one
            partial.unlink()


def remove_partials(folder: str | os.PathLike[str], *files: str) -> None:
    """Remove what processes that were killed while they wrote some files of a folder, given as patterns, have left."""
    for pattern in files:
        for partial in Path(folder).glob(f"{pattern}.*.partial"):
            with contextlib.suppress(OSError):
                partial.unlink()


def beside(path: str | os.PathLike[str], ending: str) -> Path:
    """The path of a file that belongs to another one.

    Lightning takes all digits behind ``ckpt_`` in the names of a folder for versions of SLURM's ``hpc_ckpt_1.ckpt``.
    """
    path = Path(path)
    return path.with_name(path.name.replace("ckpt_", "part_") + ending)


def check_output(folder: str | os.PathLike[str]) -> None:
    """Make a folder and try to write there.

    Raises:
        OSError: it can't be.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"Expected `output` to be a folder that can be written, but got '{folder}': {error}.") from error
