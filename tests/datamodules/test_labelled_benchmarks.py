import os

import numpy as np
import pytest
import torch
from torchvision import datasets

from leakage.datamodules import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from leakage.datamodules.labelled import channel_statistics

LEAKAGE_DATA = os.environ.get("LEAKAGE_DATA", "")
DIGITS = tuple("0123456789")
NUMBERED = tuple(f"class {k}" for k in range(100))
SHAPES = {
    MNIST: ((1, 28, 28), tuple(datasets.MNIST.classes)),
    FashionMNIST: ((1, 28, 28), tuple(datasets.FashionMNIST.classes)),
    CIFAR10: ((3, 32, 32), NUMBERED[:10]),
    CIFAR100: ((3, 32, 32), NUMBERED),
    SVHN: ((3, 32, 32), DIGITS),
}
every_data_set = pytest.mark.parametrize("data_set", SHAPES, ids=lambda data_set: data_set.__name__)


def draw(data_set, split):
    """Random pictures, two of each class for training and one for the test, mixed."""
    shape, class_names = SHAPES[data_set]
    generator = np.random.default_rng(len(split))
    labels = generator.permutation(np.arange(len(class_names)).repeat(2 if split == "train" else 1))
    return generator.integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels


@pytest.fixture
def write(write_split):
    def write(root, data_set, drawn=draw):
        for split in ("train", "test"):
            write_split(data_set.dataset, root, split, *drawn(data_set, split))

    return write


@every_data_set
def test_files_in_the_real_format(tmp_path, data_set, write, no_network, no_checksums):
    write(tmp_path, data_set)
    data = data_set(root=tmp_path, batch_size=1)
    data.prepare_data()
    data.setup("fit")
    shape, class_names = SHAPES[data_set]
    assert (data.image_shape, data.class_names, data.num_classes) == (shape, class_names, len(class_names))
    for split, found in (("train", data.train), ("test", data.test)):
        images, labels = draw(data_set, split)
        assert found.images.dtype == torch.uint8
        assert found.images.is_contiguous()
        assert np.array_equal(found.images.numpy(), images)
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == labels.tolist()
    assert data.class_batch(0).labels.tolist() == list(range(len(class_names)))
    assert (data.mean, data.std) == data_set.statistics
    assert len(data.mean) == len(data.std) == shape[0]


@every_data_set
def test_no_data_set_and_no_network(tmp_path, data_set, no_network):
    message = (
        rf"Expected the train split of \w+ in '{tmp_path}', but got: (.|\n)*no network in tests(.|\n)*"
        r"Say where the data set lies with `root` or the environment variable LEAKAGE_DATA, or let `download"
    )
    with pytest.raises(FileNotFoundError, match=message):
        data_set(root=tmp_path).prepare_data()
    data = data_set(root=tmp_path, download=False)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=rf"Expected the train split of \w+ in '{tmp_path}'"):
        data.setup("fit")


def test_a_missing_test_split_is_downloaded_or_named(tmp_path, write, no_network, no_checksums):
    write(tmp_path, SVHN)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected the test split of SVHN in .*no network in tests"):
        SVHN(root=tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match="Expected the test split of SVHN in"):
        SVHN(root=tmp_path, download=False).setup("fit")


def test_a_class_without_training_images(tmp_path, write):
    def all_but_bags(data_set, split):
        images, labels = draw(data_set, split)
        return images[labels != 8], labels[labels != 8]

    write(tmp_path, FashionMNIST, all_but_bags)
    message = r"^Expected training images of every class of 'fashion_mnist', but got none of \['Bag'\]\.$"
    with pytest.raises(ValueError, match=message):
        FashionMNIST(root=tmp_path).setup("fit")


def test_a_label_outside_the_range(tmp_path, write):
    write(tmp_path, MNIST, lambda data_set, split: (draw(data_set, split)[0], draw(data_set, split)[1] + 1))
    with pytest.raises(ValueError, match="Expected labels from 0 to 9 in the training images of 'mnist', but got 10"):
        MNIST(root=tmp_path).setup("fit")


def test_root_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAKAGE_DATA", str(tmp_path / "env"))
    assert MNIST(root=tmp_path / "root").root == tmp_path / "root"
    assert MNIST().root == tmp_path / "env"


@pytest.mark.parametrize("data_set", [MNIST, FashionMNIST])
def test_the_real_data_set(data_set, monkeypatch):
    data = data_set(download=False)
    if not LEAKAGE_DATA or not (data.root / data_set.dataset.__name__ / "raw").is_dir():
        pytest.skip("LEAKAGE_DATA holds no such data set")
    # Decoding one by one would take twenty seconds.
    monkeypatch.delattr(datasets.MNIST, "__getitem__")  # FashionMNIST inherits it
    data.setup("fit")
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.class_batch(0).labels.bincount().tolist() == [256] * 10
    mean, std = channel_statistics(data.train.images)
    assert data.mean == pytest.approx(mean, abs=2e-4)
    assert data.std == pytest.approx(std, abs=2e-4)
