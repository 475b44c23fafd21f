"""Errors of ``leakage fit`` in one line; jsonargparse lists all that it has tried, but not the valid options."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterable
from enum import Enum

from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer
from torch import nn

from leakage.models import NETWORKS

# Patterns for the messages of all supported versions of jsonargparse.
_PROBLEM = r"Problem with given class_path '([\w.]+)':\s+(?:Validation failed: )?"
_UNKNOWN_OPTION = re.compile(_PROBLEM + r"(?:Option|Key) '([\w.]+)' is not")
_UNKNOWN_TRAINER_OPTION = re.compile(r"(?:does not accept (?:option|nested key) '|arguments: --)trainer\.(\w+)")
_UNKNOWN_KEY = re.compile(r"(?:does not accept (?:option|nested key) '|^unrecognized arguments: (--))(\w+)")
_MISSING_KEYS = re.compile(r"^the following arguments are required: ((?:fit\.\w+(?:, )?)+)$")
_MISSING_OPTION = re.compile(
    _PROBLEM + r"(?:Key \"([\w.]+)\" is required|the following arguments are required: (.*)$)", re.MULTILINE
)
# The innermost key comes last, followed by what is wrong with it.
_BAD_VALUE = re.compile(rf"""(?:{_PROBLEM}|^)Parser key "([\w.]+)":""", re.MULTILINE)
_GIVEN = re.compile(r"(?:Given value: |Got value: )(.*)$", re.MULTILINE)
_NO_SUCH_CLASS = re.compile(_PROBLEM + r"(?:module|No module)|dot import path string: (.*)$", re.MULTILINE)
_ANOTHER_CLASS = re.compile(
    "not correspond to a subclass|Not a valid subclass|not implement protocol|Expected an instantiatable class"
)
# The keys of a configuration.
_KEYS = ("ckpt_path", "data", "model", "seed_everything", "trainer")
# Types whose values need no quotes.
_PLAIN = ("builtins", "collections", "datetime", "numbers", "os", "pathlib", "types", "typing")


def explain(message: str) -> str:
    """Turn an error of jsonargparse into one line that lists the valid options or classes."""
    if unknown := _UNKNOWN_OPTION.search(message):
        return _expected_option(imported(unknown[1]), unknown[2])
    if unknown := _UNKNOWN_TRAINER_OPTION.search(message):
        return _expected_option(Trainer, unknown[1])
    if unknown := _UNKNOWN_KEY.search(message):
        dashes, key = unknown[1] or "", unknown[2]
        keys = [dashes + name for name in ((*_KEYS, "config") if dashes else _KEYS)]
        return f"Expected one of {listed(keys, dashes + key)}, but got `{dashes + key}`."
    if missing := _MISSING_KEYS.search(message):
        keys = sorted(missing[1].replace("fit.", "").split(", "), reverse=True)
        return f"Expected {' and '.join(f'`--{key}`' for key in keys)}, but got none."
    if missing := _MISSING_OPTION.search(message):
        return f"Expected the option `{missing[2] or missing[3]}` of {imported(missing[1]).__name__}, but got none."
    places = list(_BAD_VALUE.finditer(message))
    if places and (given := _GIVEN.search(message, places[-1].end())):
        return _expected_value(places[-1][1], places[-1][2], message[places[-1].end() : given.end()], given[1])
    return one_line(message).rstrip(".") + "."


def own_words(error: Exception) -> str | None:
    """Return the message of an error of this library, also if jsonargparse quotes it in a list of its attempts."""
    if str(error).startswith("Expected "):
        return one_line(str(error))
    lines = [line.strip() for line in str(error).splitlines()]
    # jsonargparse also has lines that begin with "- Expected", but none that continue with "but got".
    quoted = [line for line in lines if line.startswith("- Expected ") and ", but got " in line]
    return quoted[0].removeprefix("- ") if quoted else None


def one_line(message: str) -> str:
    """Join the lines of a message."""
    return " ".join(message.split())


def is_abstract(kind: object) -> bool:
    """Return whether a class has abstract methods; `inspect.isabstract` only works for classes of ABCMeta."""
    return any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def _expected_option(owner: type, option: str) -> str:
    options = {name.partition(".")[0] for name in ArgumentParser().add_class_arguments(owner, fail_untyped=False)}
    wanted = f"an option of {owner.__name__}, one of {listed(options, option)}" if options else "no option"
    return f"Expected {wanted}, but got `{option}`."


def _expected_value(class_path: str | None, key: str, reason: str, given: str) -> str:
    """Say what an option takes, a class or a value of a type; without ``class_path``, it is the Trainer's."""
    name = key.rpartition(".")[2]
    owner = imported(class_path) if class_path else Trainer
    option = f"`{name}` of {owner.__name__}" if class_path else f"`--{key}`"
    bases: tuple[type, ...]
    if key in ("model", "data") and not class_path:
        bases, written = (LightningModule if key == "model" else LightningDataModule,), ""
    else:
        bases, written = _classes(owner, name), _written(owner, name)
    refused = _NO_SUCH_CLASS.search(reason)
    if bases and (refused or _ANOTHER_CLASS.search(reason)):
        in_file = re.search(r"class_path(?:': |=)'([^']*)'", given)
        got = (refused[1] or refused[2]) if refused else in_file[1] if in_file else given
        names = [kind.__name__ for kind in known(bases)]
        choices = f"one of {listed(names, got.rpartition('.')[2])}, or the" if names else "the"
        paths = " or ".join(f"{base.__module__}.{base.__qualname__}" for base in bases)
        return (
            f"Expected {option} to be {choices} import path of {'another' if names else 'a'} subclass of {paths}, "
            f"but got {got!r}."
        )
    if not written:
        return f"Expected a valid value of {option}, but got {given!r}: {one_line(reason).rstrip('.')}."
    return f"Expected {option} as {written}, but got {given!r}."


