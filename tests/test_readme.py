"""The promises of README.md and of docs/ that a program can check: links, commands, and code, which is run."""

from __future__ import annotations

import argparse
import doctest
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from PIL import Image

from leakage.cli.main import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes the code cheap, or spares it a download: everywhere in a document, and why.
CHEAPER = [
    ("README.md", 'Victims("mnist", victims=1000', 'Victims("sample", victims=2', "images that come with the package"),
    ("docs/guides/victims.md", 'Victims("cifar10", victims=8', 'Victims("photos", victims=2', "photographs made here"),
    ("docs/guides/victims.md", "max_evaluations=300", "max_evaluations=3", "the images do not come out anyway"),
    ("docs/guides/own_gradients.md", "max_evaluations=300", "max_evaluations=3", "the images do not come out anyway"),
    ("docs/guides/pieces.md", 'Victims("mnist", victims=100', 'Victims("sample", victims=2', "images of the package"),
    ("docs/guides/pieces.md", "steps=800", "steps=8", "a search that takes a moment"),
    ("docs/guides/logging.md", 'Victims("mnist", victims=1000', 'Victims("sample", victims=2', "images of the package"),
    (
        "docs/guides/resuming.md",
        'Victims("mnist", victims=1000',
        'Victims("sample", victims=2',
        "images of the package",
    ),
    ("docs/guides/resuming.md", "every_n_train_steps=200", "every_n_train_steps=50", "a checkpoint on the way"),
    ("docs/guides/getting_started.md", "victims=20", "victims=2", "fewer victims"),
    (
        "docs/guides/condensing.md",
        '"fashion_mnist"',
        '"sample", batch_size=16',
        "images of the package, in small batches",
    ),
    ("docs/guides/condensing.md", 'protocol="fast"', 'protocol="fast", iterations=1', "one network"),
    ("docs/guides/condensing.md", "networks=3", "networks=1, epochs=1", "a test that takes a moment"),
    ("docs/tutorials/batch_labels.md", 'rule="posterior"', 'rule="rlu"', "a rule that learns in no time"),
    (
        "docs/condensation.md",
        '"experiments/',
        f'"{ROOT.as_posix()}/experiments/',
        "the code runs in a folder of its own",
    ),
    ("docs/condensation.md", "images_per_class=10)", "images_per_class=2, iterations=1)", "one network"),
    ("docs/condensation.md", '"cifar10"', '"sample", batch_size=16', "images of the package, in small batches"),
    (
        "docs/defenses.md",
        "(adaptive=adaptive)",
        "(adaptive=adaptive, max_evaluations=9, restarts=0)",
        "a short search",
    ),
    ("docs/defenses.md", "max_evaluations=20", "max_evaluations=4", "a search that takes a moment"),
    ("docs/labels.md", "torch.rand(100, 24,", "torch.rand(10, 24,", "fewer victims"),
    ("docs/labels.md", "torch.randint(10, (100, 24))", "torch.randint(10, (10, 24))", "fewer victims"),
    ("docs/updates.md", "victims=8, budget=30.0", "victims=2, budget=1.0", "a look that takes a moment"),
    ("docs/updates.md", "max_epochs=10", "max_steps=1, logger=False, enable_checkpointing=False", "one step"),
    ("docs/second_order.md", 'Victims("mnist", victims=500', 'Victims("sample", victims=2', "images of the package"),
]
# What the code of a document has made in the end, as expressions in its names. Tutorials say what they print.
MADE = {
    "README.md": ["len(attack.finished.ids) == 2"],
    "docs/guides/getting_started.md": [
        "attack.finished.images.shape == (2, 1, 1, 28, 28)",
        "attack.scores[0].psnr > 40",
    ],
    "docs/audit.md": ["report.verdict == 'exceeded'", "report.measured[1].metrics['success_rate'].value == 1"],
    "docs/guides/victims.md": ["all(score.label_accuracy == 1 for score in attack.scores.values())"],
    "docs/guides/own_gradients.md": ["attack.finished.labels.tolist() == labels.tolist()", "not attack.scores"],
    "docs/guides/pieces.md": ["len(attack.scores) == 2"],
    "docs/guides/condensing.md": ["len(condensation.synthetic_dataset()) == 40"],
    "docs/guides/logging.md": ["len(attack.finished.ids) == 2"],
    "docs/guides/resuming.md": ["(run('results/last.ckpt').finished.images == attack.finished.images).all()"],
    "docs/condensation.md": [
        "images.shape == (10, 1, 28, 28)",
        "0.69 < min(synthetic.recipe.score('dc').accuracies)",
        "condensation.protocol.real_images == 'kmeans'",
    ],
    "docs/defenses.md": [
        "all(score.mse < 1e-6 for score in attack.scores.values())",
        "Rounded().is_simulated",
        "sum(score.mse for score in informed.scores.values()) < 0.02",  # without the prior 0.07
    ],
    "docs/labels.md": ["inferred.labels.shape == (10, 24)", "corrected.labels.tolist() == [[0, 3, 3, 7]]"],
    "docs/real_networks.md": ["attack.solver.evaluations == 600"],
    "docs/updates.md": [
        "attack.finished.labels.tolist() == [[3]]",
        "len(checks) == 8",
        "monitor.history[0]['label_accuracy'] == 1.0",
    ],
    "docs/second_order.md": ["all(score.mse < 1e-6 for score in attack.scores.values())", "len(attack.scores) == 2"],
}
# Code that is not run: a piece of it, and why.
NOT_RUN: list[tuple[str, str, str]] = [
    ("docs/tutorials/processes.md", "devices=2", "it starts this script again in a second process"),
    ("docs/updates.md", "from flwr", "Flower is an extra"),
]
# Commands that are not of this project.
FOREIGN = {
    *("python3", "bash", "wandb", "torchrun"),
    *(f".venv/bin/{name}" for name in ("pip", "pytest", "ruff", "mypy", "sphinx-build")),
}
# Files in commands that the reader has.
READERS_FILES = {
    "audit.yaml": "experiments/audit/sample.yaml",
    "mypackage.MyModule": "leakage.audit.example.ExampleModule",
    "mypackage.MyData": "leakage.audit.example.ExampleData",
}


