from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from leakage.condensation import Recipe, SyntheticSet, evaluate, random_images
from leakage.datamodules import LabelledImages
from leakage.models import MLP, ConvNet, draw_state

from .conftest import load

SMALL = ["--networks", "2", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def cross() -> ModuleType:
    return load("condensation/cross_architecture.py")


@pytest.fixture(autouse=True)
def small_networks(cross: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others take too long for tests."""
    monkeypatch.setitem(cross.ARCHITECTURES, "convnet", lambda *shape: ConvNet(*shape, width=4))
    monkeypatch.setitem(cross.ARCHITECTURES, "mlp", lambda *shape: MLP(*shape, width=8))
    monkeypatch.setattr(cross, "evaluate", lambda *given, **options: evaluate(*given, **{**options, "progress": False}))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved set of two images per class."""
    path = tmp_path_factory.mktemp("saved") / "dc" / "synthetic.safetensors"
    path.parent.mkdir()
    random_images(LabelledImages("sample"), 2, seed=7).save(path)
    return path


@pytest.fixture
def calls(cross: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is evaluated."""
    seen: list[dict[str, Any]] = []
    real = cross.evaluate

    def counted(synthetic: SyntheticSet, data: LabelledImages, **options: Any) -> Any:
        seen.append({"synthetic": synthetic, **options})
        return real(synthetic, data, **options)

    monkeypatch.setattr(cross, "evaluate", counted)
    return seen


def refused(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        script.main(arguments)
    if isinstance(end.value.code, str):
        return end.value.code
    assert end.value.code == 2
    return capsys.readouterr().err


def read(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((output / "summary.json").read_text())
    return rows


def test_tests_a_set_and_the_baseline(
    cross: ModuleType, synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--architectures", "convnet", "mlp", "--baseline", "random", "--seed", "3", "--output", str(output)]
    cross.main(["--synthetic", str(synthetic), *SMALL, *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert all(str(output / name) in lines and (output / name).is_file() for name in cross.FILES)
    assert any(line.startswith("ConvNet  dc          2 ") for line in lines)
    rows = read(output)
    assert [(row["architecture"], row["source"]) for row in rows] == [
        ("convnet", "dc"), ("convnet", "random"), ("mlp", "dc"), ("mlp", "random"),
    ]  # fmt: skip
    data = LabelledImages("sample")
    sets = {"dc": SyntheticSet.load(synthetic), "random": random_images(data, 2, seed=3)}
    models = {"convnet": ConvNet(width=4), "mlp": MLP(width=8)}
    for row in rows:
        expected = evaluate(
            sets[row["source"]], data, network=models[row["architecture"]],
            networks=2, epochs=2, seed=3, device="cpu", progress=False,
        )  # fmt: skip
        assert row["accuracy_mean"] == expected.mean
        assert row["accuracy_std"] == expected.std
        assert tuple(row["accuracy_ci"]) == expected.interval
        assert (row["dataset"], row["images_per_class"], row["networks"]) == ("sample", 2, 2)
        assert row["seconds"] > 0


def test_resumes_what_is_done_and_nothing_else(
    cross: ModuleType,
    synthetic: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--synthetic", str(synthetic), *SMALL, "--output", str(tmp_path / "out"), "--architectures"]
    counted = cross.evaluate

    def stopped(*given: Any, **options: Any) -> Any:
        if isinstance(options["network"], MLP):
            raise KeyboardInterrupt
        return counted(*given, **options)

    monkeypatch.setattr(cross, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        cross.main([*arguments, "convnet", "mlp"])
    (first,) = read(tmp_path / "out")
    assert first["architecture"] == "convnet", "written before the next began"
    assert (tmp_path / "out" / "accuracy.png").is_file()

    monkeypatch.setattr(cross, "evaluate", counted)
    said = refused(cross, capsys, *arguments, "convnet")
    assert "Expected `--output` to be a folder without results" in said
    assert "Add --resume" in said
    calls.clear()
    cross.main([*arguments, "mlp", "convnet", "--resume"])
    assert [type(call["network"]) for call in calls] == [MLP]
    rows = read(tmp_path / "out")
    assert [row["architecture"] for row in rows] == ["mlp", "convnet"]
    assert rows[1] == first, "taken from disk"

    for options, differing in (
        (["--seed", "1"], "`seed`: 0 there, 1 here"),
        (["--epochs", "3"], "`epochs`: 2 there, 3 here"),
        (["--evaluation", "dsa"], "`evaluation`: 'dc' there, 'dsa' here"),
    ):
        assert differing in refused(cross, capsys, *arguments, "convnet", "--resume", *options)
    other = tmp_path / "dc" / "synthetic.safetensors"
    other.parent.mkdir()
    random_images(LabelledImages("sample"), 2, seed=8).save(other)
    assert "`set`: " in refused(cross, capsys, *arguments, "convnet", "--resume", "--synthetic", str(other))
    assert len(calls) == 1, "nothing more was run"


def test_a_folder_of_table2(
    cross: ModuleType, synthetic: Path, tmp_path: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the first set of each method is tested."""
    folder = tmp_path / "table"
    for method, seed in (("dc", 0), ("random", 9), ("random", 10)):
        (folder / method / f"seed_{seed}").mkdir(parents=True)
    for file in ("dc/seed_0", "random/seed_9", "."):
        shutil.copyfile(synthetic, folder / file / "synthetic.safetensors")
    (folder / "random" / "seed_10" / "synthetic.safetensors").touch()
    (folder / "full").mkdir()
    arguments = ["--networks", "1", "--epochs", "1", "--device", "cpu", "--architectures", "mlp"]
    arguments += ["--baseline", "random"]
    cross.main(["--synthetic", str(folder), *arguments, "--output", str(tmp_path / "out")])
    rows = read(tmp_path / "out")
    assert [row["source"] for row in rows] == ["dc", "random"], "random is in the folder already"
    assert rows[0]["accuracy_mean"] == rows[1]["accuracy_mean"]
    assert rows[0]["accuracy_std"] is None, "of a single network"
    calls.clear()
    cross.main(["--synthetic", str(folder), *arguments, "--output", str(tmp_path / "out"), "--resume"])
    assert not calls
    assert read(tmp_path / "out") == rows


@pytest.mark.parametrize(
    ("method", "asked", "expected"),
    [
        ("fast", [], "dc"),
        ("dsa", [], "dsa"),
        ("dsa", ["--evaluation", "dc"], "dc"),
        ("fast", ["--evaluation", "dsa"], "dsa"),
    ],
)
def test_evaluation_of_the_networks(
    cross: ModuleType, tmp_path: Path, calls: list[dict[str, Any]], method: str, asked: list[str], expected: str
) -> None:
    """A set that goes by another name is known by its recipe."""
    path = tmp_path / "sample_2.safetensors"
    replace(random_images(LabelledImages("sample"), 2), recipe=Recipe(method)).save(path)
    arguments = [*SMALL, "--architectures", "mlp", "--output", str(tmp_path / "out")]
    cross.main(["--synthetic", str(path), *arguments, *asked])
    assert [call["augmentation"] for call in calls] == [expected]
    assert read(tmp_path / "out")[0]["source"] == method


def test_a_folder_that_holds_the_data_set(cross: ModuleType, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 16), (100 * label + 10, 60 * label, 99 - label)).save(folder / "1.png")
    data = LabelledImages(tmp_path / "photos", benchmark="cifar10")
    random_images(data, 1).save(tmp_path / "s.safetensors")
    arguments = ["--synthetic", str(tmp_path / "s.safetensors"), "--dataset", str(tmp_path / "photos")]
    cross.main([*arguments, *SMALL, "--architectures", "mlp", "--output", str(tmp_path / "out")])
    assert read(tmp_path / "out")[0]["dataset"] == "cifar10"


@pytest.mark.parametrize(("shape", "count"), [((1, 28, 28), 61706), ((3, 32, 32), 62006), ((1, 16, 20), None)])
def test_lenet_with_relu(cross: ModuleType, shape: tuple[int, int, int], count: int | None) -> None:
    """The numbers of parameters are those of Dataset Condensation's code."""
    network = cross.lenet_relu(shape[0], shape[1:], 10)
    assert network(torch.zeros(2, *shape)).shape == (2, 10)
    if count is not None:
        assert sum(parameter.numel() for parameter in network.parameters()) == count
    first = draw_state(network, 0)
    assert not torch.equal(first["0.weight"], draw_state(network, 1)["0.weight"]), "it can be drawn anew"
    with pytest.raises(ValueError, match=r"Expected images of at least 16 pixels per side .* but got \(15, 20\)"):
        cross.lenet_relu(1, (15, 20), 10)


def test_lenet_with_relu_learns(cross: ModuleType) -> None:
    data = LabelledImages("sample")
    network = cross.lenet_relu(1, (28, 28), 10)
    options = {"network": network, "networks": 1, "device": "cpu", "progress": False}
    assert evaluate(random_images(data, 10), data, epochs=150, **options).mean > 0.4


def rows_of(cross: ModuleType) -> list[Any]:
    return [
        cross.CrossRow("convnet", "sample", 1, "dc", 0.70, 0.01, (0.68, 0.72), 5, 10.0),
        cross.CrossRow("convnet", "sample", 1, "random", 0.40, 0.02, (0.36, 0.44), 5, 10.0),
        cross.CrossRow("mlp", "sample", 1, "dc", 0.60, math.nan, (math.nan, math.nan), 1, 5.0),
    ]


def test_the_picture(cross: ModuleType) -> None:
    """Also of a run that is half done."""
    (axes,) = cross.plot(rows_of(cross)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ConvNet", "MLP"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dc", "random"]
    bars = [bar for container in axes.containers for bar in container]
    assert [bar.get_height() for bar in bars] == [0.70, 0.60, 0.40]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert centres == pytest.approx([-0.2, 0.8, 0.2])
    intervals = [line.get_ydata() for line in axes.get_lines()]
    assert [list(interval) for interval in intervals] == [[0.68, 0.72], [0.36, 0.44]]
    assert [text.get_text() for text in axes.texts] == ["70.0", "60.0", "40.0"]


def test_the_table(cross: ModuleType) -> None:
    lines = cross.format_table(rows_of(cross)).splitlines()
    assert lines[1].split() == [
        "ConvNet", "dc", "1", "70.0", "±", "1.0", "%", "[68.0,", "72.0]", "5", "10", "s",
    ]  # fmt: skip
    assert lines[3].split() == ["MLP", "dc", "1", "60.0", "%", "-", "1", "5", "s"]


def test_sets_that_do_not_fit(
    cross: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: list[dict[str, Any]]
) -> None:
    def saved(name: str, dataset: str, shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> str:
        path = tmp_path / name / "seed_0" / "synthetic.safetensors"
        SyntheticSet(
            torch.rand(classes, *shape), torch.arange(classes), (0.5,) * shape[0], (0.5,) * shape[0],
            tuple(map(str, range(classes))), dataset,
        ).save(path)  # fmt: skip
        return str(path)

    for path, message in (
        (
            saved("a", "sample", (3, 28, 28)),
            "Expected a synthetic set with the image_shape (1, 28, 28) of 'sample', but got",
        ),
        (saved("b", "sample", classes=9), "Expected a synthetic set with the num_classes 10 of 'sample', but got 9"),
        (saved("c", "sample"), "Expected a synthetic set with the class_names ('T-shirt/top', "),
        (saved("d", "photos"), "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (saved("e", ""), "Expected `--dataset`"),
    ):
        assert message in refused(cross, capsys, "--synthetic", path, *SMALL, "--output", str(tmp_path / "out"))
    said = refused(cross, capsys, "--synthetic", str(tmp_path), *SMALL, "--output", str(tmp_path / "out"))
    assert "Expected `--synthetic` to hold sets of one data set, but got {" in said
    (tmp_path / "empty").mkdir()
    said = refused(cross, capsys, "--synthetic", str(tmp_path / "empty"), *SMALL, "--output", str(tmp_path / "out"))
    assert "Expected `--synthetic` to hold <method>/seed_<seed>/synthetic.safetensors" in said
    said = refused(cross, capsys, "--synthetic", str(tmp_path / "none"), *SMALL, "--output", str(tmp_path / "out"))
    assert "Expected a safetensors file at" in said
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "0"], "Expected `networks` to be a whole number of at least 1, but got 0"),
        (["--epochs", "0"], "Expected `epochs` to be a whole number of at least 1, but got 0"),
        (["--seed", "-1"], "Expected `seed` to be a whole number of at least 0, but got -1"),
        (["--architectures", "swin"], "invalid choice: 'swin' (choose from"),
        (["--baseline", "best"], "invalid choice: 'best' (choose from"),
        (["--device", "nonsense"], "Expected `--device` to be one that torch can use, but got 'nonsense'"),
        (["--dataset", "nothing"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (["--root", "."], "Expected no `root` with 'sample', but got ."),
        (["--output", "file/x"], "Expected `output` to be a folder that can be written"),
    ],
)
def test_refuses_at_once(
    cross: ModuleType,
    synthetic: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    calls: list[dict[str, Any]],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    given = ["--synthetic", str(synthetic), "--architectures", "mlp", "--device", "cpu", "--output", "out", *arguments]
    assert message in refused(cross, capsys, *given)
    assert not (tmp_path / "out" / "summary.json").exists()
