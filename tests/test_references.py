"""What docstrings and comments refer to is there."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("leakage", "experiments") for path in (ROOT / folder).rglob("*.py"))
ROLE = re.compile(r":(?:class|func|data|meth|mod|exc):`(?:[^`]*<|~)?([^`>]+)")
DOTTED = re.compile(r"(?<![\w./-])leakage(?:\.[A-Za-z_]\w*)+")

# What files call their format, and no name in the code.
FORMATS = {"leakage.SyntheticSet"}


def texts(source: str) -> Iterator[tuple[str, list[str]]]:
    """Docstrings, with the names of the classes that they are in, and comments."""

    def walk(node: ast.AST, classes: list[str]) -> Iterator[tuple[str, list[str]]]:
        if isinstance(node, ast.ClassDef):
            classes = [*classes, node.name]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or "", classes
        for child in ast.iter_child_nodes(node):
            yield from walk(child, classes)

    yield from walk(ast.parse(source), [])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string, []


def resolves(name: str) -> bool:
    """Whether the longest part of a dotted name that is a module has the rest."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            declared = {name for kind in getattr(found, "__mro__", ()) for name in getattr(kind, "__annotations__", {})}
            if part in declared:
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def named_at_the_top(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


def missing(path: Path, root: Path = ROOT) -> list[str]:
    """What a file of the package or a script refers to that is not there."""
    source = path.read_text(encoding="utf-8")
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    found = []
    for text, classes in texts(source):
        # As Sphinx looks: in the class, in the module and in its package; and builtins. Scripts are not imported.
        places = ["", "builtins.", *(f"{module}.{kind}." for kind in classes), f"{module}.", f"{package}."]
        for name in [*ROLE.findall(text), *(name for name in DOTTED.findall(text) if name not in FORMATS)]:
            if module.startswith("experiments"):
                there = name in named_at_the_top(source) or resolves(name)
            else:
                there = any(resolves((place + name).replace("..", ".").removeprefix(".")) for place in places)
            if not there:
                found.append(name)
    return found


def test_references_resolve() -> None:
    assert len(FILES) > 100
    found = {str(path.relative_to(ROOT)): missing(path) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_name_that_is_gone_is_found(tmp_path: Path) -> None:
    path = tmp_path / "leakage" / "own.py"
    path.parent.mkdir()
    path.write_text('"""See :class:`~leakage.Victim`, :func:`leakage.gone`."""\n# By leakage.objectives.gone.\n')
    assert missing(path, tmp_path) == ["leakage.gone", "leakage.gone", "leakage.objectives.gone"]
