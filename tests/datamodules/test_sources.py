"""Every kind of source, and what each refuses."""

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.utils import save_image

from leakage.datamodules import DATASETS, GroundTruth, LabelledImages, LabelledTensors, Source, Victims
from leakage.datamodules.sources import in_unit_range


class Own(Dataset):
    """Items as they are given, with attributes of a data set."""

    def __init__(self, items, **attributes):
        self.items = items
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.fixture
def images(generator):
    return torch.randint(0, 256, (6, 3, 5, 4), dtype=torch.uint8, generator=generator)


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("kind", ["pil", "uint8", "float", "double"])
def test_images_of_every_kind_are_the_same(images, kind):
    change = {
        "pil": as_pil,
        "uint8": lambda image: image,
        "float": lambda image: image.float() / 255,
        "double": lambda image: image.double() / 255,
    }
    own = Own([(change[kind](image), index % 3) for index, image in enumerate(images)], classes=["a", "b", "c"])
    opened = Source(own).open()
    assert (len(opened), opened.class_names, opened.name) == (6, ("a", "b", "c"), "Own")
    for index in range(6):
        image, label = opened[index]
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, images[index] / 255, rtol=0, atol=1e-7 if kind == "double" else 0)
        assert label == index % 3
    data = Victims(own, victims=3, images=2, num_workers=1)
    data.setup("fit")
    assert data.victim.protocol.num_classes == 3
    truth = GroundTruth.cat(list(data.val_dataloader()))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(truth.images.flatten(0, 1), images[order] / 255, rtol=0, atol=1e-7)
    assert truth.labels.flatten().tolist() == (order % 3).tolist()


@pytest.mark.parametrize(
    ("attributes", "options", "classes"),
    [
        ({"classes": ["x", "y", "z"]}, {}, ("x", "y", "z")),
        ({"classes": ["x", "y", "z"], "targets": [0, 1]}, {}, ("x", "y", "z")),
        ({"targets": [0, 1, 0, 1, 0, 1]}, {}, ("0", "1")),
        ({"labels": torch.tensor([0, 4, 0, 1, 0, 1])}, {}, tuple("01234")),
        ({}, {"num_classes": 3}, ("0", "1", "2")),
        ({"classes": ["x", "y"]}, {"num_classes": 3}, ("0", "1", "2")),
        ({"classes": 7}, {"num_classes": 2}, ("0", "1")),
    ],
)
def test_the_number_of_classes(images, attributes, options, classes):
    own = Own([(image, 0) for image in images], **attributes)
    assert Source(own, **options).open().class_names == classes


@pytest.mark.parametrize(
    "attributes",
    [{}, {"targets": [0.5] * 6}, {"targets": [0, 1]}, {"labels": ["a"] * 6}, {"targets": [{"boxes": []}] * 6}],
)
def test_a_number_of_classes_that_must_be_told(images, attributes):
    own = Own([(image, 1) for image in images], **attributes)
    message = "Expected `num_classes` for 'Own', which has neither `classes` nor whole numbers in `targets` or `labels`"
    with pytest.raises(ValueError, match=message):
        Source(own).open()
    assert Source(own, num_classes=2).open().labels.tolist() == [1] * 6, "read item by item"


def test_labels_that_a_transform_makes_anew(images):
    """The numbers in ``targets`` are then not those of the items."""
    own = Own([(image, 1) for image in images], targets=[0] * 6, classes=["a", "b"], target_transform=lambda label: 1)
    assert Source(own).open().labels.tolist() == [1] * 6


def test_a_part_of_a_data_set(images):
    whole = LabelledTensors(images, torch.arange(6) % 3, ("a", "b", "c"))
    opened = Source(Subset(Subset(whole, [5, 3, 1, 0]), [0, 2])).open()
    assert (opened.class_names, opened.labels.tolist()) == (("a", "b", "c"), [2, 1])
    assert torch.equal(opened[1][0], in_unit_range(images[1]))


