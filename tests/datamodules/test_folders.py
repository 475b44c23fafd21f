import numpy as np
import pytest
import torch
from PIL import Image

from leakage.datamodules import GroundTruth, Victims

PERSONS = {"Aaron_Eckhart": 1, "Aaron_Guiel": 1, "George_W_Bush": 5, "Zydrunas_Ilgauskas": 2}


def picture(seed, size=(20, 20), channels=3):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (*size, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


@pytest.fixture
def folder(tmp_path):
    """Three classes of two lossless images of 20 x 20."""
    root = tmp_path / "photos"
    for number, name in enumerate(("bird", "cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(2):
            picture(10 * number + i).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def lfw(tmp_path):
    """The layout of the LFW archive: one folder per person, JPEGs of 250 x 250, and loose lists."""
    root = tmp_path / "lfw_funneled"
    for person, count in PERSONS.items():
        (root / person).mkdir(parents=True)
        for number in range(1, count + 1):
            picture(number, (250, 250)).save(root / person / f"{person}_{number:04d}.jpg")
    (root / "pairs_01.txt").write_text("600\n")
    return root


def ready(dataset, **kwargs):
    data = Victims(dataset, **kwargs)
    data.setup("fit")
    return data


def truth_of_all(data):
    return GroundTruth.cat(list(data.val_dataloader()))


def test_images_and_classes(folder):
    data = ready(folder, victims=6)
    assert data.victim.protocol.image_shape == (3, 20, 20)
    assert data.victim.protocol.num_classes == 3
    truth = truth_of_all(data)
    seen = {}
    for image, label in zip(truth.images[:, 0], truth.labels[:, 0], strict=True):
        seen.setdefault(int(label), []).append((image.permute(1, 2, 0) * 255).round().byte().numpy())
    for number in range(3):
        for i in range(2):
            assert any(np.array_equal(image, np.asarray(picture(10 * number + i))) for image in seen[number])
    assert len(data.share(range(6))) == 6


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"image_size": 8}, (3, 8, 8)),
        ({"image_size": (8, 12), "channels": 1}, (1, 8, 12)),
        ({"image_size": [40, 30]}, (3, 40, 30)),
        ({"channels": 1}, (1, 20, 20)),
    ],
)
def test_size_and_channels(folder, options, shape):
    data = ready(folder, victims=2, **options)
    assert data.victim.protocol.image_shape == shape
    assert truth_of_all(data).images.shape == (2, 1, *shape)


def test_images_of_many_sizes_and_modes_are_made_alike(folder):
    picture(50, (31, 47)).save(folder / "cat" / "wide.png")
    picture(51, (16, 16), channels=1).save(folder / "cat" / "grey.jpg")
    picture(52).convert("RGBA").save(folder / "dog" / "alpha.png")
    picture(53).convert("P").save(folder / "dog" / "palette.png")
    truth = truth_of_all(ready(folder, victims=10, image_size=16))
    assert truth.images.shape == (10, 1, 3, 16, 16)
    assert truth.images.min() >= 0
    assert truth.images.max() <= 1


def test_scaling_keeps_the_proportions(tmp_path):
    """A white disc on a wide black ground stays a disc in the middle."""
    ys, xs = np.mgrid[:60, :100]
    disc = ((ys - 29.5) ** 2 + (xs - 49.5) ** 2 < 20**2).astype(np.uint8) * 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(disc).save(tmp_path / name / "disc.png")
    image = truth_of_all(ready(tmp_path, victims=1, image_size=30, channels=1)).images[0, 0, 0]
    torch.testing.assert_close(image, image.T, atol=0.02, rtol=0)
    assert image.sum().item() == pytest.approx(np.pi * 10**2, rel=0.02)


def test_images_of_different_sizes(folder):
    picture(50, (21, 20)).save(folder / "cat" / "2.png")
    data = Victims(folder, victims=7)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"Expected images of one size, but got (.|\n)*'.*\.png'. Set `image_size`"
        ):
            data.setup("fit")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_corrupt_image_is_named_at_setup(folder, damage):
    path = folder / "cat" / "1.png"
    path.write_bytes({"truncated": path.read_bytes()[:600], "text": b"no image", "empty": b""}[damage])
    data = Victims(folder, victims=6)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"Expected an 8-bit image in '{path}', but got: "):
            data.setup("fit")


def test_deep_images_are_not_clipped_in_silence(folder):
    Image.fromarray(np.full((20, 20), 4000, np.uint16)).save(folder / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"Expected an 8-bit image in '.*cat/1.png', but got: mode I;16"):
        ready(folder, victims=6)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"Expected `dataset` to be one of .* no folder '{tmp_path}/nowhere'"):
        ready(tmp_path / "nowhere")


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"Expected class folders of images in '{tmp_path}', but got none"):
        ready(tmp_path)


def test_images_without_class_folders(tmp_path):
    picture(0).save(tmp_path / "0.png")
    picture(1).save(tmp_path / "1.PNG")
    with pytest.raises(
        FileNotFoundError, match=r"but got 2 images without class folders\. The layout is <folder>/<class>"
    ):
        ready(tmp_path)


