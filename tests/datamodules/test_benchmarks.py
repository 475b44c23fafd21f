import os

import numpy as np
import pytest
import torch
from torchvision import datasets

from leakage.datamodules import GroundTruth, LabelledImages, Source, Victims, data_folder
from leakage.datamodules.benchmarks import BENCHMARKS
from leakage.datamodules.labelled import channel_statistics

SPLITS = {"train": 2, "test": 1}  # images of each class
LEAKAGE_DATA = os.environ.get("LEAKAGE_DATA", "")


DIGITS = tuple("0123456789")
NUMBERED = tuple(f"class {k}" for k in range(100))
DATA_SETS = {
    "mnist": ((1, 28, 28), tuple(datasets.MNIST.classes)),
    "fashion_mnist": ((1, 28, 28), tuple(datasets.FashionMNIST.classes)),
    "cifar10": ((3, 32, 32), NUMBERED[:10]),
    "cifar100": ((3, 32, 32), NUMBERED),
    "svhn": ((3, 32, 32), DIGITS),
}
every_data_set = pytest.mark.parametrize("data_set", DATA_SETS)


def draw(data_set, split):
    """Random pictures, two of each class for training and one for the test, mixed."""
    shape, class_names = DATA_SETS[data_set]
    generator = np.random.default_rng(len(split))
    labels = generator.permutation(np.arange(len(class_names)).repeat(SPLITS[split]))
    return generator.integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels


@pytest.fixture
def write(write_split):
    """Write random pictures as a data set's own files."""

    def write(root, data_set="mnist", drawn=draw):
        for split in SPLITS:
            write_split(BENCHMARKS[data_set].kind, root, split, *drawn(data_set, split))

    return write


def test_every_benchmark_is_tested():
    assert list(BENCHMARKS) == list(DATA_SETS)


@every_data_set
@pytest.mark.parametrize("split", SPLITS)
def test_files_in_the_real_format(tmp_path, data_set, split, write, no_network, no_checksums):
    shape, class_names = DATA_SETS[data_set]
    num_classes = len(class_names)
    write(tmp_path, data_set)
    count = SPLITS[split] * num_classes
    data = Victims(data_set, root=tmp_path, split=split, victims=count, seed=4)
    data.prepare_data()
    data.setup("fit")
    assert data.victim.protocol.image_shape == shape
    assert data.victim.protocol.num_classes == num_classes
    truth = GroundTruth.cat(list(data.val_dataloader()))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(4))
    images, labels = draw(data_set, split)
    assert truth.images.dtype == torch.float32
    torch.testing.assert_close(truth.images[:, 0] * 255, torch.from_numpy(images)[order].float())
    assert truth.labels[:, 0].tolist() == labels[order].tolist()
    assert len(data.share(range(2)).gradients["classifier.bias"][0]) == num_classes


def test_the_train_split_is_the_default(tmp_path):
    assert Victims("mnist", root=tmp_path).split == "train"
    with pytest.raises(ValueError, match=r"Expected `split` to be one of \['test', 'train'\], but got 'validation'"):
        Victims("mnist", root=tmp_path, split="validation")


@every_data_set
def test_all_images_in_memory(tmp_path, data_set, write, no_network, no_checksums):
    write(tmp_path, data_set)
    data = LabelledImages(data_set, root=tmp_path, batch_size=1)
    data.prepare_data()
    data.setup("fit")
    shape, class_names = DATA_SETS[data_set]
    assert (data.image_shape, data.class_names, data.num_classes) == (shape, class_names, len(class_names))
    for split, found in (("train", data.train), ("test", data.test)):
        images, labels = draw(data_set, split)
        assert found.images.dtype == torch.uint8
        assert found.images.is_contiguous()
        assert np.array_equal(found.images.numpy(), images)
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == labels.tolist()
    assert data.class_batch(0).labels.tolist() == list(range(len(class_names)))
    assert (data.mean, data.std) == (BENCHMARKS[data_set].mean, BENCHMARKS[data_set].std)
    assert len(data.mean) == len(data.std) == shape[0]


