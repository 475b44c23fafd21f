"""``leakage audit``: does the training of your own module leak?"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule

# Once its module is imported, a class can be given by its name alone.
from leakage import datamodules, defenses  # noqa: F401
from leakage.audit import ATTACKS, THREAT_MODELS, Client
from leakage.audit import audit as run_audit
from leakage.audit.auditing import seconds_of
from leakage.audit.verdict import check_thresholds
from leakage.cli import quiet
from leakage.cli.audit_help import HELP
from leakage.cli.fit import check_config
from leakage.cli.refusals import explain, listed, one_line, own_words
from leakage.defenses import Defense
from leakage.errors import check_choice, check_count, check_positive

_EXAMPLE = {
    "model": "leakage.audit.example.ExampleModule",
    "data": "leakage.audit.example.ExampleData",
    "budget": "40s",
    "fail_above": '{"success_rate": 0.05}',
}
# The options of a configuration, each with the check of its value.
_CHECKS: dict[str, Callable[[Any], object] | None] = {
    "model": None,
    "checkpoint": None,
    "data": None,
    "client": None,
    "clients": None,
    "budget": seconds_of,
    "fail_above": lambda value: check_thresholds(_mapping("fail_above", value)),
    "victims": lambda value: check_count(victims=value),
    "attacks": lambda value: _check_attacks(value),
    "threat_model": lambda value: check_choice("threat_model", value, THREAT_MODELS),
    "asserted": lambda value: _mapping("asserted", value),
    "update": None,
    "before": None,
    "success_threshold": lambda value: check_positive(success_threshold=value),
    "seed": lambda value: check_count(0, seed=value),
    "accelerator": None,
    "output": None,
}
_NAMED = (
    ("model", "LightningModule", "mypackage.MyModule"),
    ("data", "LightningDataModule", "mypackage.MyData"),
)
_CLIENT = [field.name for field in fields(Client)]
# Those that can be out of range by themselves.
_ALONE = ("images", "epochs", "reveal_labels", "reveal_learning_rate", "dropout", "name")


def audit(arguments: Sequence[str]) -> None:
    """Attack clients that train as your module does, and report what their updates give away."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return
    quiet()
    try:
        given = _normalised(arguments)
        for path in _configs(given):
            _check_file(path)
        options = _parse(given)
        report = run_audit(
            command=shlex.join(["leakage", "audit", *arguments]), log=partial(print, flush=True), **options
        )
    except (ValueError, OSError, argparse.ArgumentError) as error:
        reason = own_words(error)
        if reason is None and not isinstance(error, argparse.ArgumentError | OSError):
            raise
        _refuse(reason or one_line(str(error)))
    print(f"\n{report.verdict}: {options['output']}")
    for threshold in report.thresholds:
        figure = threshold.figure
        found = f"{threshold.attack}: {figure.value:.3g} [{figure.low:.3g}, {figure.high:.3g}]"
        found = found if threshold.attack else "not measured"
        print(f"  {threshold.decision}: {threshold.metric} of {threshold.client}, {found}, limit {threshold.limit:g}")
    sys.exit(report.exit_code)


def _refuse(reason: str) -> NoReturn:
    sys.stderr.write(f"leakage audit: error: {reason}\n")
    sys.exit(2)


# Arguments.


def _normalised(arguments: Sequence[str]) -> list[str]:
    """Normalise arguments: ``_`` in options, one value for ``--fail_above a=1 b=2``, and ``--example`` written out."""
    given: list[str] = []
    limits: list[str] | None = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            head, dot, rest = name.removeprefix("--").partition(".")
            name = f"--{head.replace('-', '_')}{dot}{rest}"
            name = "--checkpoint" if name == "--model.checkpoint" else name
            limits = [] if name == "--fail_above" else None
            if limits is not None:
                given.append("--fail_above")
                if equals:
                    limits.append(value)
                given.append(_limits(limits)) if equals else None
                continue
            given.append(f"{name}{equals}{value}")
        elif limits is not None:
            limits.append(argument)
            if len(limits) > 1:
                given.pop()
            given.append(_limits(limits))
        else:
            given.append(argument)
    if "--example" in given:
        given.remove("--example")
        named = {argument.partition("=")[0] for argument in given}
        for name, value in _EXAMPLE.items():
            if f"--{name}" not in named:
                given = [f"--{name}", value, *given]
    return given