def test_a_class_without_images(folder):
    (folder / "eel").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Expected images in every folder of .* for the classes eel"):
        ready(folder)


def test_a_single_class(tmp_path):
    (tmp_path / "cat").mkdir()
    picture(0).save(tmp_path / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"Expected at least two class folders in .*, but got only \['cat'\]"):
        ready(tmp_path, victims=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "Expected `image_size` to be a whole number of at least 1, but got 0"),
        ({"image_size": (8, -1)}, "Expected `image_size` to be a whole number of at least 1, but got -1"),
        ({"image_size": 8.5}, "Expected `image_size` to be a whole number of at least 1, but got 8.5"),
        ({"image_size": (8, 8, 3)}, r"Expected `image_size` as one number or as height and width, but got \(8, 8, 3\)"),
        ({"channels": 2}, "Expected `channels` to be 1 or 3, but got 2"),
        ({"victims": 0}, "Expected `victims` to be a whole number of at least 1, but got 0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Victims(tmp_path, **options)


@pytest.mark.parametrize("layout", ["given", "parent", "environment", "torchvision"])
def test_lfw(lfw, layout, tmp_path, monkeypatch):
    root = tmp_path
    monkeypatch.setenv("LEAKAGE_DATA", str(tmp_path / "empty"))
    if layout == "given":
        root = lfw
    elif layout == "environment":
        root = None
        monkeypatch.setenv("LEAKAGE_DATA", str(tmp_path))
    elif layout == "torchvision":
        (tmp_path / "lfw-py").mkdir()
        lfw.rename(tmp_path / "lfw-py" / lfw.name)
    data = ready("lfw", root=root, victims=sum(PERSONS.values()))
    assert data.victim.protocol.image_shape == (3, 32, 32)
    assert data.victim.protocol.num_classes == len(PERSONS)
    truth = truth_of_all(data)
    assert truth.labels.flatten().bincount().tolist() == [*PERSONS.values()]
    assert data.share(range(3)).gradients["classifier.weight"].shape == (3, len(PERSONS), 768)


@pytest.mark.parametrize("given", [True, False])
def test_no_lfw(tmp_path, monkeypatch, given):
    monkeypatch.setenv("LEAKAGE_DATA", str(tmp_path))
    root = tmp_path / "nowhere" if given else None
    place = root or tmp_path
    with pytest.raises(
        FileNotFoundError, match=rf"Expected the LFW faces .* in '{place}'.* with `root` or .*LEAKAGE_DATA"
    ):
        ready("lfw", root=root)


def test_an_image_of_very_many_pixels_is_scaled_or_refused(folder):
    """Each victim's search holds many times its pixels; decoding one such image takes little."""
    Image.new("1", (5000, 4000)).save(folder / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"image in '.*0.png', but got: 5000 x 4000 pixels, .* Set `image_size`"):
        ready(folder, victims=6)
    assert ready(folder, victims=6, image_size=20).victim.protocol.image_shape == (3, 20, 20)


@pytest.fixture
def parts(folder, tmp_path):
    """Training and test images of the same classes."""
    folder.rename(tmp_path / "train")
    for number, name in enumerate(("bird", "cat", "dog")):
        (tmp_path / "photos" / "test" / name).mkdir(parents=True)
        picture(100 + number).save(tmp_path / "photos" / "test" / name / "0.png")
    (tmp_path / "train").rename(tmp_path / "photos" / "train")
    return tmp_path / "photos"


def test_a_folder_of_both_parts(parts):
    for split, count, first in (("train", 6, 0), ("test", 3, 100)):
        data = ready(parts, split=split, victims=count)
        assert (data.name, data.victim.protocol.num_classes) == ("photos", 3)
        truth = truth_of_all(data)
        images = (truth.images[:, 0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
        assert any(np.array_equal(image, np.asarray(picture(first))) for image in images)
    with pytest.raises(ValueError, match="at most the 3 images of the data set, but got 4"):
        ready(parts, split="test", victims=4)
    assert ready(parts, victims=2).victim.protocol.num_classes == 3, "training images by default"


def test_the_part_belongs_to_the_configuration(parts):
    state = ready(parts, victims=2).state_dict()
    with pytest.raises(ValueError, match="split 'train' in the checkpoint and 'test' here"):
        ready(parts, victims=2, split="test").load_state_dict(state)


def test_classes_that_are_called_train_and_test(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / "0.png")
    assert ready(tmp_path, victims=2).victim.protocol.num_classes == 2


def test_a_folder_without_parts_has_no_test_images(folder):
    with pytest.raises(ValueError, match="`split` 'train' with 'photos', which has no separate test images, but"):
        Victims(folder, split="test")


def test_draws_by_label(folder):
    assert (truth_of_all(ready(folder, victims=9, images=2, labels="single-class")).labels.diff(dim=1) == 0).all()
