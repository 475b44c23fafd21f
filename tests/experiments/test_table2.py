from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from leakage.condensation import SiameseAugmentation, SyntheticSet
from leakage.datamodules import LabelledImages
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
    said = refused(table2, capsys, *SMALL, "--seed", "1", "--output", str(output), "--resume")
    assert "Expected" in said
    assert "`condensation.seed`: 0 there, 1 here" in said

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
            "--loops", "2", "3", "--cache", "kept",
            "--networks", "3", "--moments", "--epochs", "40", "--full-epochs", "6", "--seed", "5", "--precision",
            "bf16-mixed", "--accelerator", "cpu", "--resume", "--output", str(tmp_path),
        ]
    )  # fmt: skip
    data = asked.pop("data")
    assert (data.name, data.seed) == ("sample", 5)
    assert asked == {
        "methods": ["dsa", "fast"],
        "output": tmp_path,
        "images_per_class": 10,
        "iterations": 7,
        "loops": (2, 3),
        "networks": 3,
        "moments": [],
        "epochs": 40,
        "augmentation": None,
        "full_epochs": 6,
        "cache": Path("kept"),
        "published": {},
        "seed": 5,
        "resume": True,
        "accelerator": "cpu",
        "devices": 1,
        "precision": "bf16-mixed",
    }


@pytest.mark.parametrize(
    ("dataset", "flags", "augments"),
    [
        ("mnist", [], True),
        ("mnist", ["--no-augment-test"], False),
        ("sample", [], False),
        ("sample", ["--augment-test"], True),
    ],
)
def test_networks_on_mnist_are_trained_with_augmentation(
    table2: ModuleType,
    tmp_path: Path,
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    flags: list[str],
    augments: bool,
) -> None:
    sample = LabelledImages("sample")
    monkeypatch.setattr(table2, "LabelledImages", lambda name, **_: sample)
    table2.main(["--dataset", dataset, *flags, "--output", str(tmp_path)])
    augmentation = asked["augmentation"]
    assert (augmentation is not None) == augments
    if augmentation is not None:
        assert vars(augmentation) == vars(SiameseAugmentation.mnist_evaluation())
    assert asked["published"] == ({"dc": 0.917, "dsa": 0.887, "fast": 0.917} if dataset == "mnist" else {})


@pytest.mark.parametrize(
    ("dataset", "images_per_class", "expected"),
    [
        ("mnist", 1, {"dc": 91.7, "dsa": 88.7, "fast": 91.7}),
        ("mnist", 10, {"dc": 97.4, "dsa": 97.8, "fast": 97.4}),
        ("mnist", 50, {"dc": 98.8, "dsa": 99.2, "fast": 98.8}),
        ("fashion_mnist", 1, {"dc": 70.5, "dsa": 70.6, "fast": 70.5}),
        ("fashion_mnist", 10, {"dc": 82.3, "dsa": 84.6, "fast": 82.3}),
        ("fashion_mnist", 50, {"dc": 83.6, "dsa": 88.7, "fast": 83.6}),
        ("svhn", 1, {"dc": 31.2, "dsa": 27.5, "fast": 31.2}),
        ("svhn", 10, {"dc": 76.1, "dsa": 79.2, "fast": 76.1}),
        ("svhn", 50, {"dc": 82.3, "dsa": 84.4, "fast": 82.3}),
        ("cifar10", 1, {"dc": 28.3, "dsa": 28.8, "fast": 28.3}),
        ("cifar10", 10, {"dc": 44.9, "dsa": 52.1, "fast": 44.9}),
        ("cifar10", 50, {"dc": 53.9, "dsa": 60.6, "fast": 53.9}),
        ("cifar100", 1, {"dc": 12.8, "dsa": 13.9, "fast": 12.8}),
        ("cifar100", 10, {"dc": 25.2, "dsa": 32.3, "fast": 25.2}),
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
        (["--dataset", "sample", "--method", "dm"], "invalid choice: 'dm' (choose from"),
        (["--dataset", "sample", "--root", "."], "Expected no `root` with 'sample', but got ."),
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
