"""The process of the command line: ``python -m leakage``, and what the script ``leakage`` starts."""

from __future__ import annotations

import gc
from collections.abc import Callable


def load() -> Callable[[], None]:
    """Import the command line."""
    # Nearly all that the imports make stays: looking for garbage among it, again and again, is a fourth of their time.
    gc.disable()
    try:
        from leakage.cli.main import main
    finally:
        gc.enable()
    return main


def main() -> None:
    """Run it on the arguments of the process."""
    load()()


if __name__ == "__main__":
    main()
