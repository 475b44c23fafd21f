from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from .conftest import load


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("idlg/front_picture.py")


def test_gradient_has_colours_by_sign(script: ModuleType) -> None:
    picture = script.gradient_picture(torch.tensor([-1.0, 0.0, 0.0, 1.0, 0.5]))
    assert picture.shape == (3, 2, 2)
    torch.testing.assert_close(picture[:, 0, 0], script.BLUE)
    torch.testing.assert_close(picture[:, 0, 1], script.WHITE)
    torch.testing.assert_close(picture[:, 1, 1], script.RED)


@pytest.mark.slow
def test_picture_is_drawn(script: ModuleType, tmp_path: Path) -> None:
    [(images, captions)] = script.rows_of("sample", 1, seed=0)
    *_, rebuilt, truth = images
    assert all(image is not None for image in images)
    assert (rebuilt - truth).square().mean() < 1e-3
    assert (images[1] - truth).square().mean() > 1e-2, "the search begins far away"
    assert captions[0] == "13,426 numbers"
    script.main(["--datasets", "sample", "--victims", "1", "--output", str(tmp_path / "front.png")])
    assert Image.open(tmp_path / "front.png").size[0] > 500


def test_a_number_for_each_data_set(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--datasets", "sample", "--victims", "1", "2", "--output", str(tmp_path / "front.png")])
    assert "Expected `--victims` with a number for each data set, but got [1, 2]." in capsys.readouterr().err
