"""Shared code of all kinds of fuzzing: an attempt to read an input with its verdict, mutated bytes, odd values."""

from __future__ import annotations

import re
import signal
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import strategies as st

# An input must be read or refused within this many seconds and bytes of additional memory.
DEADLINE = 10.0
MEMORY = 600 * 2**20
# The number of characters that distinguish messages.
_KIND = 90


class BrokenError(AssertionError):
    """An input was neither read nor refused properly."""


class TooSlowError(BaseException):
    """Raised by the alarm; ``except Exception`` in the library does not catch it."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of an input.

    Attributes:
        refusal: the kind of message, "" if the input was read.
        value: what was read.
    """

    refusal: str
    value: Any = None


def attempt(read: Callable[[], Any], *, named: str = "", marker: Path | None = None) -> Outcome:
    """Read an input and check how that ends.

    Args:
        read: a function that reads the input.
        named: text that the message of a refusal must contain, such as the name of the file.
        marker: a file that code in the input would create.

    Raises:
        BrokenError: the input was refused with an error that is not the library's, took too much time or memory, or its
            code was run.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    before = _peak(anew=True)
    earlier = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = Outcome("", read())
    except TooSlowError as error:
        raise BrokenError(f"Expected reading to end within {DEADLINE} s, but it did not.") from error
    except (ValueError, OSError) as error:
        message = str(error)
        if not message.startswith("Expected ") or "but got" not in message or named not in message:
            raise BrokenError(f"Expected a message of the library that names {named!r}, but got {error!r}.") from error
        if len(message) > 3000:
            raise BrokenError(f"Expected a short message, but got {len(message)} characters.") from error
        outcome = Outcome(f"{type(error).__name__}: {kind_of(message)}")
    except Exception as error:
        raise BrokenError(f"Expected a ValueError or an OSError, but got {error!r}.") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    grown = _peak() - before
    if grown > MEMORY:
        raise BrokenError(f"Expected less than {MEMORY >> 20} MiB more, but got {grown >> 20} MiB.")
    if marker is not None and marker.exists():
        marker.unlink()
        raise BrokenError("Expected that no code in the input is run, but got the file that it creates.")
    return outcome


def _peak(*, anew: bool = False) -> int:
    """Return this process's peak memory in bytes, since the last reset by ``anew`` (0 outside Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if anew:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def kind_of(message: str) -> str:
    """Return a message without the names and numbers that differ between inputs."""
    words = re.sub(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\[\]]*\]", "_", message)
    return re.sub(r"-?\d[\d.e+-]*", "#", words)[:_KIND].strip()


# Strategies.

# Replacements for any value in JSON.
ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40]),
    st.sampled_from([0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "0", "mean", "\x00", "\ud800", "é" * 300, "__class__"]),
    st.sampled_from([[], [[]], [1, 2, 3], {}, {"a": {"b": []}}, [None] * 5]),
    st.integers(-3, 70_000),
    st.text(max_size=6),
)


def mutated_bytes(whole: bytes) -> st.SearchStrategy[bytes]:
    """Return ``whole`` with a few edits: cut off, bits flipped, bytes inserted, removed or repeated."""
    place = st.integers(0, max(len(whole) - 1, 0)) | st.integers(0, min(len(whole) - 1, 200))
    edit = st.one_of(
        st.tuples(st.just("cut"), place, st.none()),
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("remove"), place, st.integers(1, 64)),
        st.tuples(st.just("repeat"), place, st.integers(1, 64)),
        st.tuples(st.just("number"), place, st.sampled_from([0, 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64 - 1])),
    )
    return st.lists(edit, min_size=1, max_size=3).map(lambda edits: _edited(whole, edits))


def _edited(whole: bytes, edits: list[tuple[str, int, Any]]) -> bytes:
    data = bytearray(whole)
    for kind, place, what in edits:
        place = min(place, len(data))
        if kind == "cut":
            del data[place:]
        elif kind == "flip" and place < len(data):
            data[place] ^= 1 << what
        elif kind == "insert":
            data[place:place] = what
        elif kind == "remove":
            del data[place : place + what]
        elif kind == "repeat":
            data[place:place] = data[place : place + what]
        elif kind == "number":
            data[place : place + 8] = struct.pack("<Q", what)
    return bytes(data)
