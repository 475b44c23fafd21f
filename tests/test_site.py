"""The documentation site: every public name is in it and says what it is, and it is built without a warning."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import leakage
from tests import processes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def load_room_extension() -> ModuleType:
    spec = importlib.util.spec_from_file_location("room", DOCS / "_extensions" / "room.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rooms() -> list[ModuleType]:
    """The packages with public names."""
    names = ["leakage", *(f"leakage.{it.name}" for it in pkgutil.iter_modules(leakage.__path__) if it.ispkg)]
    return [room for room in map(importlib.import_module, names) if hasattr(room, "__all__")]


def public_names() -> list[tuple[str, str]]:
    return [(room.__name__, name) for room in rooms() for name in room.__all__]


def test_every_public_name_has_a_docstring() -> None:
    pytest.importorskip("sphinx")
    extension = load_room_extension()
    assert len(public_names()) > 150
    assert [f"{room}.{name}" for room, name in public_names() if not extension.docstring(room, name)] == []


def test_a_missing_docstring_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx")
    (tmp_path / "undocumented.py").write_text(
        'from leakage.solvers import STATUS, LBFGS\nclass Heir(LBFGS):\n    pass\nA = 1\nB = 2\n"""What it is."""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    docstring = load_room_extension().docstring
    assert [name for name in ("STATUS", "LBFGS", "Heir", "A", "B") if not docstring("undocumented", name)] == [
        "Heir",
        "A",
    ]


def test_every_room_has_a_page() -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.rst")}
    listed = re.findall(r"^   (\w+)$", pages.pop("index"), re.MULTILINE)
    assert sorted(listed) == sorted(pages)
    documented = {found for page in pages.values() for found in re.findall(r"\.\. room:: (\S+)\n(?!   :names:)", page)}
    assert documented == {room.__name__ for room in rooms()}


def build(site: Path, cache: Path) -> None:
    from sphinx.cmd.build import build_main

    sys.exit(build_main(["-q", "-W", "--keep-going", "-d", str(cache), str(DOCS), str(site)]))


@pytest.mark.slow
def test_site_is_built_without_warnings_and_holds_every_public_name(tmp_path: Path) -> None:
    """In half a minute, so here and not in a step of its own. The site needs no network, to be built or to be read."""
    pytest.importorskip("sphinx")
    from sphinx.util.inventory import InventoryFile

    site = tmp_path / "site"
    built = processes.run(tmp_path / "said.txt", build, site, tmp_path / "cache")
    assert built.returncode == 0, built.said
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    objects = {name for kind, entries in inventory.items() if kind.startswith("py:") for name in entries}
    home = load_room_extension().home
    assert [f"{room}.{name}" for room, name in public_names() if f"{home(room, name)}.{name}" not in objects] == []
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert {"index.html", "results.html", "guides/logging.html", "tutorials/condense.html"} <= set(pages)
    assert "<math" in pages["second_order.html"]
    loaded = re.compile(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]+)"')
    assert {name: loaded.findall(page) for name, page in pages.items() if loaded.search(page)} == {}
