from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchvision.utils import save_image

from leakage.comparison import FILES
from leakage.inversion.reconstruction import Reconstruction


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images in ImageFolder layout, of two sizes."""
    generator = torch.Generator().manual_seed(0)
    for index, size in enumerate((16, 16, 20)):
        folder = tmp_path / "photos" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, size, size, generator=generator), folder / f"{index}.png")
    return tmp_path / "photos"


def refused(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        script.main(arguments)
    if isinstance(end.value.code, str):
        return end.value.code
    assert end.value.code == 2
    return capsys.readouterr().err


def test_methods_of_their_own_and_a_threshold(
    table1: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--dataset", "sample", "--victims", "2", "--output", str(output), "--accelerator", "cpu"]
    table1.main([*arguments, "--methods", "rgap", "gauss_newton", "--threshold", "1e-6"])
    said = capsys.readouterr().out
    assert "MSE < 1e-6" in said
    assert "R-GAP" in said
    rows = json.loads((output / "summary.json").read_text())
    assert [(row["method"], row["success_threshold"], row["success_rate"]) for row in rows] == [
        ("rgap", 1e-6, 1.0),
        ("gauss_newton", 1e-6, 1.0),
    ]
    alone = [*arguments, "--methods", "rgap", "--protocol", "published"]
    assert "Expected `--protocol published` with one of dlg, idlg" in refused(table1, capsys, *alone)


def test_runs_refuses_to_overwrite_and_resumes(
    table1: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--dataset", "sample", "--victims", "2", "--output", str(output), "--accelerator", "cpu"]
    table1.main([*arguments, "--methods", "idlg"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("iDLG  2 ") for line in lines)
    assert all(str(output / name) in lines and (output / name).exists() for name in FILES)
    (row,) = json.loads((output / "summary.json").read_text())
    assert (row["method"], row["dataset"], row["protocol"], row["victims"]) == ("idlg", "sample", "robust", 2)
    assert row["published_label_accuracy"] is None
    assert row["label_accuracy"] == row["success_rate"] == 1.0

    said = refused(table1, capsys, *arguments, "--methods", "idlg")
    assert f"Expected `--output` to be a folder without results, but got '{output}'. Add --resume" in said
    said = refused(table1, capsys, *arguments, "--seed", "1", "--resume")
    assert "Expected" in said
    assert "`attack.seed`: 0 there, 1 here" in said

    table1.main([*arguments, "--methods", "dlg", "idlg", "--resume"])
    rows = json.loads((output / "summary.json").read_text())
    assert [row["method"] for row in rows] == ["dlg", "idlg"]
    assert rows[1] == row, "taken from disk"


def test_a_folder_of_images(
    table1: ModuleType,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(table1.METHODS, "idlg", lambda **kwargs: table1.IDLGAttack(**kwargs, max_evaluations=5))
    arguments = ["--dataset", str(photos), "--victims", "3", "--methods", "idlg", "--output", str(tmp_path / "out")]
    assert "Set `image_size`" in refused(table1, capsys, *arguments)
    table1.main([*arguments, "--image-size", "16", "--protocol", "published", "--lanes", "2"])
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (row["dataset"], row["protocol"], row["label_accuracy"]) == ("photos", "published", 1.0)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_precision(
    table1: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(table1.METHODS, "idlg", lambda **kwargs: table1.IDLGAttack(**kwargs, max_evaluations=5))
    arguments = ["--dataset", "sample", "--victims", "1", "--methods", "idlg", "--accelerator", "cpu"]
    table1.main([*arguments, "--precision", precision, "--output", str(tmp_path)])
    found = Reconstruction.load(tmp_path / "idlg" / "reconstructions" / "part_0000.safetensors")
    assert found.images.dtype == dtype


def test_refuses_an_unknown_accelerator(table1: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "sample", "--victims", "1", "--output", str(tmp_path), "--accelerator", "nonsense"]
    said = refused(table1, capsys, *arguments)
    assert "error: Expected options that the Trainer accepts, but got accelerator='nonsense'" in said
    assert not any(tmp_path.iterdir())


def test_published_figures(table1: ModuleType) -> None:
    assert table1.PUBLISHED == {
        "mnist": {"dlg": 0.899, "idlg": 1.0},
        "cifar100": {"dlg": 0.833, "idlg": 1.0},
        "lfw": {"dlg": 0.791, "idlg": 1.0},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "imagenet"],
            "Expected `dataset` to be one of ['mnist', 'fashion_mnist', 'cifar10', 'cifar100'",
        ),
        (["--dataset", "sample", "--protocol", "fast"], "invalid choice: 'fast' (choose from"),
        (["--dataset", "sample", "--methods", "ig"], "invalid choice: 'ig' (choose from"),
        (["--dataset", "sample", "--victims", "1001"], "at most the 1000 images of the data set"),
        (["--dataset", "sample", "--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        (["--dataset", "sample", "--root", "."], "Expected no `root` with 'sample', but got ."),
        (["--dataset", "mnist", "--image-size", "9"], "Expected no `image_size` with 'mnist', but got 9"),
        (["--dataset", "lfw", "--root", "none"], "Expected the LFW faces"),
        (["--dataset", "sample", "--output", "file/x"], "Expected `output` to be a folder that can be written"),
    ],
)
def test_refuses_at_once(
    table1: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(table1, "compare", None)
    output = [] if "--output" in arguments else ["--output", "out"]
    assert message in refused(table1, capsys, *arguments, *output)
