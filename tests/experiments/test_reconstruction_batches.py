from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from leakage.datamodules import GroundTruth, Victims
from leakage.metrics import mean_interval

from .conftest import load

SMALL = ["--dataset", "sample", "--victims", "2", "--max-evaluations", "20", "--restarts", "0", "--accelerator", "cpu"]
COLUMNS = [
    "labels", "dataset", "network", "batch_size", "victims", "success", "success_ci", "mse_median", "psnr_mean",
    "psnr_ci", "ssim_mean", "ssim_ci", "label_accuracy", "label_accuracy_ci", "irec", "irec_ci", "evaluations_median",
    "seconds",
]  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("labels/reconstruction.py")


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((output / "summary.json").read_text())
    return rows


def refused(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        script.main(arguments)
    if isinstance(end.value.code, str):
        return end.value.code
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def output(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reconstruction") / "out"
    script.main([*SMALL, "--batch-sizes", "2", "1", "--output", str(output)])
    return output


def test_rows(output: Path) -> None:
    rows = rows_of(output)
    assert [(row["batch_size"], row["labels"]) for row in rows] == [
        (size, kind) for size in (1, 2) for kind in ("true", "inferred", "joint", "one-wrong")
    ]
    for row in rows:
        assert list(row) == COLUMNS
        assert (row["dataset"], row["network"], row["victims"]) == ("sample", "lenet", 2)
        assert 0 < row["evaluations_median"] <= 20
        for name in ("success", "label_accuracy", "irec"):
            assert 0 <= row[f"{name}_ci"][0] <= row[name] <= row[f"{name}_ci"][1] <= 1
        if row["labels"] in ("true", "inferred"):
            assert row["label_accuracy"] == row["irec"] == 1
        if row["labels"] == "one-wrong":
            assert row["irec"] == 1 - 1 / row["batch_size"]
            right = next(one for one in rows if (one["batch_size"], one["labels"]) == (row["batch_size"], "true"))
            assert row["psnr_mean"] < right["psnr_mean"] - 3


def test_rows_are_those_of_the_victims(script: ModuleType, output: Path) -> None:
    row = rows_of(output)[4]
    lines = [line.split(",") for line in (output / "batch_2" / "true" / "victims.csv").read_text().splitlines()]
    psnr = torch.tensor([float(line[lines[0].index("psnr")]) for line in lines[1:]])
    assert row["psnr_mean"] == pytest.approx(psnr.mean().item(), rel=1e-5)
    assert row["psnr_ci"] == pytest.approx(mean_interval(psnr), rel=1e-5)


def test_pictures(script: ModuleType, output: Path) -> None:
    assert (output / "quality.png").stat().st_size > 10_000
    assert all((output / f"batch_{size}" / "gallery.png").is_file() for size in (1, 2))
    rows = [script.Row(**row) for row in rows_of(output)]
    figure = script.plot_quality(rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["true", "inferred", "joint", "one-wrong"]
    for axes, name in zip(figure.axes, ("psnr_mean", "success"), strict=True):
        drawn = next(line for line in axes.lines if line.get_label() == "joint")
        assert list(drawn.get_ydata()) == [getattr(row, name) for row in rows if row.labels == "joint"]


def test_goes_on_and_refuses_to_overwrite(
    script: ModuleType, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SMALL, "--batch-sizes", "1", "2", "--output", str(output)]
    said = refused(script, capsys, *arguments)
    assert f"Expected `--output` to be a folder without results, but got '{output}'. Add --resume" in said
    said = refused(script, capsys, *arguments, "--resume", "--rule", "geng")
    assert "`attack.rule`: 'auto' there, 'geng' here" in said
    before = rows_of(output)
    monkeypatch.setattr("comparing.run_attack", None)
    script.main([*arguments, "--resume"])
    assert rows_of(output) == before, "taken from disk"


@pytest.mark.parametrize("num_images", [1, 3])
def test_exactly_one_label_is_wrong(script: ModuleType, num_images: int) -> None:
    victims = script.OneWrong("sample", victims=30, images=num_images, reveal_labels=True, lanes=20)
    victims.setup("fit")
    assert victims.lanes == 20
    labels = [victims.share(range(first, last)).labels for first, last in ((0, 20), (20, 30))]
    truth = GroundTruth.cat(list(victims.val_dataloader())).labels
    wrong = torch.cat(labels) != truth
    assert wrong.sum(1).tolist() == [1] * 30
    assert wrong.any(0).all(), "any image of a batch"
    assert torch.cat(labels).unique().tolist() == list(range(10))
    assert torch.equal(victims.share(range(17, 23)).labels, torch.cat(labels)[17:23]), "whatever the cohort"
    honest_victims = Victims("sample", victims=30, images=num_images, reveal_labels=True)
    honest_victims.setup("fit")
    shared, honest = victims.share(range(2)), honest_victims.share(range(2))
    assert all(torch.equal(shared.gradients[name], honest.gradients[name]) for name in honest.gradients)
    assert victims.configuration != honest_victims.configuration


def test_another_network_and_fewer_kinds(script: ModuleType, tmp_path: Path) -> None:
    arguments = ["--network", "mlp", "--labels", "inferred", "--batch-sizes", "2", "--rule", "ilrg"]
    before = torch.get_rng_state()
    script.main([*SMALL, *arguments, "--output", str(tmp_path)])
    assert torch.equal(torch.get_rng_state(), before)
    (row,) = rows_of(tmp_path)
    assert (row["network"], row["labels"], row["irec"]) == ("mlp", "inferred", 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (["--dataset", "sample", "--labels", "guessed"], "invalid choice: 'guessed' (choose from"),
        (["--dataset", "sample", "--batch-sizes", "2", "0"], "Expected `batch_sizes[1]` to be a whole number of at"),
        (["--dataset", "sample", "--victims", "501", "--batch-sizes", "1", "2"], "501 * 2 = 1002"),
        (["--dataset", "sample", "--rule", "idlg"], "Expected one image per gradient for rule='idlg', but got 2"),
        (["--dataset", "sample", "--rule", "posterior"], "invalid choice: 'posterior' (choose from"),
        (["--dataset", "sample", "--rule", "llg_plus"], "invalid choice: 'llg_plus' (choose from"),
        (["--dataset", "sample", "--max-evaluations", "0"], "Expected `max_evaluations` to be a whole number of at"),
        (["--dataset", "mnist", "--image-size", "9"], "Expected no `image_size` with 'mnist', but got 9"),
        (["--dataset", "sample", "--output", "file/x"], "Expected `output` to be a folder that can be written"),
    ],
)
def test_refuses_at_once(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, "compare", None)
    output = [] if "--output" in arguments else ["--output", "out"]
    assert message in refused(script, capsys, *arguments, *output)