def _constructor(owner: type, name: str) -> typing.Any:
    """Return the constructor that takes an option: that of the class, or of a base class that it is passed on to."""
    constructors = (vars(kind)["__init__"] for kind in owner.__mro__ if "__init__" in vars(kind))
    return next((one for one in constructors if name in inspect.signature(one).parameters), None)


def _written(owner: type, name: str) -> str:
    """Return the type of an option as written in the code; empty without one."""
    constructor = _constructor(owner, name)
    annotation = inspect.signature(constructor).parameters[name].annotation if constructor else inspect.Parameter.empty
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _classes(owner: type, name: str) -> tuple[type, ...]:
    """Return the classes whose subclasses an option takes."""
    try:
        hint = typing.get_type_hints(_constructor(owner, name)).get(name)
    except (NameError, TypeError):  # a name imported for type checking only
        return ()
    found, left = [], [hint]
    while left:
        kind = left.pop(0)
        left += typing.get_args(kind)
        if isinstance(kind, type) and not issubclass(kind, Enum) and kind.__module__.split(".")[0] not in _PLAIN:
            found.append(kind)
    return tuple(dict.fromkeys(found))


def known(bases: tuple[type, ...]) -> list[type]:
    """Return the public subclasses in this library."""
    if bases == (nn.Module,):
        return [*NETWORKS.values()]
    rooms = [room for name, room in list(sys.modules.items()) if re.fullmatch(r"leakage\.\w+", name)]
    classes = [kind for room in rooms for kind in vars(room).values() if isinstance(kind, type)]
    found = [
        kind
        for kind in classes
        if kind.__module__.startswith("leakage.")
        and kind not in bases
        and any(base in kind.__mro__ for base in bases)
        and not is_abstract(kind)
    ]
    return list(dict.fromkeys(found))


def imported(class_path: str) -> type:
    """Return the class at an import path."""
    module, _, name = class_path.rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def listed(names: Iterable[str], given: str) -> str:
    """List names in their order, with a hint if one is similar to ``given``."""
    names = sorted(set(names))
    close = difflib.get_close_matches(given, names, 1)
    return ", ".join(names) + (f" (did you mean `{close[0]}`?)" if close else "")
