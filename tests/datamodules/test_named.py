from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

from leakage import datamodules
from leakage.datamodules import MNIST, ImageFolder, ImageFolderVictims, LabelledDataModule, LFWVictims, MNISTVictims
from leakage.datamodules.images import ImageVictims
from leakage.datamodules.named import DATASETS, LABELLED_DATASETS, images_named, victims_named


def test_every_public_data_set_of_a_fixed_name_has_one():
    public = [getattr(datamodules, name) for name in datamodules.__all__]
    modules = [each for each in public if isinstance(each, type)]
    images = {module for module in modules if issubclass(module, ImageVictims)}
    assert set(DATASETS.values()) == images - {ImageVictims, ImageFolderVictims}
    labelled = {module for module in modules if issubclass(module, LabelledDataModule)}
    assert set(LABELLED_DATASETS.values()) == labelled - {LabelledDataModule, ImageFolder}
    assert {name: module.name for name, module in LABELLED_DATASETS.items()} == {
        name: name for name in LABELLED_DATASETS
    }


def test_by_name(tmp_path: Path):
    name, victims = victims_named("mnist", root=tmp_path, victims=7, seed=3, lanes=2)
    assert name == "mnist"
    assert isinstance(victims, MNISTVictims)
    assert (victims.victims, victims.seed, victims.lanes, victims.root) == (7, 3, 2, tmp_path)
    assert isinstance(victims_named("lfw", image_size=32)[1], LFWVictims)


def test_a_folder(tmp_path: Path):
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        save_image(torch.rand(3, 8, 8), tmp_path / "photos" / name / "0.png")
    name, victims = victims_named(str(tmp_path / "photos"), image_size=4, victims=1)
    assert name == "photos"
    victims.setup("fit")
    assert victims.victim.protocol.image_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("imagenet", {}, r"^Expected `dataset` to be one of \['mnist', .*'sample'\] or a folder of images, but got"),
        ("sample", {"root": "."}, r"^Expected no `root` with 'sample', but got"),
        ("mnist", {"image_size": 9}, r"^Expected no `image_size` with 'mnist', but got 9\.$"),
        ("mnist", {"victims": 0}, r"^Expected `victims` to be a whole number of at least 1, but got 0"),
    ],
)
def test_refuses(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        victims_named(dataset, **options)


def test_images_by_name(tmp_path: Path):
    name, images = images_named("mnist", root=tmp_path, seed=3, batch_size=2)
    assert name == images.name == "mnist"
    assert isinstance(images, MNIST)
    assert (images.seed, images.batch_size, images.root) == (3, 2, tmp_path)


def test_images_of_a_folder(tmp_path: Path):
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            save_image(torch.rand(3, 8, 8), tmp_path / "photos" / label / f"{i}.png")
    name, images = images_named(f"{tmp_path}/photos/a/..", image_size=4, batch_size=1)
    assert name == images.name == "photos"
    images.setup("fit")
    assert images.image_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("lfw", {}, r"^Expected `dataset` to be one of \['mnist', .*'svhn', 'sample'\] or a folder of images, but got"),
        ("sample", {"root": "."}, r"^Expected no `root` with 'sample', but got"),
        ("cifar10", {"image_size": 9}, r"^Expected no `image_size` with 'cifar10', but got 9\.$"),
        ("svhn", {"batch_size": 0}, r"^Expected `batch_size` to be a whole number of at least 1, but got 0"),
    ],
)
def test_refuses_images(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        images_named(dataset, **options)
