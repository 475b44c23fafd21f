from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from leakage.condensation import SyntheticSet
from leakage.models import ConvNet

from .conftest import load

SMALL = [
    "--dataset", "sample", "--iterations", "1", "--networks", "2", "--epochs", "2", "--moments", "0",
    "--accelerator", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def table2() -> ModuleType:
    return load("condensation/table2.py")


@pytest.fixture
def small_network(table2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own network takes too long for tests."""
    options: dict[str, Any] = {"network": ConvNet(width=4), "enable_progress_bar": False}
    monkeypatch.setattr(table2, "condense", partial(table2.condense, **options))


@pytest.fixture
def asked(table2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the script asks `condense` for, which does nothing."""
    seen: dict[str, Any] = {}

    def condense(methods: list[str], data: object, output: Path, **options: Any) -> list[Any]:
        seen.update(options, methods=methods, data=data, output=output)
        return []

    monkeypatch.setattr(table2, "condense", condense)
    return seen


def refused(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        script.main(arguments)
    if isinstance(end.value.code, str):
        return end.value.code
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("small_network")
def test_runs_refuses_to_overwrite_and_resumes(
    table2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    table2.main([*SMALL, "--method", "dc", "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("dc  1 ") for line in lines)
    assert all(str(output / name) in lines and (output / name).exists() for name in table2.FILES)
    (row,) = json.loads((output / "summary.json").read_text())
    assert (row["method"], row["dataset"], row["images_per_class"], row["iterations"]) == ("dc", "sample", 1, 1)
    assert row["networks"] == 2
    assert row["published_accuracy"] is None, "the sample is in no paper"
    low, high = row["accuracy_ci"]
    assert low <= row["accuracy_mean"] <= high
    assert len(SyntheticSet.load(output / "synthetic.safetensors")) == 10

    said = refused(table2, capsys, *SMALL, "--output", str(output))
    assert f"Expected `--output` to be a folder without results, but got '{output}'. Add --resume" in said
    said = refused(table2, capsys, *SMALL, "--loops", "2", "1", "--output", str(output), "--resume")
    assert "Expected" in said
    assert "`condensation.loops`: None there, [2, 1] here" in said

    table2.main([*SMALL, "--method", "random", "dc", "--output", str(output), "--resume"])
    rows = json.loads((output / "summary.json").read_text())
    assert [row["method"] for row in rows] == ["random", "dc"]
    assert rows[1] == row, "taken from disk"


@pytest.mark.usefixtures("small_network")
def test_without_condensation_there_is_no_curve(
    table2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table2.main([*SMALL, "--method", "random", "full", "--full-epochs", "1", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "synthetic.png") in lines
    assert str(tmp_path / "accuracy.png") not in lines
    assert not (tmp_path / "accuracy.png").exists()
    random, full = json.loads((tmp_path / "summary.json").read_text())
    assert (random["images_per_class"], full["images_per_class"]) == (1, None)
    assert random["iterations"] is full["iterations"] is None


def test_every_option_arrives(table2: ModuleType, tmp_path: Path, asked: dict[str, Any]) -> None:
    table2.main(
        [
            "--dataset", "sample", "--images-per-class", "10", "--method", "dsa", "fast", "dsa", "--iterations", "7",
            "--loops", "2", "3", "--cache", "kept", "--sets", "4", "--evaluation", "dsa", "dc", "dsa",
            "--budget", "2.5", "--factor", "2", "--batch-size", "16",
            "--networks", "3", "--moments", "--epochs", "40", "--full-epochs",
            "6", "--seed", "5", "--precision", "64-true", "--test-precision", "bf16-mixed", "--held-out", "0.1",
            "--accelerator", "cpu", "--resume", "--output", str(tmp_path),
        ]
    )  # fmt: skip
    data = asked.pop("data")
    assert (data.name, data.seed) == ("sample", 5)
    assert asked == {
        "methods": ["dsa", "fast"],
        "output": tmp_path,
        "images_per_class": 10,
        "sets": 4,
        "evaluations": ["dsa", "dc"],
        "iterations": 7,
        "factor": 2,
        "batch_size": 16,
        "budget": 2.5,
        "loops": (2, 3),
        "networks": 3,
        "moments": [],
        "held_out": 0.1,
        "epochs": 40,
        "test_precision": "bf16-mixed",
        "full_epochs": 6,
        "cache": Path("kept"),
        "published": {},
        "seed": 5,
        "resume": True,
        "accelerator": "cpu",
        "devices": 1,
        "precision": "64-true",
    }


def test_by_default_as_in_the_first_paper(table2: ModuleType, tmp_path: Path, asked: dict[str, Any]) -> None:
    table2.main(["--dataset", "sample", "--held-out", "0", "--output", str(tmp_path)])
    assert (asked["methods"], asked["evaluations"], asked["sets"], asked["epochs"]) == (["dc"], ["dc"], 1, None)
    assert asked["held_out"] is asked["budget"] is asked["moments"] is None


def test_a_folder_that_holds_the_data_set_of_the_paper(
    table2: ModuleType, tmp_path: Path, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "photos" / part / str(label)
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (25 * label, 200 - 9 * label, 50 + label)).save(folder / "1.png")
    given = ["--dataset", str(tmp_path / "photos"), "--images-per-class", "10", "--output", str(tmp_path / "out")]
    table2.main([*given, "--benchmark", "cifar10"])
    assert asked["published"] == {"dc": 0.449, "dsa": 0.521}
    data = asked["data"]
    assert (data.name, data.std, len(data.train), len(data.test)) == ("cifar10", (0.2023, 0.1994, 0.2010), 10, 10)
    assert "dc on cifar10, 10 per class" in capsys.readouterr().out
    table2.main(given)
    assert (asked["published"], asked["data"].name) == ({}, "photos")


@pytest.mark.parametrize(
    ("dataset", "images_per_class", "expected"),
    [
        ("mnist", 1, {"dc": 91.7, "dsa": 88.7}),
        ("mnist", 10, {"dc": 97.4, "dsa": 97.8}),
        ("mnist", 50, {"dc": 98.8, "dsa": 99.2}),
        ("fashion_mnist", 1, {"dc": 70.5, "dsa": 70.6}),
        ("fashion_mnist", 10, {"dc": 82.3, "dsa": 84.6}),
        ("fashion_mnist", 50, {"dc": 83.6, "dsa": 88.7}),
        ("svhn", 1, {"dc": 31.2, "dsa": 27.5}),
        ("svhn", 10, {"dc": 76.1, "dsa": 79.2}),
        ("svhn", 50, {"dc": 82.3, "dsa": 84.4}),
        ("cifar10", 1, {"dc": 28.3, "dsa": 28.8}),
        ("cifar10", 10, {"dc": 44.9, "dsa": 52.1}),
        ("cifar10", 50, {"dc": 53.9, "dsa": 60.6}),
        ("cifar100", 1, {"dc": 12.8, "dsa": 13.9}),
        ("cifar100", 10, {"dc": 25.2, "dsa": 32.3}),
        ("cifar100", 50, {}),
        ("mnist", 20, {}),
        ("sample", 1, {}),
    ],
)
def test_published_figures(table2: ModuleType, dataset: str, images_per_class: int, expected: dict[str, float]) -> None:
    found = table2.published(dataset, images_per_class)
    assert found == {method: pytest.approx(accuracy / 100) for method, accuracy in expected.items()}


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "0"], "Expected `networks` to be a whole number of at least 1, but got 0"),
        (["--images-per-class", "2"], "Expected `loops` (outer, inner) with images_per_class=2"),
        (["--budget", "5"], "Expected `budget` or `iterations`, but got both, 5.0 and 1"),
        (["--sets", "0"], "Expected `sets` to be a whole number of at least 1, but got 0"),
    ],
)
def test_refuses_before_anything_is_run(
    table2: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    said = refused(table2, capsys, *SMALL, *arguments, "--output", str(tmp_path / "out"))
    assert said.startswith("table2.py: error: Expected ")
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist', 'cifar10', 'cifar100'"),
        (["--dataset", "sample", "--method", "idc"], "invalid choice: 'idc' (choose from"),
        (["--dataset", "sample", "--root", "."], "Expected no `root` with 'sample', but got ."),
        (
            ["--dataset", "sample", "--benchmark", "mnist"],
            "Expected no `benchmark` with 'sample', which is not a folder",
        ),
        (["--dataset", "sample", "--evaluation", "idc"], "invalid choice: 'idc' (choose from"),
        (["--dataset", "mnist", "--image-size", "9"], "Expected no `image_size` with 'mnist', but got 9"),
        (["--dataset", "sample", "--output", "file/x"], "Expected `output` to be a folder that can be written"),
    ],
)
def test_refuses_at_once(
    table2: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(table2, "condense", None)
    output = [] if "--output" in arguments else ["--output", "out"]
    assert message in refused(table2, capsys, *arguments, *output)
