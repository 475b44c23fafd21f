import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from leakage.datamodules import LabelledImages, LabelledTensors
from leakage.datamodules.labelled import channel_statistics

COUNTS = (9, 4, 6)


def tensors(labels, size=5, channels=2):
    labels = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(len(labels))
    shape = (len(labels), channels, size, size)
    return LabelledTensors(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), labels)


class Data(LabelledImages):
    """Three classes of 9, 4 and 6 training images, mixed."""

    def __init__(self, train=None, test=None, class_names=("ant", "bee", "cow"), **kwargs):
        order = torch.randperm(sum(COUNTS), generator=torch.Generator().manual_seed(0))
        train = tensors(torch.arange(3).repeat_interleave(torch.tensor(COUNTS))[order]) if train is None else train
        test = tensors([2, 0, 1, 1]) if test is None else test
        super().__init__(
            tuple(LabelledTensors(part.images, part.labels, class_names) for part in (train, test)), **kwargs
        )
        self.name = "toy"


def ready(**kwargs):
    data = Data(**kwargs)
    data.setup("fit")
    return data


def test_after_setup():
    data = ready()
    assert (data.num_classes, data.image_shape, data.class_names) == (3, (2, 5, 5), ("ant", "bee", "cow"))
    assert (len(data.train), len(data.test)) == (19, 4)
    before = data.train
    data.setup("fit")
    assert data.train is before


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_a_batch_has_so_many_images_of_every_class_in_their_order(batch_size):
    data = ready(batch_size=batch_size)
    for step in range(20):
        batch = data.class_batch(step)
        assert batch.step == step
        assert batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == [label for label, n in enumerate(COUNTS) for _ in range(min(n, batch_size))]
        drawn = [
            [i for i in range(19) if torch.equal(image, data.train.images[i])]  # each image is one of a kind
            for image in batch.images
        ]
        assert all(len(matches) == 1 for matches in drawn)
        indices = [i for (i,) in drawn]
        assert len(set(indices)) == len(indices)
        assert data.train.labels[indices].tolist() == batch.labels.tolist()


def test_batches_differ_by_step_and_seed_and_by_nothing_else():
    data = ready(batch_size=3, seed=5)
    batches = [data.class_batch(step).images for step in range(4)]
    again = ready(batch_size=3, seed=5)
    torch.manual_seed(99)
    for step in (3, 0, 2, 1):
        assert torch.equal(again.class_batch(step).images, batches[step])
    assert not any(torch.equal(batches[0], other) for other in batches[1:])
    assert not torch.equal(ready(batch_size=3, seed=6).class_batch(0).images, batches[0])


def test_every_image_is_drawn_about_equally_often():
    data = ready(batch_size=3)
    data.train.images[:, 0, 0, 0] = torch.arange(19, dtype=torch.uint8)
    drawn = torch.cat([data.class_batch(step).images[:, 0, 0, 0] for step in range(300)]).long().bincount(minlength=19)
    expected = 300 * 3 / torch.tensor(COUNTS, dtype=torch.float64)[data.train.labels]
    assert ((drawn - expected).abs() < 5 * expected.sqrt()).all()
    assert drawn.sum() == 300 * 9


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    data = ready(batch_size=2)
    data.class_batch(3)
    list(data.train_dataloader())
    list(data.test_dataloader())
    data.configuration  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("first", "per_epoch", "expected"),
    [(0, 1, [0]), (7, 1, [7]), (0, 4, [0, 1, 2, 3]), (6, 4, [6, 7]), (8, 4, [8, 9, 10, 11])],
)
def test_an_epoch_ends_at_the_next_multiple(first, per_epoch, expected):
    data = ready(batch_size=2)
    data.first_batch, data.batches_per_epoch = first, per_epoch
    batches = list(data.train_dataloader())
    assert [batch.step for batch in batches] == expected
    for batch in batches:
        assert torch.equal(batch.images, data.class_batch(batch.step).images)