def test_a_data_set_of_torchvision_is_one_of_ones_own(tmp_path):
    own = datasets.FakeData(size=8, image_size=(3, 6, 6), num_classes=4)
    data = Victims(own, victims=4, images=2, num_classes=4)
    data.setup("fit")
    assert (data.name, data.victim.protocol.image_shape) == ("FakeData", (3, 6, 6))


@pytest.mark.parametrize("labels", ["uniform", "single-class", "dirichlet:0.5"])
@pytest.mark.parametrize("change", [{"lanes": 1}, {"num_workers": 2}, {"victims": 30}])
def test_a_victim_is_the_same_however_many_there_are(images, labels, change):
    own = Own([(as_pil(image), index % 2) for index, image in enumerate(images)], targets=[0, 1] * 3)
    usual = {"victims": 7, "images": 3, "seed": 3, "labels": labels}
    truths = []
    for options in (usual, usual | change):
        data = Victims(own, **options)
        data.setup("fit")
        truths.append(next(iter(data.val_dataloader())))
    assert torch.equal(truths[0].images, truths[1].images[:7])
    assert torch.equal(truths[0].labels, truths[1].labels[:7])
    if labels == "single-class":
        assert (truths[0].labels == truths[0].labels[:, :1]).all()


def test_a_checkpoint_recognises_a_data_set_of_ones_own(images):
    def data(pictures, count=6, kind=TensorDataset):
        return Victims(kind(pictures[:count], torch.arange(count) % 2), num_classes=2, victims=1)

    state = data(images).state_dict()
    data(images.clone()).load_state_dict(state)
    for other, named in (
        (data(images, count=5), "size 6 in the checkpoint and 5 here"),
        (data(255 - images), "content"),
        (data(images, kind=LabelledTensors), "dataset 'TensorDataset' in the checkpoint and 'LabelledTensors' here"),
    ):
        with pytest.raises(ValueError, match=f"Expected a checkpoint of the same victims, but got .*{named}"):
            other.load_state_dict(state)


@pytest.mark.parametrize(("victims", "per_victim"), [(1, 1), (3, 1), (40, 1), (10, 4), (1, 40)])
def test_a_checkpoint_recognises_it_by_few_images_of_many_victims(victims, per_victim):
    asked = []

    class Own(TensorDataset):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    def data(pictures):
        dataset = Own(pictures, torch.arange(40) % 2)
        found = Victims(dataset, num_classes=2, victims=victims, images=per_victim)
        found.setup("fit")
        asked.clear()
        return found

    first = data(torch.rand(40, 1, 5, 5))
    state = first.state_dict()
    assert 1 <= len(asked) <= 8
    pictures = first.source.dataset.tensors[0]
    of_the_first = first.val_dataloader().dataset.order[0]
    others = (1 - pictures).index_copy(0, of_the_first, pictures[of_the_first])
    if victims == 1:
        data(others).load_state_dict(state)
    else:
        with pytest.raises(ValueError, match=r"got content '[0-9a-f]+' in the checkpoint and '[0-9a-f]+' here"):
            data(others).load_state_dict(state)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": 0, "label": 1}, r"Expected items \(image, label\) of 'Own', but got dict"),
        ((torch.rand(3, 5, 5),), r"Expected items \(image, label\) of 'Own', but got tuple"),
        ((torch.rand(5, 5), 0), r"Expected images as PIL .*, but got torch.float32 \(5, 5\) in image 0 of 'Own'"),
        (
            (torch.zeros(3, 5, 5, dtype=torch.int64), 0),
            r"Expected images as PIL .*, but got torch.int64 \(3, 5, 5\) in",
        ),
        ((Image.new("P", (5, 5)), 0), "Expected images as PIL .*, but got a PIL image of mode 'P' in image 0 of 'Own'"),
        (([[0.5]], 0), "Expected images as PIL .*, but got list in image 0 of 'Own'"),
        ((torch.full((3, 5, 5), 2.0), 0), r"Expected floats in \[0, 1\], .* but got 2 to 2 in image 0 .*Normalize"),
        ((torch.full((3, 5, 5), torch.nan), 0), r"Expected floats in \[0, 1\], .* but got nan to nan in image 0"),
        ((torch.rand(3, 5, 5), 2), "Expected labels from 0 to 1, but got 2 in image 0 of 'Own'"),
        ((torch.rand(3, 5, 5), -1), "Expected labels from 0 to 1, but got -1 in image 0 of 'Own'"),
        ((torch.rand(3, 5, 5), 0.5), r"Expected labels from 0 to 1, but got 0\.5 in image 0 of 'Own'"),
    ],
)
def test_items_that_cannot_be_used(item, message):
    for data in (Victims(Own([item] * 4), num_classes=2, victims=1), LabelledImages(Own([item] * 4), num_classes=2)):
        with pytest.raises(ValueError, match=message):
            data.setup("fit")


