from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from leakage.datamodules import LabelledImages, memory
from leakage.datamodules.benchmarks import read_sheet

COUNTS = {"bird": 10, "cat": 5, "dog": 2}


def picture(seed, size=(9, 7)):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))


def write_folder(root, counts=COUNTS):
    """Lossless images of 9 x 7, each of its own."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * number + i).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "photos")


def ready(*args, **kwargs):
    data = LabelledImages(*args, **kwargs)
    data.setup("fit")
    return data


def numbers(tensors, of):
    """Which images of a folder these are, as ``100 * class + i``."""
    known = {np.asarray(picture(100 * c + i)).tobytes(): 100 * c + i for c in range(3) for i in range(of[c])}
    return [known[image.permute(1, 2, 0).contiguous().numpy().tobytes()] for image in tensors.images]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_share_of_every_class_is_held_out(folder, num_workers):
    data = ready(folder, num_workers=num_workers, seed=4)
    assert (data.name, data.class_names, data.image_shape) == ("photos", ("bird", "cat", "dog"), (3, 9, 7))
    counts = list(COUNTS.values())
    train, test = numbers(data.train, counts), numbers(data.test, counts)
    assert sorted(train + test) == [100 * c + i for c in range(3) for i in range(counts[c])]
    for split, found in ((data.train, train), (data.test, test)):
        assert split.labels.tolist() == [number // 100 for number in found]
    assert data.train.labels.bincount().tolist() == [8, 4, 1]
    assert data.test.labels.bincount().tolist() == [2, 1, 1]


def test_the_same_are_held_out_whatever_the_seed(folder):
    """Else a set that was condensed with one seed would be tested with another on images that it was made from."""
    held_out = [numbers(ready(folder, seed=seed, batch_size=seed + 1).test, (10, 5, 2)) for seed in range(4)]
    assert held_out == held_out[:1] * 4
    assert held_out[0] != list(range(len(held_out[0]))), "drawn at random"


def test_global_random_state_is_left_alone(folder):
    before = torch.get_rng_state()
    ready(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("share", "counts"), [(0.5, [5, 2, 1]), (0.01, [1, 1, 1]), (0.99, [9, 4, 1])])
def test_at_least_one_on_either_side(folder, share, counts):
    data = ready(folder, test_share=share)
    assert data.test.labels.bincount().tolist() == counts
    assert len(data.train) + len(data.test) == 17


def test_a_test_folder(folder, tmp_path):
    later = write_folder(tmp_path / "later", {"bird": 1, "cat": 2, "dog": 3})
    data = ready((folder, later))
    assert data.name == "photos"
    assert numbers(data.train, (10, 5, 2)) == [*range(10), *range(100, 105), 200, 201]
    assert numbers(data.test, (1, 2, 3)) == [0, 100, 101, 200, 201, 202]
    assert data.train.labels.bincount().tolist() == [10, 5, 2]


def test_both_parts_in_one_folder(folder, tmp_path):
    (tmp_path / "whole").mkdir()
    folder.rename(tmp_path / "whole" / "train")
    write_folder(tmp_path / "whole" / "test", {"bird": 1, "cat": 2, "dog": 3})
    data = ready(tmp_path / "whole")
    assert (data.name, data.class_names) == ("whole", ("bird", "cat", "dog"))
    assert numbers(data.train, (10, 5, 2)) == [*range(10), *range(100, 105), 200, 201]
    assert numbers(data.test, (1, 2, 3)) == [0, 100, 101, 200, 201, 202]
    with pytest.raises(ValueError, match=r"Expected no `test_share` with 'whole', which has test images, but"):
        LabelledImages(tmp_path / "whole", test_share=0.5)


def test_a_test_folder_of_other_classes(folder, tmp_path):
    later = write_folder(tmp_path / "later", {"bird": 1, "cow": 2, "dog": 3})
    message = (
        r"Expected test images of the classes of '.*photos', .* further classes \['cow'\], and no images of \['cat'\]\."
    )
    with pytest.raises(ValueError, match=message):
        ready((folder, later))


def test_a_test_folder_of_another_size(folder, tmp_path):
    later = write_folder(tmp_path / "later")
    for path in later.glob("*/*.png"):
        picture(0, (9, 8)).save(path)
    with pytest.raises(ValueError, match=r"of 'photos' of one size, but got \(3, 9, 7\) and \(3, 9, 8\)"):
        ready((folder, later))
    assert ready((folder, later), image_size=6).image_shape == (3, 6, 6)


def test_size_and_channels(folder):
    assert ready(folder, image_size=(6, 8), channels=1).image_shape == (1, 6, 8)


def test_mean_and_std_are_those_of_the_training_images(folder):
    data = ready(folder)
    pixels = data.train.images.numpy() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)))
    assert data.std == pytest.approx(pixels.std((0, 2, 3)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_of_different_sizes(folder, num_workers):
    picture(0, (9, 8)).save(folder / "cat" / "03.png")
    message = rf"Expected images of one size, but got \(3, 9, 7\) and \(3, 9, 8\) in '{folder}/cat/03.png'. Set `image"
    with pytest.raises(ValueError, match=message):
        ready(folder, num_workers=num_workers)


def test_a_corrupt_image(folder):
    (folder / "cat" / "01.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"Expected an 8-bit image in '{folder}/cat/01.png', but got: "):
        ready(folder)


def test_a_single_image_of_a_class(folder):
    (folder / "dog" / "00.png").unlink()
    message = r"Expected at least two images of class 'dog' in '.*photos', to hold one out .*, but got 1\. .* as a pair"
    with pytest.raises(ValueError, match=message):
        ready(folder)
    assert len(ready((folder, folder)).train) == 16


def test_a_class_without_images(folder):
    (folder / "eel").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Expected images in every folder of .* for the classes eel"):
        ready(folder)


def test_a_single_class(tmp_path):
    with pytest.raises(ValueError, match=r"Expected at least two class folders in .*, but got only \['cat'\]"):
        ready(write_folder(tmp_path / "photos", {"cat": 3}))


def test_no_such_folder(folder, tmp_path):
    nowhere = tmp_path / "none"
    for dataset in (nowhere, (folder, nowhere)):
        with pytest.raises(FileNotFoundError, match=f"Expected `dataset` to be .* got no folder '{nowhere}'"):
            ready(dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 0}, "Expected `test_share` to be above 0 and below 1, but got 0"),
        ({"test_share": 1.0}, r"Expected `test_share` to be above 0 and below 1, but got 1\.0"),
        ({"test_share": float("nan")}, "Expected `test_share` to be above 0 and below 1, but got nan"),
        ({"test_share": "half"}, "Expected `test_share` to be above 0 and below 1, but got 'half'"),
        ({"image_size": 0}, "Expected `image_size` to be a whole number of at least 1, but got 0"),
        ({"channels": 4}, "Expected `channels` to be 1 or 3, but got 4"),
        ({"num_workers": -1}, "Expected `num_workers` to be a whole number of at least 0, but got -1"),
        ({"batch_size": 0}, "Expected `batch_size` to be a whole number of at least 1, but got 0"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LabelledImages(tmp_path, **options)


def test_the_share_belongs_to_the_configuration(folder):
    state = LabelledImages(folder).state_dict()
    LabelledImages(folder, test_share=0.2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"test_share 0\.2 in the checkpoint and 0\.4 here"):
        LabelledImages(folder, test_share=0.4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"test_share 0\.2 in the checkpoint and None here"):
        LabelledImages((folder, folder)).load_state_dict(state)


def test_decoding_does_not_depend_on_the_bar(folder, monkeypatch):
    """A bar that is switched off, as by TQDM_DISABLE, counts nothing."""
    expected = ready(folder).train
    monkeypatch.setattr(memory, "Tqdm", partial(memory.Tqdm, disable=True))
    assert torch.equal(ready(folder).train.images, expected.images)


def test_a_bar_only_when_it_lasts(folder, monkeypatch, capsys):
    ready(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory, "_PATIENCE", 0)
    ready(folder)
    assert "Decoding photos" in capsys.readouterr().err


def test_the_sample_in_two_parts():
    data = LabelledImages("sample", batch_size=90)
    data.setup("fit")
    assert (data.name, data.class_names[0], data.num_classes) == ("sample", "T-shirt/top", 10)
    sheet = read_sheet()
    for split, which in ((data.train, slice(0, 80)), (data.test, slice(80, 100))):
        for label in range(10):
            assert torch.equal(split.images[split.labels == label], sheet[label, which])
    assert torch.equal(data.class_batch(5).images, data.train.images)
    assert data.mean == pytest.approx([0.2861], abs=0.02)
