"""The command line begins here: which subcommand is asked for, and how it ends when it is interrupted."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_DESCRIPTION = """What a shared gradient gives away.

  leakage demo               three attacks side by side on a bundled sample, in under a minute
  leakage audit              whether the training of your own LightningModule leaks: a report and an exit code
  leakage fit --config FILE  any attack on any victims, or the condensation of any data set, configured by a file
                             or by arguments
  leakage evaluate FILE      test accuracy of networks trained on a saved synthetic set

`leakage demo --help` and so on tell their options. For example:

  leakage audit --example
  leakage fit --model IDLGAttack --data Victims --data.dataset sample --data.victims 8
  leakage fit --model GradientMatchingCondensation --data LabelledImages --data.dataset fashion_mnist
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
    parser = argparse.ArgumentParser(
        prog="leakage",
        usage=f"leakage [-h] {{{','.join(_SUBCOMMANDS)}}} ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # The rest is for the parser of the subcommand.
    parser.add_argument("command", choices=_SUBCOMMANDS, help="what to do")
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
