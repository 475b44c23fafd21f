"""The text of ``leakage fit --help``: the available classes, or the options of one of them."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer
from torch import nn

from leakage.cli.refusals import imported, is_abstract, known
from leakage.condensation import Condensation

_HELP = ("-h", "--help")
_USAGE = """usage: leakage fit --model CLASS --data CLASS [OPTION VALUE] ...
       leakage fit --config FILE [OPTION VALUE] ...

Run an attack on victims, or condense a data set, with Lightning's Trainer.
"""
_OPTIONS = """options:
  --model CLASS            one of the above, or the import path of your own class
  --model.OPTION VALUE     an option of that class
  --data CLASS, --data.OPTION VALUE, --trainer.OPTION VALUE
                           the same for data and trainer; the trainer is always Lightning's
  --config FILE            read these options from YAML; options after it override it
  --ckpt_path FILE         resume from a checkpoint
  --seed_everything SEED   Lightning's global seed; attacks and data also have a `seed`
  --print_config           print the configuration and exit

The options of one class:
  leakage fit --model IDLGAttack --help
  leakage fit --data Victims --help
  leakage fit --trainer.help
"""
# The column of the help texts in argparse's list of options.
_INDENT = 24
# The maximum width of a line.
_WIDTH = 100


def help_asked_for(arguments: Sequence[str]) -> str | None:
    """Return the help that the arguments ask for (no arguments ask for help, too), or None.

    The result is also None for the help of an unknown class.
    """
    if "--trainer.help" in arguments:
        return _options_of(Trainer, "trainer")
    if arguments and not any(argument in _HELP for argument in arguments):
        return None
    texts = []
    for key, base in (("model", LightningModule), ("data", LightningDataModule)):
        name = _value(f"--{key}", arguments)
        if name is not None:
            kind = _class_of(name, base)
            if kind is None:
                return None
            texts.append(_options_of(kind, key))
    return "\n".join(texts) or _overview()


def _value(option: str, arguments: Sequence[str]) -> str | None:
    """Return the value of an option, written with a space or ``=``."""
    for at, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option and at + 1 < len(arguments):
            return arguments[at + 1]
    return None


def _class_of(name: str, base: type) -> type | None:
    kinds = {kind.__name__: kind for kind in known((base,))}
    if name in kinds:
        return kinds[name]
    try:
        kind = imported(name)
    except (ImportError, AttributeError, ValueError):
        return None
    return kind if isinstance(kind, type) and issubclass(kind, base) else None


def _overview() -> str:
    models, data = known((LightningModule,)), known((LightningDataModule,))
    parts: dict[str, list[type]] = {
        "attacks": [kind for kind in models if not issubclass(kind, Condensation)],
        "condensations, with --data LabelledImages": [kind for kind in models if issubclass(kind, Condensation)],
        "data": data,
    }
    width = max(len(kind.__name__) for kind in (*models, *data)) + 4
    lists = [
        "\n".join([f"{title}:", *(_line(kind, width) for kind in sorted(kinds, key=lambda kind: kind.__name__))])
        for title, kinds in parts.items()
    ]
    return "\n".join([_USAGE, *(f"{one}\n" for one in lists), _OPTIONS])


def _line(kind: type, width: int) -> str:
    name = f"  {kind.__name__}".ljust(width)
    return textwrap.fill(_summary(kind), _columns(), initial_indent=name, subsequent_indent=" " * width)


def _options_of(kind: type, key: str) -> str:
    """Format the options of a class, from its signature and docstring."""
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(kind, key, fail_untyped=False, sub_configs=True)
    # jsonargparse lists every imported class, including those of torch, and can't be asked for fewer.
    text = re.sub(r",?\s+known\s+subclasses:([^)]*)\)", _known_here, parser.format_help())
    # Drop what is above: the title of the only group, and a note that all options can be given as a file.
    _, _, options = text.partition("configuration file.\n")
    summary = _summary(kind)
    return f"{kind.__name__}{summary and ': '}{summary}\n\n{_plain(options)}"


def _known_here(listed: re.Match[str]) -> str:
    """List the classes of this library that users can name, instead of all subclasses."""
    paths = "".join(listed[1].split()).split(",")
    public: list[type] = [imported(path) for path in paths if re.fullmatch(r"leakage\.\w+\.\w+", path)]
    if "torch.nn.Module" in paths:
        public = known((nn.Module,))
    names = sorted(kind.__name__ for kind in public if not is_abstract(kind))
    if not names:
        return ")"
    indent = " " * _INDENT
    return ",\n" + textwrap.fill(
        f"one of {', '.join(names)})", _columns(), initial_indent=indent, subsequent_indent=indent
    )


def _summary(kind: type) -> str:
    return _plain((kind.__doc__ or "").strip().partition("\n")[0])


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, _WIDTH)


def _plain(text: str) -> str:
    """Remove the markup of docstrings."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
