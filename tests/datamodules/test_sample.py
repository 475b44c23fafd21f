import os
from pathlib import Path

import numpy as np
import pytest
import torch

import leakage.datamodules
from leakage.datamodules import Source

FOLDER = Path(leakage.datamodules.__file__).parent


def all_images():
    images = Source("sample").open()
    assert images.num_classes == 10
    return torch.stack([image for image, _ in images]), torch.tensor([int(label) for _, label in images])


def test_a_thousand_images_one_hundred_of_each_class():
    images, labels = all_images()
    assert images.shape == (1000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.bincount().tolist() == [100] * 10
    assert len(images.flatten(1).unique(dim=0)) == 1000


def test_small_and_with_its_licence():
    assert (FOLDER / "fashion_mnist_sample.png").stat().st_size < 600_000
    licence = (FOLDER / "fashion_mnist_sample.LICENSE.txt").read_text()
    assert "MIT License" in licence
    assert "Copyright (c) 2017 Zalando SE" in licence


def test_equals_the_first_hundred_test_images_of_each_class():
    raw = Path(os.environ.get("LEAKAGE_DATA", "")) / "FashionMNIST" / "raw"
    if not os.environ.get("LEAKAGE_DATA") or not raw.is_dir():
        pytest.skip("LEAKAGE_DATA holds no FashionMNIST")
    images = np.fromfile(raw / "t10k-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.fromfile(raw / "t10k-labels-idx1-ubyte", np.uint8, offset=8)
    first = np.concatenate([np.flatnonzero(labels == k)[:100] for k in range(10)])
    bundled, classes = all_images()
    assert np.array_equal((bundled * 255).round().byte().numpy(), images[first])
    assert np.array_equal(classes.numpy(), labels[first])