@dataclass(frozen=True)
class Block:
    """Fenced code, and what the document says that it prints."""

    document: str
    line: int
    language: str
    code: str
    prints: str | None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks(language: str) -> Iterator[Block]:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        fenced = re.compile(r"^```(\w+)\n(.*?)^```(?:\n+```text\n(.*?)^```)?", flags=re.DOTALL | re.MULTILINE)
        for found in fenced.finditer(text):
            if found[1] == language:
                line = text.count("\n", 0, found.start()) + 2
                yield Block(name_of(document), line, language, found[2], found[3])


PYTHON = list(blocks("python"))
WITH_CODE = sorted({block.document for block in PYTHON})


def cheaper(block: Block) -> str:
    code = block.code
    for document, old, new, _ in CHEAPER:
        if document == block.document:
            code = code.replace(old, new)
    return code


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with photographs: ten classes, two images each."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        folder = tmp_path / "photos" / f"class_{label}"
        folder.mkdir(parents=True)
        for image in torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=generator):
            Image.fromarray(image.numpy()).save(folder / f"{len(list(folder.iterdir()))}.png")
    yield tmp_path
    wandb.finish()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The clients defend")
@pytest.mark.parametrize("document", WITH_CODE)
def test_code_runs(document: str, readers_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [block for block in PYTHON if block.document == document]
    for block in code:
        if any(document == where and piece in block.code for where, piece, _ in NOT_RUN):
            continue
        capsys.readouterr()
        source = "\n" * (block.line - 1) + cheaper(block)  # so that a traceback has the document's lines
        exec(compile(source, str(ROOT / document), "exec"), names)
        if block.prints is not None:
            printed = capsys.readouterr().out
            same = doctest.OutputChecker().check_output(block.prints, printed, doctest.ELLIPSIS)
            assert same, f"{block} says that it prints\n{block.prints}but it prints\n{printed}"
    assert document in MADE or any(block.prints for block in code), "what it has made"
    for expression in MADE.get(document, ()):
        assert eval(expression, names), expression


def test_the_tables_above_name_nothing_that_is_not_there() -> None:
    code = {document: "".join(block.code for block in PYTHON if block.document == document) for document in WITH_CODE}
    assert {"README.md", "docs/labels.md", "docs/second_order.md"} <= set(code)
    assert [old for document, old, _, _ in CHEAPER if old not in code[document]] == []
    assert [piece for document, piece, _ in NOT_RUN if piece not in code[document]] == []
    assert set(MADE) <= set(code)
    commands = "".join(block.code for block in blocks("bash"))
    assert [name for name in READERS_FILES if name not in commands] == []
    assert all(why for *_, why in [*CHEAPER, *NOT_RUN])


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the documents: where, and its words."""
    for block in blocks("bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield str(block), words[:end]
                words = words[end + 1 :]


class ParsedError(Exception):
    """The options were understood, and nothing was run."""


def not_run(**options: Any) -> None:
    raise ParsedError


def test_commands_are_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts and `leakage` parse their options and go no further; other programs are known ones."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *given: Any, **options: Any) -> Any:
        parsed = parse(self, *given, **options)
        if self.prog != "leakage":  # which finds the subcommand so
            raise ParsedError
        return parsed

    monkeypatch.chdir(ROOT)
    tried = set()
    for where, words in commands():
        words = [READERS_FILES.get(word, word) for word in words]
        program, *arguments = words
        if "leakage" in [Path(word).name for word in words]:
            at = [Path(word).name for word in words].index("leakage")
            arguments = words[at + 1 :]
            tried.add(arguments[0])
            with monkeypatch.context() as patch:
                if arguments[0] == "fit":
                    arguments.append("--print_config")
                    expected: type[BaseException] = SystemExit
                elif arguments[0] == "audit":  # whose parser is jsonargparse's
                    patch.setattr("leakage.cli.audit.run_audit", not_run)
                    patch.setattr("leakage.cli.audit._load", lambda module, path: None)
                    expected = ParsedError
                else:
                    patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
                    expected = ParsedError
                with pytest.raises(expected) as end:
                    main(arguments)
            assert not isinstance(end.value, SystemExit) or not end.value.code, (where, words, capsys.readouterr().err)
        elif program == "python":
            script = ROOT / arguments[0]
            assert script.is_file(), where
            tried.add(arguments[0])
            with monkeypatch.context() as patch:
                patch.syspath_prepend(script.parent)
                patch.setattr(sys, "argv", arguments)
                patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
                with pytest.raises(ParsedError):
                    run_script(script, patch)
        else:
            assert program in FOREIGN, where
    assert {"demo", "fit", "experiments/idlg/table1.py"} <= tried


def run_script(script: Path, patch: pytest.MonkeyPatch) -> None:
    """As ``python script`` does, but for modules beside it, which are forgotten afterwards."""
    before = set(sys.modules)
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(script), "__doc__": None}
    module = type(sys)("__main__")
    module.__dict__.update(namespace)
    patch.setitem(sys.modules, "__main__", module)  # where dataclasses look for it
    try:
        exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), module.__dict__)
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == script.parent:
                del sys.modules[name]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_to_a_file_has_one(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    files = [target for target in targets if not target.startswith("http")]
    assert [target for target in files if not (document.parent / target).is_file()] == []


def anchors(document: Path) -> set[str]:
    """Of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_to_a_section_has_one() -> None:
    links = [
        (document, file, anchor)
        for document in DOCUMENTS
        for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text(encoding="utf-8"))
    ]
    assert len(links) > 5
    missing = [
        (name_of(document), file, anchor)
        for document, file, anchor in links
        if anchor not in anchors(document.parent / file if file else document)
    ]
    assert missing == []


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_every_named_file_of_the_experiments_is_there() -> None:
    named = {name for path in DOCUMENTS for name in re.findall(r"experiments/[\w/]+\.(?:py|yaml)", path.read_text())}
    assert {"experiments/idlg/table1.py", "experiments/idlg/mnist.yaml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert [name_of(document) for document in DOCUMENTS if "@@" in document.read_text(encoding="utf-8")] == []
