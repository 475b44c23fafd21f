"""Synthetic sets, their files and their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from leakage import LeNet, Victim
from leakage.condensation.synthetic_set import SyntheticSet
from leakage.files.tensors import write_safetensors
from leakage.plots import figure_pixels

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
HEADER = {
    "format": "leakage.SyntheticSet",
    "version": "1",
    "mean": "[0.5]",
    "std": "[0.5]",
    "class_names": '["a", "b"]',
    "dataset": '""',
}


def make(**changes: Any) -> SyntheticSet:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {
        "images": torch.randn(6, 3, 4, 5, generator=generator),
        "labels": torch.tensor([0, 0, 1, 1, 2, 2]),
        "mean": MEAN,
        "std": STD,
        "class_names": ("T-shirt/top", "bag", "cat"),
        "dataset": "toys",
    }
    return SyntheticSet(**(options | changes))


def data(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "name": "real",
        "image_shape": (3, 4, 5),
        "num_classes": 3,
        "class_names": ("T-shirt/top", "bag", "cat"),
        "mean": MEAN,
        "std": STD,
    }
    return SimpleNamespace(**(options | changes))


def test_what_it_holds() -> None:
    synthetic = make()
    assert (len(synthetic), synthetic.num_classes, synthetic.image_shape) == (6, 3, (3, 4, 5))
    assert make(labels=torch.tensor([0, 0, 0, 2, 2, 2])).images_per_class.tolist() == [3, 0, 3]
    image, label = synthetic.to_dataset()[3]
    assert torch.equal(image, synthetic.images[3])
    assert int(label) == 1


def test_normalised_per_channel() -> None:
    synthetic = make()
    found = synthetic.normalised()
    for channel in range(3):
        expected = (synthetic.images[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(found[:, channel], expected)


def test_file_round_trip(tmp_path: Path) -> None:
    synthetic = make()
    synthetic.save(tmp_path / "folder" / "s.safetensors")
    loaded = SyntheticSet.load(tmp_path / "folder" / "s.safetensors")
    assert torch.equal(loaded.images, synthetic.images)
    assert bool((loaded.images < 0).any()), "nothing is clamped"
    assert torch.equal(loaded.labels, synthetic.labels)
    assert (loaded.mean, loaded.std, loaded.class_names, loaded.dataset) == (
        MEAN, STD, synthetic.class_names, "toys",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(6, 4, 5)}, r"Expected `images` of shape \(M, C, H, W\).*but got \(6, 4, 5\), "),
        ({"images": torch.zeros(0, 3, 4, 5)}, r"at least one image, .* got \(0, 3, 4, 5\), "),
        ({"images": torch.zeros(6, 3, 4, 5, dtype=torch.uint8)}, "as float32 in the data's scale, but .*torch.uint8"),
        ({"images": torch.full((6, 3, 4, 5), torch.nan)}, r"got NaN or inf in classes \[0, 1, 2\]"),
        ({"labels": torch.tensor([0, 1])}, r"Expected `labels` of shape \(6,\) as int64, but got \(2,\)"),
        ({"labels": torch.zeros(6)}, r"as int64, but got \(6,\), torch.float32"),
        ({"labels": torch.tensor([0, 0, 1, 1, 2, 3])}, "from 0 to 2, the indices of `class_names`, .* but got 0 to 3"),
        ({"labels": torch.tensor([-1, 0, 1, 1, 2, 2])}, "but got -1 to 2"),
        ({"labels": torch.tensor([0, 1, 2, 0, 1, 2])}, "ascending order, but got .*with .0, 1, 2, 0, 1.*Sort images"),
        ({"mean": (0.5,)}, r"Expected `mean` with a finite number for each of 3 channels, but got \(0.5,\)"),
        ({"std": (0.5, float("nan"), 1.0)}, "Expected `std` with a finite number above 0"),
        ({"std": (0.5, 0.0, 1.0)}, r"Expected `std` with a finite number above 0 .* but got \(0.5, 0.0, 1.0\)"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_check_against_a_data_set() -> None:
    make().check(data())
    with pytest.raises(ValueError, match=r"image_shape \(1, 28, 28\) of 'real', but got \(3, 4, 5\) \(of 'toys'\)"):
        make().check(data(image_shape=(1, 28, 28)))
    with pytest.raises(ValueError, match="with the num_classes 10 of 'real', but got 3"):
        make().check(data(num_classes=10))
    with pytest.raises(ValueError, match=r"with the class_names .*'dog'\) of 'real', but got .*'cat'\)"):
        make().check(data(class_names=("T-shirt/top", "bag", "dog")))


def test_broken_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match=r"Expected a safetensors file at '.*s.safetensors'"):
        SyntheticSet.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"Expected a whole safetensors file, but got '.*truncated or of another kind"):
        SyntheticSet.load(path)
    torch.save({"images": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"pickles, such as \.pt and \.pth, are refused"):
        SyntheticSet.load(path)
    victim = Victim(LeNet(image_size=4), image_shape=(1, 4, 4))
    victim.share(torch.rand(2, 1, 1, 4, 4), torch.zeros(2, 1, dtype=torch.long)).save(path)
    with pytest.raises(ValueError, match=r"Expected format 'leakage\.SyntheticSet'.*but got 'leakage\.SharedGradient'"):
        SyntheticSet.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": "9"}, "of version 1 in the header .*of version '9'"),
        ({"mean": None}, "Expected 'mean', 'std', 'class_names' and 'dataset' in the header .* but got: 'mean'"),
        ({"std": "{"}, "in the header of .*but got"),
        ({"std": "5"}, "in the header of .*but got"),
        ({"class_names": "[1, 2]"}, r"in the header of .*but got: class_names=\[1, 2\]"),
        ({"class_names": '"ab"'}, "in the header of .*but got: class_names='ab'"),
        ({"dataset": "3"}, "in the header of .*but got: .*dataset=3"),
        ({"mean": "[0.5, 0.5]"}, "Expected a synthetic set in .*but got: Expected `mean`"),
    ],
)
def test_wrong_headers(tmp_path: Path, header: dict[str, str | None], message: str) -> None:
    path = tmp_path / "s.safetensors"
    tensors = {"images": torch.zeros(2, 1, 3, 3), "labels": torch.tensor([0, 1])}
    write_safetensors(path, "leakage.SyntheticSet", tensors, HEADER)
    SyntheticSet.load(path)
    write_safetensors(
        path,
        "leakage.SyntheticSet",
        tensors,
        {name: value for name, value in (HEADER | header).items() if value is not None},
    )
    with pytest.raises(ValueError, match=message):
        SyntheticSet.load(path)


def test_missing_tensor(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "s", "leakage.SyntheticSet", {"images": torch.zeros(2, 1, 3, 3)}, HEADER)
    with pytest.raises(ValueError, match=r"Expected tensors 'images' and 'labels' in '.*', but got \['images'\]"):
        SyntheticSet.load(tmp_path / "s")
    assert json.loads(HEADER["class_names"]) == ["a", "b"]


def test_images_are_an_image_folder(tmp_path: Path) -> None:
    synthetic = make()
    synthetic.save_images(tmp_path / "images")
    folder = ImageFolder(tmp_path / "images")
    assert folder.classes == ["T-shirt_top", "bag", "cat"]
    assert [label for _, label in folder.samples] == synthetic.labels.tolist()
    for (path, _), image in zip(folder.samples, synthetic.images, strict=True):
        with Image.open(path) as file:
            found = np.asarray(file)
        expected = (image.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)
    synthetic.save_images(tmp_path / "images")
    smaller = make(images=synthetic.images[::2], labels=synthetic.labels[::2])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    with pytest.raises(
        FileExistsError, match=r"Expected an empty folder or that of an earlier set of this size.*1.png'"
    ):
        smaller.save_images(tmp_path / "images")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("b", "a"), ["0_b", "1_a"]),
        (("a/b", "a?b"), ["0_a_b", "1_a_b"]),
        (("a", "A"), ["0_a", "1_A"]),
        (("..", "x"), ["0", "1_x"]),
        (tuple(map(str, range(11))), [f"{k:02}_{k}" for k in range(11)]),
        (tuple(map(str, range(10))), list(map(str, range(10)))),
    ],
)
def test_folders_keep_the_order_of_the_classes(tmp_path: Path, names: tuple[str, ...], folders: list[str]) -> None:
    count = len(names)
    grey = SyntheticSet(torch.rand(count, 1, 2, 2), torch.arange(count), (0.5,), (0.5,), names)
    grey.save_images(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == folders


def test_png_has_one_or_three_channels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected images of 1 or 3 channels to write as PNG, but got 2"):
        SyntheticSet(torch.zeros(1, 2, 3, 3), torch.tensor([0]), (0.0, 0.0), (1.0, 1.0), ("a",)).save_images(tmp_path)


def test_figure_has_a_row_per_class() -> None:
    """Classes are black, grey and white; the second has fewer images."""
    values = torch.tensor([-3.0, -3.0, 0.5, 7.0, 7.0])
    synthetic = SyntheticSet(
        values[:, None, None, None].expand(5, 1, 8, 8), torch.tensor([0, 0, 1, 2, 2]), (0.5,), (1.0,), ("a", "b", "c")
    )
    figure = synthetic.figure(title="Some title")
    assert figure.get_suptitle() == "Some title"
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["a", "b", "c"]
    assert [round(label.get_position()[1], 1) for label in labels] == [4.5, 13.5, 22.5]
    (image,) = figure.axes[0].images
    grid = image.get_array()
    assert grid is not None
    assert grid.shape == (27, 18)
    assert set(grid[:8, :8].flatten()) == set(grid[:8, 9:17].flatten()) == {0}
    assert set(grid[9:17, :8].flatten()) == {128}
    assert set(grid[9:17, 9:17].flatten()) == set(grid[8].flatten()) == set(grid[18:].flatten()) == {255}
    assert figure_pixels(figure).min() == 0


def test_figure_shows_some_of_many_images() -> None:
    colour = make(labels=torch.tensor([0, 0, 0, 0, 1, 2]))
    (image,) = colour.figure(images_per_class=3).axes[0].images
    grid = image.get_array()
    assert grid is not None
    assert grid.shape == (15, 18, 3)
    with pytest.raises(ValueError, match="Expected `images_per_class` to be a whole number of at least 1, but got 0"):
        colour.figure(images_per_class=0)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_check_against_other_images_of_the_same_kind(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"with the {name} .*Give the data set, and the share of its images, that it was made from"
    ):
        make().check(data(**{name: (0.5, 0.4, 0.301)}))
    make().check(data(**{name: tuple(value + 1e-6 for value in (MEAN if name == "mean" else STD))}))