class Recorder(lightning.LightningModule):
    """Goes on from its first batch, two batches an epoch."""

    def __init__(self, step=0):
        super().__init__()
        self.step, self.seen = step, []
        self.weight = nn.Parameter(torch.zeros(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_fit_start(self):
        self.trainer.datamodule.batches_per_epoch = 2
        self.trainer.datamodule.first_batch = self.step

    def on_train_epoch_start(self):
        self.trainer.datamodule.first_batch = self.step

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.step)
        self.step += 1
        assert batch.images.shape == (6, 2, 5, 5)
        return self.weight.sum()

    def test_step(self, batch, batch_idx):
        self.seen.append(tuple(batch[0].shape))


def test_a_trainer_goes_through_the_batches_of_all_epochs(tmp_path):
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = Recorder(step=1)
    trainer.fit(module, datamodule=Data(batch_size=2))
    assert module.seen == [1, 2, 3, 4, 5]
    module.seen.clear()
    trainer.test(module, datamodule=Data(), verbose=False)
    assert module.seen == [(4, 2, 5, 5)]


def test_the_test_loader_gives_all_images_in_order():
    data = ready(test=tensors(torch.arange(2300) % 3))
    loader = data.test_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images * 255, data.test.images.float())
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test.labels)


def test_statistics_of_the_training_images():
    data = ready()
    pixels = data.train.images.double().numpy() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)), rel=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3)), rel=1e-12)
    assert channel_statistics(data.train.images) == (data.mean, data.std)


def test_normalise():
    data = ready()
    images = data.train.images
    normalised = data.normalise(images)
    assert normalised.dtype == torch.float32
    for channel in range(2):
        expected = (images[:, channel].numpy() / 255 - data.mean[channel]) / data.std[channel]
        np.testing.assert_allclose(normalised[:, channel].numpy(), expected, atol=1e-5)
    in_scale = images.double() / 255
    torch.testing.assert_close(data.normalise(in_scale), normalised)
    assert torch.equal(in_scale, images.double() / 255)
    torch.testing.assert_close(data.normalise(images[0]), normalised[0])
    floats = torch.full((1, 2, 5, 5), 0.5, requires_grad=True)
    data.normalise(floats).sum().backward()
    torch.testing.assert_close(floats.grad[0, :, 0, 0], 1 / torch.tensor(data.std))


@pytest.mark.parametrize("shape", [(4, 1, 5, 5), (4, 3, 5, 5), (5, 5)])
def test_normalise_refuses_other_channels(shape):
    with pytest.raises(ValueError, match=r"Expected `images` of shape \(\.\.\., 2, H, W\), but got \("):
        ready().normalise(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "Expected `batch_size` to be a whole number of at least 1, but got 0"),
        ({"batch_size": 2.5}, r"Expected `batch_size` to be a whole number of at least 1, but got 2\.5"),
        ({"seed": -1}, "Expected `seed` to be a whole number of at least 0, but got -1"),
        ({"seed": None}, "Expected `seed` to be a whole number of at least 0, but got None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Data(**options)


@pytest.mark.parametrize("step", [-1, 1.0])
def test_bad_step(step):
    with pytest.raises(ValueError, match="Expected `step` to be a whole number of at least 0, but got"):
        ready().class_batch(step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": tensors([0, 2, 0])},
            r"^Expected training images of every class of 'toy', but got none of \['bee'\]\.$",
        ),
        ({"train": tensors([0, 1, 2, 3])}, "^Expected labels from 0 to 2 in the training images of 'toy', but got 3"),
        ({"test": tensors([0, -1])}, "^Expected labels from 0 to 2 in the test images of 'toy', but got -1"),
        ({"class_names": ("ant",)}, "^Expected at least two classes in 'LabelledTensors', but got 1: with one class"),
        (
            {"train": LabelledTensors(tensors([0, 1, 2]).images, torch.tensor([0, 1]))},
            r"^Expected training images of 'toy' as uint8 \(M, C, H, W\), each .* got torch.uint8 \(3, 2, 5, 5\) and 2",
        ),
        ({"test": tensors(torch.empty(0, dtype=torch.int64))}, "^Expected test images of 'toy', but got none"),
        (
            {"train": LabelledTensors(torch.rand(3, 2, 5, 5), torch.arange(3))},
            r"^Expected training images of 'toy' as uint8 \(M, C, H, W\), each .* got torch.float32 \(3, 2, 5, 5\)",
        ),
        (
            {"test": LabelledTensors(torch.zeros(3, 5, 5, dtype=torch.uint8), torch.arange(3))},
            r"^Expected test images of 'toy' as uint8 \(M, C, H, W\), each .* got torch.uint8 \(3, 5, 5\)",
        ),
        (
            {"test": tensors([0, 1, 2], size=6)},
            r"^Expected training and test images of 'toy' of one size, but got \(2, 5, 5\) and \(2, 6, 6\)",
        ),
        (
            {"train": LabelledTensors(torch.full((3, 2, 5, 5), 7, dtype=torch.uint8), torch.arange(3))},
            "^Expected training images of 'toy' that can be normalised, but got the same value in every pixel of ch",
        ),
    ],
)
def test_data_that_cannot_be_used(options, message):
    data = Data(**options)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            data.setup("fit")


