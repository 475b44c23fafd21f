"""The start of the command line: choose the subcommand, and handle interrupts."""

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
  leakage fit            run any attack on any victims, or condense a data set
  leakage evaluate FILE  test accuracy of networks trained on a synthetic set

Start with `leakage demo`. Then, for example:

  leakage audit --example
  leakage fit --model IDLGAttack --data Victims --data.dataset sample
  leakage fit --model GradientMatchingCondensation \\
      --data LabelledImages --data.dataset fashion_mnist

Choices and options:

  leakage fit --help                       attacks, condensations and data
  leakage fit --model IDLGAttack --help    the options of one of them
  leakage demo --help                      the options of another command
"""
# Each subcommand is a function in the module of the same name in this folder.
_SUBCOMMANDS = ("demo", "audit", "fit", "evaluate")
# 128 plus the number of the signal, as in shells.
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: the arguments after ``leakage``; by default those of the process.
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
    # The other arguments are parsed by the subcommand.
    parser.add_argument("command", choices=_SUBCOMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(given[:1]).command
    # Like `python -m`, for a user's own classes in `class_path`. Last, so that they shadow no other module.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        load(command)(given[1:])
    except (KeyboardInterrupt, SystemExit) as end:
        # In `fit`, Lightning turns an interrupt into an exit after the callbacks have written their results.
        if not isinstance(end, KeyboardInterrupt) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def load(command: str) -> Callable[[Sequence[str]], None]:
    """Import a subcommand without the imports that only the others need."""
    # Nearly all objects made by imports stay alive, so garbage collection finds little and takes a quarter of the time.
    gc.disable()
    try:
        run: Callable[[Sequence[str]], None] = getattr(importlib.import_module(f"leakage.cli.{command}"), command)
    finally:
        gc.enable()
    return run
