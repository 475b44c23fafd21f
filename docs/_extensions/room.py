"""``.. room:: leakage.attacks``: every public name of a room from its docstring, below a table of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective


def constant_docstring(module: str, name: str) -> str:
    """The string after a constant's assignment, which may be in the module that it is imported from; else ''."""
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.analyze()
    if ("", name) in analyzer.attr_docs:
        return "\n".join(analyzer.attr_docs["", name]).strip()
    for statement in ast.parse(analyzer.code).body:
        if isinstance(statement, ast.ImportFrom) and statement.module and name in [it.name for it in statement.names]:
            return constant_docstring(statement.module, name)
    return ""


def docstring(module: str, name: str) -> str:
    """The docstring of a public name: its own, not one that it inherits."""
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        return inspect.cleandoc(vars(thing).get("__doc__") or "" if inspect.isclass(thing) else thing.__doc__ or "")
    return constant_docstring(module, name)


def home(module: str, name: str) -> str:
    """The room that documents a name: where several have it, the one that it is defined in."""
    defined = getattr(getattr(importlib.import_module(module), name), "__module__", None) or module
    room = ".".join(defined.split(".")[:2])
    return room if name in getattr(importlib.import_module(room), "__all__", ()) else module


def summary(text: str) -> str:
    """The first sentence."""
    first = text.split("\n\n")[0]
    return re.split(r"(?<=[.])\s", " ".join(first.split()), maxsplit=1)[0]


class Room(SphinxDirective):
    """Documents the names in ``__all__`` of a package, or some ``:names:`` of another module."""

    required_arguments = 1
    option_spec = {"names": directives.unchanged_required}  # noqa: RUF012 (as docutils declares it)

    def run(self) -> list[nodes.Node]:
        """What the module says of itself, a table of the names, and each of them."""
        module = importlib.import_module(self.arguments[0])
        names = self.options["names"].split() if "names" in self.options else module.__all__
        head = [inspect.getdoc(module) or "", "", f".. py:currentmodule:: {module.__name__}", ""]
        table = [".. list-table::", "   :class: names", ""]
        entries: list[str] = []
        for name in sorted(names, key=str.lower):
            thing, text = getattr(module, name), docstring(module.__name__, name)
            place = home(module.__name__, name)
            table += [f"   * - :py:obj:`~{place}.{name}`", f"     - {summary(text)}"]
            if place != module.__name__:
                continue
            if inspect.isclass(thing):
                # The fields of a named tuple stand in its docstring.
                entries += [f".. autoclass:: {name}", *([] if hasattr(thing, "_fields") else ["   :members:"]), ""]
            elif inspect.isroutine(thing):
                entries += [f".. autofunction:: {name}", ""]
            else:  # autodoc looks for a constant's docstring only where it is assigned
                entries += [f".. py:data:: {name}", "", *(f"   {line}" for line in text.splitlines()), ""]
        return self.parse_text_to_nodes("\n".join([*head, *table, "", *entries]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("room", Room)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