@every_data_set
@pytest.mark.parametrize("kind", [Victims, LabelledImages])
def test_no_data_set_and_no_network(tmp_path, data_set, kind, no_network):
    message = (
        rf"Expected the train split of \w+ in '{tmp_path}', but got: (.|\n)*no network in tests(.|\n)*"
        r"Give the folder of the data set with `root` or the environment variable LEAKAGE_DATA, or download"
    )
    with pytest.raises(FileNotFoundError, match=message):
        kind(data_set, root=tmp_path).prepare_data()
    data = kind(data_set, root=tmp_path, download=False)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=rf"Expected the train split of \w+ in '{tmp_path}'"):
        data.setup("fit")


def test_a_missing_test_split_is_downloaded_or_named(tmp_path, write, no_network, no_checksums):
    write(tmp_path, "svhn")
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected the test split of SVHN in .*no network in tests"):
        LabelledImages("svhn", root=tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match="Expected the test split of SVHN in"):
        LabelledImages("svhn", root=tmp_path, download=False).setup("fit")
    Victims("svhn", root=tmp_path, victims=2).prepare_data()


def test_a_class_without_training_images(tmp_path, write):
    def all_but_bags(data_set, split):
        images, labels = draw(data_set, split)
        return images[labels != 8], labels[labels != 8]

    write(tmp_path, "fashion_mnist", all_but_bags)
    message = r"^Expected training images of every class of 'fashion_mnist', but got none of \['Bag'\]\.$"
    with pytest.raises(ValueError, match=message):
        LabelledImages("fashion_mnist", root=tmp_path).setup("fit")


def test_a_label_outside_the_range(tmp_path, write):
    write(tmp_path, drawn=lambda data_set, split: (draw(data_set, split)[0], draw(data_set, split)[1] + 1))
    with pytest.raises(ValueError, match="Expected labels from 0 to 9 in the training images of 'mnist', but got 10"):
        LabelledImages("mnist", root=tmp_path).setup("fit")
    with pytest.raises(ValueError, match=r"Expected labels from 0 to 9, but got 10 in image .* of 'mnist'"):
        Victims("mnist", root=tmp_path, victims=20).setup("fit")


def test_downloads_only_what_is_not_there(tmp_path, write, monkeypatch):
    downloads = []

    def download(self):
        downloads.append(self.root)
        write(tmp_path)

    monkeypatch.setattr(datasets.MNIST, "download", download)
    data = Victims("mnist", root=tmp_path, victims=2)
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
        Victims("mnist", root=tmp_path, victims=2).setup("fit")


def test_root_then_environment_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LEAKAGE_DATA", str(tmp_path / "env"))
    assert data_folder(tmp_path / "root") == tmp_path / "root"
    assert data_folder("~/root") == tmp_path / "root"
    assert data_folder(None) == tmp_path / "env"
    monkeypatch.delenv("LEAKAGE_DATA")
    assert data_folder(None) == tmp_path / ".cache" / "leakage"


def test_the_split_belongs_to_the_configuration(tmp_path, write):
    write(tmp_path)
    state = Victims("mnist", root=tmp_path, victims=2).state_dict()
    with pytest.raises(ValueError, match="split 'train' in the checkpoint and 'test' here"):
        Victims("mnist", root=tmp_path, victims=2, split="test").load_state_dict(state)


@pytest.mark.parametrize("data_set", ["mnist", "fashion_mnist"])
def test_the_real_data_set(data_set, monkeypatch):
    if not LEAKAGE_DATA or not (data_folder(None) / BENCHMARKS[data_set].kind.__name__ / "raw").is_dir():
        pytest.skip("LEAKAGE_DATA holds no such data set")
    # Decoding one by one would take twenty seconds.
    monkeypatch.delattr(datasets.MNIST, "__getitem__")  # FashionMNIST inherits it
    victims = Victims(data_set, victims=100, seed=0, download=False)
    victims.setup("fit")
    assert len(Source(data_set).open()) == 60_000
    truth = GroundTruth.cat(list(victims.val_dataloader()))
    assert truth.labels.unique().tolist() == list(range(10))
    assert truth.images.min() == 0
    assert truth.images.max() == 1
    assert 0.1 < truth.images.mean() < 0.4
    data = LabelledImages(data_set, download=False)
    data.setup("fit")
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.class_batch(0).labels.bincount().tolist() == [256] * 10
    mean, std = channel_statistics(data.train.images)
    assert data.mean == pytest.approx(mean, abs=2e-4)
    assert data.std == pytest.approx(std, abs=2e-4)
