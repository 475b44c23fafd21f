"""What ``leakage fit`` refuses, in one line: jsonargparse lists all that it has tried, but no option that there is."""

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

# In the words of all versions of jsonargparse that the library runs with.
_PROBLEM = r"Problem with given class_path '([\w.]+)':\s+(?:Validation failed: )?"
_UNKNOWN_OPTION = re.compile(_PROBLEM + r"(?:Option|Key) '([\w.]+)' is not")
_UNKNOWN_TRAINER_OPTION = re.compile(r"(?:does not accept (?:option|nested key) '|arguments: --)trainer\.(\w+)")
_UNKNOWN_KEY = re.compile(r"does not accept (?:option|nested key) '(\w+)")
_MISSING_KEYS = re.compile(r"^the following arguments are required: ((?:fit\.\w+(?:, )?)+)$")
_MISSING_OPTION = re.compile(
    _PROBLEM + r"(?:Key \"([\w.]+)\" is required|the following arguments are required: (.*)$)", re.MULTILINE
)
# The innermost comes last, and what is wrong with it follows.
_BAD_VALUE = re.compile(rf"""(?:{_PROBLEM}|^)Parser key "([\w.]+)":""", re.MULTILINE)
_GIVEN = re.compile(r"(?:Given value: |Got value: )(.*)$", re.MULTILINE)
_NO_SUCH_CLASS = re.compile(_PROBLEM + r"(?:module|No module)|dot import path string: (.*)$", re.MULTILINE)
_ANOTHER_CLASS = re.compile(
    "not correspond to a subclass|Not a valid subclass|not implement protocol|Expected an instantiatable class"
)
# What may stand in a configuration.
_KEYS = ("ckpt_path", "data", "model", "seed_everything", "trainer")
# Types whose values are written as they are.
_PLAIN = ("builtins", "collections", "datetime", "numbers", "os", "pathlib", "types", "typing")


def explain(message: str) -> str:
    """An error of jsonargparse in one line, with the options or the classes that there are."""
    if unknown := _UNKNOWN_OPTION.search(message):
        return _expected_option(imported(unknown[1]), unknown[2])
    if unknown := _UNKNOWN_TRAINER_OPTION.search(message):
        return _expected_option(Trainer, unknown[1])
    if unknown := _UNKNOWN_KEY.search(message):
        return f"Expected one of {listed(_KEYS, unknown[1])}, but got `{unknown[1]}`."
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
    """The message of an error of this library, also where jsonargparse quotes it in a list of what it tried."""
    if str(error).startswith("Expected "):
        return one_line(str(error))
    lines = [line.strip() for line in str(error).splitlines()]
    # jsonargparse too has lines that begin with "- Expected", but none that go on "but got".
    quoted = [line for line in lines if line.startswith("- Expected ") and ", but got " in line]
    return quoted[0].removeprefix("- ") if quoted else None


def one_line(message: str) -> str:
    """The same words without breaks."""
    return " ".join(message.split())


def is_abstract(kind: object) -> bool:
    """Whether a class has methods that its subclasses are to write; `inspect.isabstract` sees only ABCMeta's."""
    return any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def _expected_option(owner: type, option: str) -> str:
    options = {name.partition(".")[0] for name in ArgumentParser().add_class_arguments(owner, fail_untyped=False)}
    wanted = f"an option of {owner.__name__}, one of {listed(options, option)}" if options else "no option"
    return f"Expected {wanted}, but got `{option}`."


def _expected_value(class_path: str | None, key: str, reason: str, given: str) -> str:
    """What an option takes, a class or a value of a type; ``class_path`` is whose it is, the Trainer's without one."""
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
        return f"Expected another value of {option}, but got {given!r}: {one_line(reason).rstrip('.')}."
    return f"Expected {option} as {written}, but got {given!r}."


def _constructor(owner: type, name: str) -> typing.Any:
    """What takes an option: the constructor of a class, or of one further up that it hands the option on to."""
    constructors = (vars(kind)["__init__"] for kind in owner.__mro__ if "__init__" in vars(kind))
    return next((one for one in constructors if name in inspect.signature(one).parameters), None)


def _written(owner: type, name: str) -> str:
    """The type of an option as it stands in the code; nothing where there is none."""
    constructor = _constructor(owner, name)
    annotation = inspect.signature(constructor).parameters[name].annotation if constructor else inspect.Parameter.empty
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _classes(owner: type, name: str) -> tuple[type, ...]:
    """The classes whose subclasses an option takes."""
    try:
        hint = typing.get_type_hints(_constructor(owner, name)).get(name)
    except (NameError, TypeError):  # a name that only type checkers import
        return ()
    found, left = [], [hint]
    while left:
        kind = left.pop(0)
        left += typing.get_args(kind)
        if isinstance(kind, type) and not issubclass(kind, Enum) and kind.__module__.split(".")[0] not in _PLAIN:
            found.append(kind)
    return tuple(dict.fromkeys(found))


def known(bases: tuple[type, ...]) -> list[type]:
    """The library's own subclasses that a user is meant to name: what its rooms hold."""
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
    """The class that an import path names."""
    module, _, name = class_path.rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def listed(names: Iterable[str], given: str) -> str:
    """Names in their order, with a hint at one that is like what was given."""
    names = sorted(set(names))
    close = difflib.get_close_matches(given, names, 1)
    return ", ".join(names) + (f" (did you mean `{close[0]}`?)" if close else "")
