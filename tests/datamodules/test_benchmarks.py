import os
import pickle
import struct
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
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


def write_idx(root, name, split):
    folder = root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = draw((1, 28, 28), 10, split)
    prefix = "train" if split == "train" else "t10k"
    header = struct.pack(">IIII", 0x803, len(images), 28, 28)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = struct.pack(">II", 0x801, len(labels))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def write_cifar(root, num_classes, split):
    folder = root / ("cifar-10-batches-py" if num_classes == 10 else "cifar-100-python")
    folder.mkdir(exist_ok=True)
    images, labels = draw((3, 32, 32), num_classes, split)
    names = {
        10: [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"],
        100: [split],
    }
    files = names[num_classes]
    key = "labels" if num_classes == 10 else "fine_labels"
    for file, part in zip(files, np.array_split(np.arange(len(images)), len(files)), strict=True):
        entry = {"data": images[part].reshape(len(part), -1), key: labels[part].tolist()}
        (folder / file).write_bytes(pickle.dumps(entry, protocol=2))
    meta, key = ("batches.meta", "label_names") if num_classes == 10 else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({key: [f"class {k}" for k in range(num_classes)]}, protocol=2))


def write_svhn(root, split):
    images, labels = draw((3, 32, 32), 10, split)
    labels = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)  # the files call the digit 0 class 10
    scipy.io.savemat(root / f"{split}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels})


DATA_SETS = {
    MNISTVictims: (lambda root, split: write_idx(root, "MNIST", split), (1, 28, 28), 10),
    FashionMNISTVictims: (lambda root, split: write_idx(root, "FashionMNIST", split), (1, 28, 28), 10),
    CIFAR10Victims: (lambda root, split: write_cifar(root, 10, split), (3, 32, 32), 10),
    CIFAR100Victims: (lambda root, split: write_cifar(root, 100, split), (3, 32, 32), 100),
    SVHNVictims: (write_svhn, (3, 32, 32), 10),
}
every_data_set = pytest.mark.parametrize("data_set", DATA_SETS, ids=lambda data_set: data_set.__name__)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def no_checksums(monkeypatch):
    for module in (datasets.cifar, datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))  # noqa: PTH113


@every_data_set
@pytest.mark.parametrize("split", SPLITS)
def test_files_in_the_real_format(tmp_path, data_set, split, no_network, no_checksums):
    write, shape, num_classes = DATA_SETS[data_set]
    for each in SPLITS:
        write(tmp_path, each)
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
    assert len(data.share(0, 2).gradients["classifier.bias"][0]) == num_classes


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


def test_downloads_only_what_is_not_there(tmp_path, monkeypatch):
    downloads = []

    def download(self):
        downloads.append(self.root)
        write_idx(tmp_path, "MNIST", "train")
        write_idx(tmp_path, "MNIST", "test")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    data = MNISTVictims(root=tmp_path, victims=2)
    data.prepare_data()
    assert not hasattr(data, "victim")
    data.prepare_data()
    data.setup("fit")
    assert downloads == [tmp_path]


def test_a_truncated_file(tmp_path, no_network):
    write_idx(tmp_path, "MNIST", "train")
    write_idx(tmp_path, "MNIST", "test")
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


def test_the_split_belongs_to_the_configuration(tmp_path):
    write_idx(tmp_path, "MNIST", "train")
    write_idx(tmp_path, "MNIST", "test")
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