def _limits(words: Sequence[str]) -> str:
    """Convert words of the form ``metric=limit`` to JSON; raise a ``ValueError`` for any other word."""
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        return words[0]
    limits = {}
    for word in words:
        metric, _, limit = word.partition("=")
        try:
            limits[metric] = float(limit)
        except ValueError:
            raise ValueError(
                f"Expected `--fail-above` as metric=limit, such as success_rate=0.05, but got {word!r}."
            ) from None
    return json.dumps(check_thresholds(limits))


def _parser() -> ArgumentParser:
    """Create the parser; its options are described in :data:`leakage.cli.audit_help.HELP`."""
    parser = ArgumentParser(prog="leakage audit", exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(LightningModule, "model", required=False)
    parser.add_argument("--checkpoint", type=str | None)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    parser.add_class_arguments(Client, "client")
    add = parser.add_argument
    add("--clients", type=list[Client] | None)
    add("--budget", type=str | float, default="10m")
    add("--fail_above", type=dict[str, float] | None)
    add("--victims", type=int, default=100)
    add("--attacks", type=list[str] | None)
    add("--threat_model", type=str, default="D")
    add("--update", type=str | None)
    add("--before", type=str | None)
    add("--asserted", type=dict[str, str] | None)
    add("--success_threshold", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--accelerator", type=str, default="cpu")
    add("--output", type=str, default="audit")
    return parser


def _parse(given: Sequence[str]) -> dict[str, Any]:
    """Parse the arguments of :func:`leakage.audit.audit` from those of the command line."""
    parser = _parser()
    unknown = [
        word for word in given if word.startswith("--") and _top(word) not in (*_CHECKS, "config", "print_config")
    ]
    if unknown:
        raise ValueError(f"Expected an option, one of {listed(_CHECKS, _top(unknown[0]))}, but got `{unknown[0]}`.")
    for word in given:
        name = word.partition("=")[0].removeprefix("--client.")
        if word.startswith("--client.") and name.partition(".")[0].removesuffix("+") not in _CLIENT:
            raise ValueError(f"Expected an option of a client, one of {listed(_CLIENT, name)}, but got `{name}`.")
    try:
        config = parser.parse_args(list(given))
    except argparse.ArgumentError as error:
        raise ValueError(own_words(error) or _explain_in(str(error), given)) from error
    if config.get("model") is None:
        raise ValueError("Expected `--model` with the import path of your LightningModule, but got none.")
    try:
        # `instantiate` is the name since jsonargparse 4.49.
        made = getattr(parser, "instantiate", parser.instantiate_classes)(config)
    except Exception as error:  # raised by a user's constructor
        root: BaseException = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__ or root
        raise ValueError(
            own_words(error) or f"Expected `model`, `data` and clients that can be created, but got {_short(root)}"
        ) from error
    if made.clients and made.client != Client():
        raise ValueError("Expected either one client (`client`) or several (`clients`), but got both.")
    module = made.model
    if made.checkpoint is not None:
        _load(module, Path(made.checkpoint))
    return {
        "module": module,
        "data": made.get("data"),
        "client": list(made.clients) if made.clients else made.client,
        **{name: made[name] for name in _CHECKS if name in made and _CHECKS[name] is not None},
        **{name: made[name] for name in ("accelerator", "output", "update", "before")},
    }


def _top(word: str) -> str:
    return re.split(r"[.=]", word.removeprefix("--"))[0].removesuffix("+")


def _explain_in(message: str, given: Sequence[str]) -> str:
    """Turn an error of jsonargparse into one line, with the line of the configuration file that it concerns."""
    reason = explain(message)
    for name, kind, example in _NAMED:
        if reason.startswith(f"Expected `--{name}` to be"):
            got = reason.rpartition("but got ")[2].strip(".'\"")
            return (
                f"Expected `--{name}` as the import path of your {kind}, such as {example}, but got {got!r}"
                f"{_why_not(got, kind)}."
            )
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    place = _place(key[1].partition(".")[0], given) if key else ""
    return f"{reason}{place}" if reason.startswith("Expected") else f"Expected valid options, but got: {reason}{place}"


def _why_not(path: str, kind: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or path), name)
    except Exception as error:  # raised by a user's module
        return f": {_short(error)}".rstrip(".")
    kinds = [base.__name__ for base in found.__mro__] if isinstance(found, type) else []
    return "" if kind in kinds else f", which is not a {kind}"


def _short(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def _place(key: str, given: Sequence[str]) -> str:
    for path in _configs(given):
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if name.value == key:
                return f" It is in line {name.start_mark.line + 1} of '{path}'."
    return ""


def _load(module: LightningModule, path: Path) -> None:
    """Load the weights of a checkpoint; code in the file is never run."""
    wanted = f"Expected `checkpoint` with the weights of {type(module).__name__}, but got '{path}'"
    if not path.is_file():
        raise ValueError(f"{wanted}: no such file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the type of error depends on where the file is broken
        raise ValueError(f"{wanted}: it is truncated, of another kind, or contains code.") from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError(f"{wanted}: it contains no weights.")
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{wanted}: {one_line(str(error))}") from error


# Files.


def _configs(given: Sequence[str]) -> list[Path]:
    named = [value for option, value in itertools.pairwise(given) if option == "--config"]
    named += [word.removeprefix("--config=") for word in given if word.startswith("--config=")]
    paths = [Path(name) for name in named]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"Expected `--config` to be a YAML file, but got '{missing[0]}', which is not a file.")
    return paths


def _check_file(path: Path) -> None:
    """Raise a ``ValueError`` that names the line of an option that is unknown or out of range."""
    check_config(path)
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        with _Line(path, name):
            if name.value not in _CHECKS:
                raise ValueError(f"Expected one of {listed(_CHECKS, name.value)}, but got `{name.value}`.")
            check = _CHECKS[name.value]
            if check is not None and (plain := _plain(value)) is not None:
                check(plain)
        for client in _clients(name.value, value, path):
            _check_client(client, path)


def _clients(key: str, node: yaml.Node, path: Path) -> list[yaml.MappingNode]:
    if key not in ("client", "clients"):
        return []
    items: list[Any] = node.value if key == "clients" and isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        with _Line(path, item):
            if not isinstance(item, yaml.MappingNode):
                raise ValueError(f"Expected `{key}` with options such as `images: 8`, but got {_plain(item)!r}.")
    return items


def _check_client(node: yaml.MappingNode, path: Path) -> None:
    values = {}
    for name, value in node.value:
        with _Line(path, name):
            if name.value not in _CLIENT:
                raise ValueError(
                    f"Expected an option of a client, one of {listed(_CLIENT, name.value)}, but got `{name.value}`."
                )
        if name.value == "defenses":
            with _Line(path, name):
                _check_defenses(_plain(value))
        else:
            values[name.value] = _plain(value)
    # An option that is out of range by itself is reported with its own line, any other error with the client's line.
    for name, _ in node.value:
        if name.value in _ALONE and name.value in values:
            with _Line(path, name):
                Client(**{name.value: values[name.value]})
    with _Line(path, node):
        Client(**values)


class _Line:
    """Context manager that adds the line of a node to the message of an error."""

    def __init__(self, path: Path, node: yaml.Node) -> None:
        self.place = f"It is in line {node.start_mark.line + 1} of '{path}'."

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | TypeError):
            raise ValueError(f"{error} {self.place}") from error


def _plain(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"Expected `{name}` with names and values, but got {value!r}.")
    return value


def _check_defenses(value: Any) -> None:
    """Create the defenses; raise the ``ValueError`` of one whose options are out of range."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--defenses", type=list[Defense])
    try:
        parser.instantiate_classes(parser.parse_object({"defenses": value}))
    except argparse.ArgumentError:  # what can't be parsed is reported together with all options
        return
    except Exception as error:
        if reason := own_words(error):
            raise ValueError(reason) from error


def _check_attacks(value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise ValueError(f"Expected `attacks` as a list of {', '.join(ATTACKS)}, but got {value!r}.")
    for name in value:
        check_choice("attacks", name, ATTACKS)
