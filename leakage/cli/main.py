"""The command line begins here: which subcommand is asked for, and how it ends when it is interrupted."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from leakage import __version__

_SCREEN = """leakage {version}: what a shared gradient gives away

  leakage demo           three attacks on bundled images, in under a minute
  leakage audit          does the training of your own module leak?
  leakage fit            any attack on any victims, or condense a data set
  leakage evaluate FILE  test accuracy of networks trained on a synthetic set

Begin with `leakage demo`. Then, for example:

  leakage audit --example
  leakage fit --model IDLGAttack --data Victims --data.dataset sample
  leakage fit --model GradientMatchingCondensation \\
      --data LabelledImages --data.dataset fashion_mnist

What there is to choose from, and the options:

  leakage fit --help                       attacks, condensations and data
  leakage fit --model IDLGAttack --help    the options of one of them
  leakage demo --help                      of another command
"""
# Each is a module beside this one with a function of the same name.
_SUBCOMMANDS = ("demo", "audit", "fit", "evaluate")
# 128 and the number of the signal, as shells have it.
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: what follows ``leakage``; by default those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    screen = _SCREEN.format(version=__version__)
    if not given:
        print(screen, end="")
        return
    parser = argparse.ArgumentParser(
        prog="leakage",
        usage=f"leakage [-h] [--version] {{{','.join(_SUBCOMMANDS)}}} ...",
        description=screen,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"leakage {__version__}")
    # The rest is for the parser of the subcommand.
    parser.add_argument("command", choices=_SUBCOMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(given[:1]).command
    # As `python -m` does, for classes of one's own by `class_path`. Last, so that none is in the way of another.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        load(command)(given[1:])
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning turns an interrupt within `fit` into an exit, after the callbacks have written what is done.
        if not isinstance(end, KeyboardInterrupt) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def load(command: str) -> Callable[[Sequence[str]], None]:
    """Import a subcommand, and nothing that only the others need."""
    # Nearly all that the imports make stays: looking for garbage among it, again and again, is a fourth of their time.
    gc.disable()
    try:
        run: Callable[[Sequence[str]], None] = getattr(importlib.import_module(f"leakage.cli.{command}"), command)
    finally:
        gc.enable()
    return run