def test_the_configuration_holds_plain_values():
    configuration = Data(batch_size=7, seed=3).configuration
    assert {type(value) for value in configuration.values()} <= {str, int, list, type(None)}
    assert configuration["batch_size"] == 7
    assert configuration["images"] == 19


def recolour():
    train = ready().train
    train.images[0] += 1
    return train


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: {"batch_size": 8}, "batch_size None in the checkpoint and 8 here"),
        (lambda: {"seed": 1}, r"seed 0 in the checkpoint and 1 here\.$"),
        (lambda: {"class_names": ("a", "b", "c")}, r"classes \['ant', 'bee', 'cow'\] in the checkpoint and \['a'"),
        (lambda: {"train": tensors(torch.arange(20) % 3)}, "images 19 in the checkpoint and 20 here"),
        (lambda: {"train": recolour()}, "content '[0-9a-f]+' in the checkpoint and '[0-9a-f]+' here"),
    ],
    ids=["batch_size", "seed", "classes", "images", "content"],
)
def test_a_checkpoint_of_other_data_is_refused(change, named):
    state = Data().state_dict()
    Data().load_state_dict(state)
    with pytest.raises(ValueError, match=f"Expected a checkpoint of the same data, but got .*{named}"):
        Data(**change()).load_state_dict(state)


def test_the_sample_is_not_the_toy():
    with pytest.raises(ValueError, match="same data, but got data 'Data' in the checkpoint and 'LabelledImages' here"):
        LabelledImages("sample").load_state_dict(Data().state_dict())


