"""`table.py` of Inverting Gradients: its rows, marks, pictures, networks and refusals."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from leakage.datamodules import GroundTruth, LabelledImages
from leakage.inversion.reconstruction import Reconstruction

FEW = ["--dataset", "sample", "--victims", "3", "--others", "40", "--accelerator", "cpu"]
COLUMNS = {
    "attack", "protocol", "network", "activation", "epochs", "test_accuracy", "images", "labels", "labels_revealed",
    "local_steps", "victims", "psnr_mean", "psnr_ci", "ssim_mean", "exact", "exact_ci", "identified", "identified_ci",
    "identified_features", "others", "baseline_grey", "baseline_mean_colour", "baseline_nearest",
    "below", "label_accuracy", "iterations",
    "seconds_per_victim", "published_psnr", "learning_rate_error",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(inverting: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("table")
    attacks = ["--attacks", "idlg", "inverting_gradients", "--iterations", "40", "--network", "lenet"]
    inverting.main([*FEW, *attacks, "--output", str(output)])
    return output, json.loads((output / "summary.json").read_text())


def test_a_row_for_each_attack_worked_out_from_its_reconstructions(done: tuple[Path, list[dict[str, Any]]]) -> None:
    output, rows = done
    assert [row["attack"] for row in rows] == ["idlg", "inverting_gradients"]
    data = LabelledImages("sample")
    data.setup("fit")
    public = data.train.images.float() / 255
    tests = data.test.images.float() / 255
    for row in rows:
        assert row.keys() == COLUMNS
        found = Reconstruction.load(output / "attacks" / row["attack"] / "reconstructions" / "part_0000.safetensors")
        assert (row["victims"], row["images"], row["label_accuracy"]) == (3, 1, 1.0)
        assert 40 <= row["iterations"] <= 42, "a line search may end its step"
        # The truth is the test image for which the score is that of the victims' table.
        lines = (output / "attacks" / row["attack"] / "victims.csv").read_text().splitlines()
        header, *values = [line.split(",") for line in lines]
        mse = torch.tensor([float(line[header.index("mse")]) for line in values])
        ids = [int(line[header.index("victim")]) for line in values]
        images = found.select(torch.tensor([found.ids.tolist().index(number) for number in ids])).images[:, 0]
        errors = (images[:, None] - tests[None]).square().mean((2, 3, 4))
        nearest = (errors - mse[:, None]).abs().argmin(1)
        torch.testing.assert_close(errors.gather(1, nearest[:, None])[:, 0], mse, rtol=1e-4, atol=1e-7)
        truth = tests[nearest]
        assert row["psnr_mean"] == pytest.approx(float(-10 * mse.log10().mean()), rel=1e-4)
        grey = -10 * (truth - 0.5).square().mean((1, 2, 3)).log10()
        assert row["baseline_grey"] == pytest.approx(float(grey.mean()), rel=1e-4)
        best = (truth[:, None] - public[None]).square().mean((2, 3, 4)).amin(1)
        assert row["baseline_nearest"] == pytest.approx(float(-10 * best.log10().mean()), rel=1e-4)
        names = [name for name in ("grey", "mean_colour", "nearest") if row["psnr_mean"] <= row[f"baseline_{name}"]]
        assert row["below"] == names
        assert row["exact"] == float((mse < 1e-6).double().mean())
        assert row["identified_ci"][0] <= row["identified"] <= row["identified_ci"][1]
        assert row["test_accuracy"] is row["identified_features"] is row["published_psnr"] is None
    for name in ("gallery.png", "psnr_over_time.png"):
        assert (output / name).stat().st_size > 5000


def test_marks_what_shows_nothing(inverting: ModuleType, done: tuple[Path, list[dict[str, Any]]]) -> None:
    _, rows = done
    row = inverting.TableRow(**rows[0] | {"below": ["grey"], "psnr_ci": (math.nan, math.nan), "published_psnr": 18.0})
    fine = inverting.TableRow(**rows[0] | {"attack": "gauss_newton", "below": []})
    text = inverting.format_table([row, fine])
    assert "iDLG * " in text
    assert "* iDLG does not beat grey, so it demonstrates no leakage." in text
    assert "Gauss-Newton  " in text
    assert "18.0 dB" in text
    labels = inverting.plot_time([row, fine], "").axes[0].get_legend_handles_labels()[1]
    assert {"iDLG, below a baseline", "Gauss-Newton", "grey", "nearest training image"} <= set(labels)


def test_steps_whose_rate_and_order_are_not_told(inverting: ModuleType, tmp_path: Path) -> None:
    options = ["--network", "lenet", "--images", "2", "--local-steps", "2", "--local-batch-size", "1", "--shuffle"]
    options += ["--hide-learning-rate", "--attacks", "idlg", "--iterations", "30", "--victims", "2"]
    inverting.main([*FEW, *options, "--output", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 < row["learning_rate_error"] < 0.5


def test_a_trained_network_and_several_images_and_steps(inverting: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--network", "resnet20", "--epochs", "1", "--train-images", "64", "--networks", str(tmp_path / "kept")]
    options += ["--images", "2", "--labels", "distinct", "--local-steps", "2", "--infer-labels", "--lanes", "2"]
    options += ["--attacks", "inverting_gradients", "--iterations", "3", "--victims", "2"]
    arguments = [*FEW, *options, "--output", str(output)]
    inverting.main(arguments)
    (row,) = json.loads((output / "summary.json").read_text())
    assert (row["epochs"], row["images"], row["labels"], row["local_steps"]) == (1, 2, "distinct", 2)
    assert row["learning_rate_error"] is None
    assert row["labels_revealed"] is False
    assert 0 <= row["test_accuracy"] <= 1
    assert 0 <= row["identified_features"] <= 1
    with pytest.raises(SystemExit):
        inverting.main(arguments)
    inverting.main([*arguments, "--resume"])
    assert json.loads((output / "summary.json").read_text()) == [row]


def test_an_attack_by_a_generator(inverting: ModuleType, tmp_path: Path) -> None:
    options = ["--network", "lenet", "--attacks", "gias", "--iterations", "2", "--generator-epochs", "1"]
    inverting.main([*FEW, *options, "--networks", str(tmp_path / "kept"), "--output", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert row["attack"] == "gias"


def test_networks_are_those_that_are_told(inverting: ModuleType) -> None:
    networks = sys.modules[inverting.make_network.__module__].NETWORKS
    sizes = {
        name: sum(parameter.numel() for parameter in make(3, 32, 10).parameters()) for name, make in networks.items()
    }
    assert (sizes["lenet"], sizes["convnet"], sizes["resnet20"], sizes["resnet20x4"]) == (
        15_826, 24_522, 272_474, 4_327_754
    )  # fmt: skip
    assert sizes.keys() == inverting.NETWORKS_WRITTEN.keys()


def test_batch_norm_in_training_mode_knows_no_statistics(inverting: ModuleType) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    assert not inverting.has_statistics(model.train())
    assert inverting.has_statistics(model.eval())
    assert not inverting.has_statistics(nn.Flatten().eval())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--network", "alexnet"], "invalid choice: 'alexnet'"),
        (["--others", "5000"], "Expected `--others` of at most 800, the training images of 'sample', but got 5000"),
        (["--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        (["--images", "11", "--labels", "distinct"], "Expected at most 10 images for each victim"),
        (["--local-steps", "2", "--local-learning-rate", "0"], "Expected `local_learning_rate` to be positive"),
        (["--network", "vit", "--activation", "relu"], "Expected no `--activation` with 'vit', which has only GELU"),
        (["--iterations", "0"], "Expected `steps` to be a whole number of at least 1, but got 0"),
    ],
)
def test_refuses(
    inverting: ModuleType, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        inverting.main([*FEW, *options, "--output", str(tmp_path)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_victims_hold_test_images(inverting: ModuleType, tmp_path: Path) -> None:
    given = inverting._parser().parse_args([*FEW, "--network", "lenet", "--output", str(tmp_path)])
    table = inverting.Table(given)
    victims = inverting.make_victims(given, table.data, inverting.make_network(given, table.data, 0))
    victims.setup("fit")
    truth = GroundTruth.cat(list(victims.val_dataloader())).images[:, 0]
    tests = table.data.test.images.float() / 255
    assert bool(((truth[:, None] - tests[None]).abs().amax((2, 3, 4)) < 1e-6).any(1).all())
    assert victims.own_weights
