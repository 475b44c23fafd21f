"""`signs.py`: how many signs of a gradient differ between images."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from leakage.datamodules import GroundTruth, Victims
from leakage.models import LeNet

FEW = ["--dataset", "sample", "--victims", "2"]


def test_more_signs_differ_further_away_and_none_of_the_last_layer(signs: ModuleType, tmp_path: Path) -> None:
    signs.main([*FEW, "--output", str(tmp_path)])
    far, near, other = json.loads((tmp_path / "signs.json").read_text())
    size = sum(parameter.numel() for parameter in LeNet().parameters())
    assert {row["entries"] for row in (far, near, other)} == {size}
    assert other["last_layer_entries"] == 5890
    assert (far["mse"], near["mse"]) == pytest.approx((1e-2, 1e-3))
    assert 0 < near["other_layers"] < far["other_layers"] < other["other_layers"] < size - 5890
    assert [row["last_layer"] for row in (far, near, other)] == [0, 0, 0], "features are positive: only the class shows"
    assert near["least"] <= near["other_layers"] <= near["most"]


def test_true_images_have_the_true_signs(signs: ModuleType) -> None:
    victims = Victims("sample", victims=3, weights="own")
    victims.prepare_data()
    victims.setup("fit")
    truth = GroundTruth.cat(list(victims.val_dataloader()))
    counted = signs.Signs(victims, truth)
    same = counted.compare("the same", truth.images)
    assert (same.mse, same.most, same.victims) == (0, 0, 3)
    moved = torch.cat([truth.images[:2], 1 - truth.images[2:]])
    one = counted.compare("the last one inverted", moved)
    assert one.least == 0 < one.most == pytest.approx(3 * (one.last_layer + one.other_layers))


def test_refusals(signs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked, message in (
        (["--measured", "0"], "`measured` to be a whole number of at least 1"),
        (["--results", str(tmp_path / "none")], "none"),
    ):
        with pytest.raises(SystemExit) as ended:
            signs.main([*FEW, *asked, "--output", str(tmp_path / "out")])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
