"""The README's promises that a program can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_to_a_file_has_one() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith(("http", "#"))]
    assert targets
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_every_link_to_a_section_has_one() -> None:
    headings = [
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", README, re.M)
    ]
    targets = re.findall(r"\]\(#([^)]+)\)", README)
    assert targets
    assert [target for target in targets if target not in headings] == []


def test_every_named_file_of_the_experiments_is_there() -> None:
    named = set(re.findall(r"experiments/[\w/]+\.(?:py|yaml)", README))
    assert {"experiments/idlg/table1.py", "experiments/idlg/mnist.yaml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_python_blocks_parse_and_import_what_there_is() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