class Pictures(Dataset):
    """PIL images of one's own."""

    def __init__(self, labels, classes=None, mode="RGB"):
        self.held, self.mode = labels, mode
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.held)

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        return Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)).convert(self.mode), self.held[
            index
        ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pair_of_ones_own(num_workers):
    train, test = Pictures([0, 1, 2, 0], ["x", "y", "z"]), Pictures([2, 1], ["x", "y", "z"])
    data = LabelledImages((train, test), num_workers=num_workers)
    data.setup("fit")
    assert (data.name, data.class_names, data.image_shape) == ("Pictures", ("x", "y", "z"), (3, 6, 5))
    for found, given in ((data.train, train), (data.test, test)):
        assert found.images.dtype == torch.uint8
        assert found.labels.tolist() == given.held
        for index in range(len(given)):
            assert np.array_equal(found.images[index].permute(1, 2, 0).numpy(), np.asarray(given[index][0]))


def test_one_of_ones_own_is_parted():
    """Floats become 8 bits; labels are read item by item where the data set does not hold them."""
    images = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = TensorDataset(images.float() / 255, torch.arange(30) % 3)
    data = LabelledImages(floats)
    data.setup("fit")
    assert (data.train.labels.bincount().tolist(), data.test.labels.bincount().tolist()) == ([8] * 3, [2] * 3)
    both = torch.cat([data.train.images, data.test.images])
    assert sorted(map(bytes, both.flatten(1).numpy())) == sorted(map(bytes, images.flatten(1).numpy()))
    unnamed = LabelledImages(Pictures([0, 1] * 5, mode="L"), num_classes=2, test_share=0.4)
    unnamed.setup("fit")
    assert unnamed.test.labels.bincount().tolist() == [2, 2]


def test_classes_that_labels_of_one_part_do_not_show():
    train, test = (TensorDataset(torch.rand(9, 1, 4, 4), torch.arange(9) % classes) for classes in (3, 2))
    data = LabelledImages((train, test))
    data.setup("fit")
    assert data.class_names == ("0", "1", "2")


def test_a_pair_of_other_classes():
    pair = (Pictures([0, 1], ["x", "y"]), Pictures([0, 1], ["x", "w"]))
    message = r"Expected test images of the classes of 'Pictures', .* further classes \['w'\], and no images of \['y'\]"
    with pytest.raises(ValueError, match=message):
        LabelledImages(pair).setup("fit")


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (
            "lfw",
            {},
            r"Expected `dataset` to be one of \['mnist', .*'svhn', 'sample'\], a .*, but got 'lfw', where most",
        ),
        (("mnist",) * 3, {}, "Expected `dataset` as one data set or as a pair, but got 3"),
        (
            "mnist",
            {"test_share": 0.1},
            r"Expected no `test_share` with 'mnist', which has test images, but got 0\.",
        ),
        ("sample", {"test_share": 0.1}, "Expected no `test_share` with 'sample', which has test images"),
        (
            ("sample", "mnist"),
            {"test_share": 0.1},
            "Expected no `test_share` with 'sample', which has test images",
        ),
    ],
)
def test_data_sets_that_cannot_be_parted(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        LabelledImages(dataset, **options)


def test_training_images_in_place_of_the_test_images():
    data = ready(batch_size=3)
    configuration = data.configuration
    watched = data.hold_out(0.3)
    assert (len(watched.train), len(watched.test)) == (13, 6)
    assert watched.test.labels.bincount().tolist() == [3, 1, 2]
    parts = [{image.numpy().tobytes() for image in part.images} for part in (watched.train, watched.test, data.train)]
    assert parts[0] | parts[1] == parts[2]
    assert not parts[0] & parts[1]
    assert (watched.mean, watched.std, watched.name, watched.class_names) == (
        data.mean, data.std, "toy", data.class_names,
    )  # fmt: skip
    for step in range(10):
        batch = watched.class_batch(step)
        assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert {image.numpy().tobytes() for image in batch.images} <= parts[0]
    assert (len(data.train), len(data.test)) == (19, 4), "the data set stays as it is"
    assert data.configuration == configuration
    assert (watched.configuration["images"], configuration["images"]) == (13, 19)
    assert torch.equal(Data(seed=9).hold_out(0.3).test.images, watched.test.images), "whatever the seed"
    for share in (0, 1, 1.5, True, "half"):
        with pytest.raises(ValueError, match=f"Expected `share` to be above 0 and below 1, but got {share!r}"):
            data.hold_out(share)
    with pytest.raises(ValueError, match=r"Expected at least two images of class 'bee' in 'toy'.* but got 1"):
        Data(train=tensors([0, 0, 1, 2, 2])).hold_out(0.3)


def test_a_folder_that_holds_a_data_set_of_torchvision(tmp_path):
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            colour = (100 * label + 10, 60 * label, 99 - label)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "photos" / part / name / "1.png")
    data = LabelledImages(tmp_path / "photos", benchmark="cifar10")
    data.setup("fit")
    assert (data.name, data.mean, data.std) == ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert data.configuration["name"] == "cifar10"
    plain = LabelledImages(tmp_path / "photos")
    plain.setup("fit")
    assert plain.name == "photos"
    assert plain.std != data.std
    with pytest.raises(ValueError, match=r"Expected `benchmark` to be one of .* but got 'imagenet'"):
        LabelledImages(tmp_path / "photos", benchmark="imagenet")
    with pytest.raises(ValueError, match=r"Expected no `benchmark` with 'sample', which is not a folder, .* 'mnist'"):
        LabelledImages("sample", benchmark="mnist")
