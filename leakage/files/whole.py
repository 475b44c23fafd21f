"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces ``path`` only when it is complete.

    Until then an earlier file stays in place. The folder is created.

    Raises:
        OSError: the file can't be written. No partial file is left behind.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, whole_file(f"{folder}/new/notes.txt") as partial:
        ...     _ = partial.write_text("all of it")
    """
    path = Path(path)
    partial = beside(path, f".{os.getpid()}.partial")  # unique to this process
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(f"Expected to write '{path}', but got: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # it no longer exists after a successful write
            partial.unlink()


def remove_partials(folder: str | os.PathLike[str], *files: str) -> None:
    """Remove the partial files that killed processes left in a folder; ``files`` are patterns of the final names."""
    for pattern in files:
        for partial in Path(folder).glob(f"{pattern}.*.partial"):
            with contextlib.suppress(OSError):
                partial.unlink()


def beside(path: str | os.PathLike[str], ending: str) -> Path:
    """Return the path of a file that belongs to another one: its path with ``ending`` appended.

    ``ckpt_`` in the name is replaced, because Lightning takes any digits after it in the folder for a version of
    SLURM's ``hpc_ckpt_1.ckpt``.
    """
    path = Path(path)
    return path.with_name(path.name.replace("ckpt_", "part_") + ending)


def check_output(folder: str | os.PathLike[str]) -> None:
    """Create a folder and check that it can be written to.

    Raises:
        OSError: the folder can't be created or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"Expected `output` to be a folder that can be written, but got '{folder}': {error}.") from error
