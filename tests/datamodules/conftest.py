"""Data sets of torchvision as files that the tests write themselves, and no network."""

import os
import pickle
import struct
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
from torchvision import datasets


@pytest.fixture
def write_split():
    """Writes images ``(M, C, H, W)`` and labels as the files of one of torchvision's data sets."""

    def write_split(dataset, root, split, images, labels):
        if dataset is datasets.SVHN:
            write_svhn(root, split, images, labels)
        elif issubclass(dataset, datasets.CIFAR10):
            write_cifar(root, 100 if dataset is datasets.CIFAR100 else 10, split, images, labels)
        else:
            write_idx(root, dataset.__name__, split, images, labels)

    return write_split


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def no_checksums(monkeypatch):
    for module in (datasets.cifar, datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))  # noqa: PTH113


def write_idx(root, name, split, images, labels):
    folder = root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "train" if split == "train" else "t10k"
    header = struct.pack(">IIII", 0x803, len(images), 28, 28)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = struct.pack(">II", 0x801, len(labels))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def write_cifar(root, num_classes, split, images, labels):
    folder = root / ("cifar-10-batches-py" if num_classes == 10 else "cifar-100-python")
    folder.mkdir(exist_ok=True)
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


def write_svhn(root, split, images, labels):
    labels = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)  # the files call the digit 0 class 10
    scipy.io.savemat(root / f"{split}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels})