def test_images_of_several_sizes():
    own = Own([(torch.rand(1, 6, size), size % 2) for size in (5, 5, 5, 6)], classes=["a", "b"])
    for data in (Victims(own, victims=4), LabelledImages((own, own))):
        with pytest.raises(
            ValueError, match=r"Expected images of one size, but got \(1, 6, .\) and \(1, 6, .\) in image"
        ):
            data.setup("fit")


@pytest.mark.parametrize("kind", [Victims, LabelledImages])
@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("sample", {"root": "."}, r"^Expected no `root` with 'sample', but got \.\.$"),
        ("sample", {"image_size": 9}, r"^Expected no `image_size` with 'sample', but got 9\.$"),
        ("mnist", {"image_size": 9}, r"^Expected no `image_size` with 'mnist', but got 9\.$"),
        ("cifar10", {"channels": 1}, r"^Expected no `channels` with 'cifar10', but got 1\.$"),
        ("svhn", {"num_classes": 10}, r"^Expected no `num_classes` with 'svhn', but got 10\.$"),
        (Own([]), {"root": "."}, r"^Expected no `root` with 'Own', but got \.\.$"),
        (
            Own([]),
            {"image_size": 9},
            r"^Expected no `image_size` with 'Own', but got 9\. Give the Dataset a transform\.$",
        ),
        (Own([]), {"num_classes": 1}, "^Expected `num_classes` to be a whole number of at least 2, but got 1"),
        (Stream(), {}, "^Expected `dataset` to be one of .*, or a Dataset with `__len__` and .*, but got Stream"),
        (None, {}, "^Expected `dataset` to be one of .*, or a Dataset with `__len__` and .*, but got NoneType"),
    ],
)
def test_refuses(kind, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        kind(dataset, **options)


@pytest.mark.parametrize("kind", [Victims, LabelledImages])
def test_no_such_name(kind):
    message = r"^Expected `dataset` to be one of \['mnist', .*'sample'\] or a folder of images, but got no folder 'ima"
    with pytest.raises(FileNotFoundError, match=message):
        kind("imagenet")


def test_a_list_of_items_is_no_data_set():
    with pytest.raises(ValueError, match="or a Dataset with `__len__` and `__getitem__`, but got list"):
        Victims([(torch.rand(1, 5, 5), 0)] * 3)


def test_no_test_images():
    for dataset in ("sample", "lfw", Own([])):
        with pytest.raises(
            ValueError, match=r"Expected `split` 'train' with '.*', which has no separate test images, but"
        ):
            Victims(dataset, split="test")


def test_names(tmp_path):
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(2):
            save_image(torch.rand(3, 8, 8), tmp_path / "photos" / label / f"{number}.png")
    assert [Source(name).name for name in DATASETS] == list(DATASETS)
    for kind in (Victims, LabelledImages):
        data = kind(f"{tmp_path}/photos/a/..", image_size=4, **({"victims": 1} if kind is Victims else {}))
        assert data.name == "photos"
        data.setup("fit")


def test_an_unknown_distribution():
    with pytest.raises(ValueError, match=r"Expected `labels` to be one of \['dirichlet:A', .*\], but got 'even'"):
        Victims(Own([]), labels="even")
    with pytest.raises(ValueError, match="Expected `labels` as 'dirichlet:A' with a positive number A"):
        Victims(Own([]), labels="dirichlet:0")
