import os

import numpy as np
import pytest
import torch
from torchvision import datasets

from leakage.datamodules import (
    CIFAR10Victims,
    CIFAR100Victims,
    FashionMNISTVictims,
    GroundTruth,
    MNISTVictims,
    SVHNVictims,
)

SPLITS = {"train": 20, "test": 10}
LEAKAGE_DATA = os.environ.get("LEAKAGE_DATA", "")


def draw(shape, num_classes, split):
    """Random pictures and labels, all classes' numbers small enough for every data set."""
    generator = np.random.default_rng(len(split))
    images = generator.integers(0, 256, (SPLITS[split], *shape), dtype=np.uint8)
    return images, generator.integers(0, num_classes, SPLITS[split])


DATA_SETS = {
    MNISTVictims: ((1, 28, 28), 10),
    FashionMNISTVictims: ((1, 28, 28), 10),
    CIFAR10Victims: ((3, 32, 32), 10),
    CIFAR100Victims: ((3, 32, 32), 100),
    SVHNVictims: ((3, 32, 32), 10),
}
every_data_set = pytest.mark.parametrize("data_set", DATA_SETS, ids=lambda data_set: data_set.__name__)


@pytest.fixture
def write(write_split):
    """Write random pictures as a data set's own files."""

    def write(root, data_set=MNISTVictims):
        for split in SPLITS:
            write_split(data_set.dataset, root, split, *draw(*DATA_SETS[data_set], split))

    return write


@every_data_set
@pytest.mark.parametrize("split", SPLITS)
def test_files_in_the_real_format(tmp_path, data_set, split, write, no_network, no_checksums):
    shape, num_classes = DATA_SETS[data_set]
    write(tmp_path, data_set)
    data = data_set(root=tmp_path, split=split, victims=SPLITS[split], seed=4)
    data.prepare_data()
    data.setup("fit")
    assert data.victim.protocol.image_shape == shape
    assert data.victim.protocol.num_classes == num_classes
    truth = GroundTruth.cat(list(data.val_dataloader()))
    order = torch.randperm(SPLITS[split], generator=torch.Generator().manual_seed(4))
    images, labels = draw(shape, num_classes, split)
    assert truth.images.dtype == torch.float32
    torch.testing.assert_close(truth.images[:, 0] * 255, torch.from_numpy(images)[order].float())
    assert truth.labels[:, 0].tolist() == labels[order].tolist()
    assert len(data.share(range(2)).gradients["classifier.bias"][0]) == num_classes


@every_data_set
def test_the_train_split_is_the_default(tmp_path, data_set):
    assert data_set(root=tmp_path).split == "train"
    with pytest.raises(ValueError, match=r"Expected `split` to be one of \['test', 'train'\], but got 'validation'"):
        data_set(root=tmp_path, split="validation")


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


def test_downloads_only_what_is_not_there(tmp_path, write, monkeypatch):
    downloads = []

    def download(self):
        downloads.append(self.root)
        write(tmp_path)

    monkeypatch.setattr(datasets.MNIST, "download", download)
    data = MNISTVictims(root=tmp_path, victims=2)
    data.prepare_data()
    assert not hasattr(data, "victim")
    data.prepare_data()
    data.setup("fit")
    assert downloads == [tmp_path]


def test_a_truncated_file(tmp_path, write, no_network):
    write(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match="Expected the train split of MNIST in"):
        MNISTVictims(root=tmp_path, victims=2).setup("fit")


def test_root_then_environment_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LEAKAGE_DATA", str(tmp_path / "env"))
    assert MNISTVictims(root=tmp_path / "root").root == tmp_path / "root"
    assert MNISTVictims(root="~/root").root == tmp_path / "root"
    assert MNISTVictims().root == tmp_path / "env"
    monkeypatch.delenv("LEAKAGE_DATA")
    assert MNISTVictims().root == tmp_path / ".cache" / "leakage"


def test_the_split_belongs_to_the_configuration(tmp_path, write):
    write(tmp_path)
    state = MNISTVictims(root=tmp_path, victims=2).state_dict()
    with pytest.raises(ValueError, match="split 'train' in the checkpoint and 'test' here"):
        MNISTVictims(root=tmp_path, victims=2, split="test").load_state_dict(state)


@pytest.mark.parametrize("data_set", [MNISTVictims, FashionMNISTVictims])
def test_the_real_data_set(data_set):
    data = data_set(victims=100, seed=0, download=False)
    if not LEAKAGE_DATA or not (data.root / data_set.dataset.__name__ / "raw").is_dir():
        pytest.skip("LEAKAGE_DATA holds no such data set")
    data.setup("fit")
    images, num_classes = data.open_images()
    assert (len(images), num_classes) == (60_000, 10)
    truth = GroundTruth.cat(list(data.val_dataloader()))
    assert truth.labels.unique().tolist() == list(range(10))
    assert truth.images.min() == 0
    assert truth.images.max() == 1
    assert 0.1 < truth.images.mean() < 0.4
