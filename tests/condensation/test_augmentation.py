import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import functional as tv

from leakage.condensation.augmentation import SiameseAugmentation, _Drawn

NAMES = ["color", "crop", "cutout", "flip", "scale", "rotate"]
FIRST = {"color": 1, "crop": 4, "cutout": 6, "flip": 8, "scale": 9, "rotate": 11}  # columns of the random numbers
every_transform = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def images(generator):
    return torch.randn(6, 3, 9, 12, generator=generator, dtype=torch.float64)


def drawn(name, *numbers, **sizes):
    """One transform with given random numbers in [0, 1)."""
    row = torch.zeros(12, dtype=torch.float64)
    row[FIRST[name] : FIRST[name] + len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    return _Drawn(SiameseAugmentation(name, **sizes), row)


def shifted(image, down, right):
    """The image moved by whole pixels, pixel by pixel."""
    moved = torch.zeros_like(image)
    for row in range(image.shape[-2]):
        for column in range(image.shape[-1]):
            if 0 <= row - down < image.shape[-2] and 0 <= column - right < image.shape[-1]:
                moved[:, row, column] = image[:, row - down, column - right]
    return moved


def scaled(image, tall, wide):
    """The image stretched about its centre by torch's own sampling."""
    grid = F.affine_grid(image.new_tensor([[[1 / wide, 0, 0], [0, 1 / tall, 0]]]), (1, *image.shape), False)
    return F.grid_sample(image[None], grid, align_corners=False)[0]


@pytest.mark.parametrize("numbers", [(0.0, 0.0, 0.0), (0.9, 0.3, 0.7), (0.2, 0.8, 0.1)])
def test_color(images, numbers):
    result = drawn("color", *numbers, brightness=0.8, saturation=1.5, contrast=0.4)(images)
    for image, colored in zip(images, result, strict=True):
        image = image + (numbers[0] - 0.5) * 0.8
        grey = image.mean(0)
        image = torch.stack([grey + numbers[1] * 1.5 * (channel - grey) for channel in image])
        torch.testing.assert_close(colored, image.mean() + (numbers[2] + 0.4) * (image - image.mean()))


@pytest.mark.parametrize(("numbers", "down", "right"), [((0, 0), -2, -3), ((0.5, 0.5), 0, 0), ((0.999, 0.6), 2, 1)])
def test_crop(images, numbers, down, right):
    result = drawn("crop", *numbers, crop=0.25)(images)  # up to 2.25 of 9 and 3 of 12 pixels
    for image, cropped in zip(images, result, strict=True):
        assert torch.equal(cropped, shifted(image, down, right))
        assert torch.equal(cropped, tv.affine(image, 0.0, [right, down], 1.0, [0.0]))


@pytest.mark.parametrize("side", [28, 32])
def test_crop_moves_by_up_to_four_pixels(side):
    augmentation = SiameseAugmentation("crop")
    generator = torch.Generator().manual_seed(0)
    point = F.pad(torch.ones(1, 1, 1), [side // 2, side - side // 2 - 1] * 2)
    places = augmentation.draw(generator, 400)(point.expand(400, 1, side, side)).nonzero()
    assert len(places) == 400
    for axis in (2, 3):
        assert (places[:, axis] - side // 2).unique().tolist() == list(range(-4, 5))


@pytest.mark.parametrize(
    ("numbers", "cutout", "rows", "columns"),
    [
        ((0.0, 0.0), 0.5, range(3), range(3)),  # sides 5 and 6, centred in the first pixel and before it
        ((0.5, 0.5), 0.5, range(2, 7), range(3, 9)),
        ((0.999, 0.999), 0.5, range(6, 9), range(9, 12)),
        ((0.5, 0.1), 1.0, range(9), range(7)),
    ],
)
def test_cutout(images, numbers, cutout, rows, columns):
    result = drawn("cutout", *numbers, cutout=cutout)(images)
    for row in range(9):
        for column in range(12):
            inside = row in rows and column in columns
            expected = torch.zeros(6, 3) if inside else images[:, :, row, column]
            assert torch.equal(result[:, :, row, column], expected.to(images)), (row, column)


def test_flip(images):
    assert torch.equal(drawn("flip", 0.1)(images), tv.hflip(images))
    assert torch.equal(drawn("flip", 0.6)(images), images)
    assert torch.equal(drawn("flip", 0.6, flip=0.7)(images), tv.hflip(images))


@pytest.mark.parametrize("numbers", [(0.0, 0.0), (0.99, 0.0), (0.3, 0.99)])
def test_scale(images, numbers):
    result = drawn("scale", *numbers, scale=(0.6, 1.5))(images)
    for image, stretched in zip(images, result, strict=True):
        torch.testing.assert_close(stretched, scaled(image, *(0.6 + 0.9 * number for number in numbers)))


def test_scale_makes_images_larger_above_one_and_smaller_below(images):
    ones = torch.ones_like(images)
    assert drawn("scale", 0.9, 0.9, scale=(1.2, 1.5))(ones).min() == 1
    assert drawn("scale", 0.1, 0.1, scale=(0.5, 0.6))(ones)[:, :, 0].max() == 0
    torch.testing.assert_close(
        drawn("scale", 0.5, 0.5, scale=(1.0, 1.6))(images),
        tv.affine(images, 0.0, [0, 0], 1.3, [0.0], tv.InterpolationMode.BILINEAR),
    )


@pytest.mark.parametrize("number", [0.0, 0.4, 0.5, 0.8])
def test_rotate(images, number):
    result = drawn("rotate", number, rotate=60.0)(images)
    expected = tv.rotate(images, (2 * number - 1) * 60, tv.InterpolationMode.BILINEAR)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


def test_half_a_turn_and_no_turn_are_exact(images):
    assert torch.equal(drawn("rotate", 0.5)(images), images)
    torch.testing.assert_close(drawn("rotate", 0.0, rotate=180.0)(images), images.flip(-1, -2))


@pytest.mark.parametrize(
    ("augmentation", "low", "high"),
    [
        (SiameseAugmentation("scale"), 1 / 1.2, 1.2),
        (SiameseAugmentation("scale", scale=(0.8, 1.2)), 0.8, 1.2),
        (SiameseAugmentation("rotate"), -15, 15),
        (SiameseAugmentation("rotate", rotate=45), -45, 45),
    ],
    ids=lambda value: getattr(value, "strategy", value),
)
def test_parameters_fill_their_range(generator, augmentation, low, high):
    # The pixels of a ramp say where they come from.
    columns = torch.linspace(-20, 20, 41, dtype=torch.float64).expand(41, 41)
    ramp = torch.stack([columns, columns.T]).expand(400, 2, 41, 41)
    x, y = augmentation.draw(generator, 400)(ramp)[:, :, 20, 30].unbind(-1)
    values = 10 / x if augmentation.strategy == "scale" else torch.atan2(y, x).rad2deg()
    width = high - low
    assert low - 1e-6 <= values.min() < low + 0.02 * width
    assert high - 0.02 * width < values.max() <= high + 1e-6
    assert abs(values.mean() - (low + high) / 2) < 0.05 * width


@every_transform
def test_same_for_real_and_synthetic(images, name):
    transform = SiameseAugmentation(name).draw(torch.Generator().manual_seed(3))
    synthetic = images[:2].clone().requires_grad_()
    assert torch.equal(transform(images)[:2], transform(synthetic))
    assert torch.equal(transform(images), torch.stack([transform(image) for image in images]))
    assert torch.equal(transform(images), transform(images.reshape(2, 3, 3, 9, 12)).flatten(0, 1))


@pytest.mark.parametrize("strategy", [*NAMES, "flip_color_rotate", "color_crop_cutout_flip_scale_rotate"])
def test_per_image_is_siamese_image_by_image(generator, strategy):
    images = torch.randn(2, 24, 3, 9, 12, generator=generator)
    augmentation = SiameseAugmentation(strategy)
    transform = augmentation.draw(generator, num_images=24)
    single = [_Drawn(augmentation, row)(images[:, i]) for i, row in enumerate(transform.numbers)]
    torch.testing.assert_close(transform(images), torch.stack(single, 1), atol=1e-6, rtol=1e-6)
    assert not torch.equal(transform(images), images)
    assert torch.equal(transform(images[0]), transform(images)[0])


def test_one_of_the_transforms_each_time(images):
    augmentation = SiameseAugmentation("flip_crop_cutout", flip=1.0)
    generator = torch.Generator().manual_seed(0)
    seen = dict.fromkeys(("flip", "crop", "cutout"), 0)
    for _ in range(300):
        transform = augmentation.draw(generator)
        matching = [
            name
            for name in seen
            if torch.equal(transform(images), _Drawn(SiameseAugmentation(name, flip=1.0), transform.numbers)(images))
        ]
        assert len(matching) == 1
        seen[matching[0]] += 1
    assert all(70 < times < 130 for times in seen.values())


@every_transform
@pytest.mark.parametrize("num_images", [None, 3])
def test_gradients(generator, name, num_images):
    images = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    transform = SiameseAugmentation(name, flip=1.0).draw(generator, num_images)
    assert torch.autograd.gradcheck(transform, images)
    assert torch.autograd.gradgradcheck(lambda each: transform(each).square(), images, fast_mode=True)


@every_transform
@pytest.mark.parametrize("num_images", [None, 6])
def test_torch_func(images, generator, name, num_images):
    transform = SiameseAugmentation(name).draw(generator, num_images)
    stacked = torch.stack([images, 2 * images])

    def loss(each):
        return transform(each).pow(3).sum()

    expected = torch.stack([transform(each) for each in stacked])
    torch.testing.assert_close(torch.func.vmap(transform)(stacked), expected)
    gradients = torch.stack([torch.autograd.grad(loss(each), each)[0] for each in stacked.clone().requires_grad_()])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(stacked), gradients)


@every_transform
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("num_images", [None, 6])
def test_floating_types(images, generator, name, dtype, tolerance, num_images):
    transform = SiameseAugmentation(name).draw(generator, num_images)
    rounded = images.to(dtype)
    result = transform(rounded)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), transform(rounded.double()), atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_images", [None, 6])
@every_transform
def test_the_same_on_a_gpu(images, generator, name, num_images):
    transform = SiameseAugmentation(name).draw(generator, num_images)
    torch.testing.assert_close(transform(images.cuda()).cpu(), transform(images))


@pytest.mark.parametrize("num_images", [None, 5])
def test_the_generator_decides_and_nothing_else(num_images):
    augmentation = SiameseAugmentation()
    images = torch.ones(5, 1, 8, 8)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 7, 8)]
    first, same, other = (
        [augmentation.draw(generator, num_images)(images) for _ in range(4)] for generator in generators
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.stack(first), torch.stack(same))
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_the_stream_does_not_depend_on_the_strategy():
    states = []
    for strategy in ("flip", "color_rotate", "color_crop_cutout_flip_scale_rotate"):
        generator = torch.Generator().manual_seed(0)
        SiameseAugmentation(strategy).draw(generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_images_are_left_as_they_were(images):
    before = images.clone()
    for name in NAMES:
        SiameseAugmentation(name).draw(torch.Generator().manual_seed(0))(images)
    SiameseAugmentation().draw(torch.Generator().manual_seed(0), 6)(images)
    assert torch.equal(images, before)


def test_mnist_evaluation():
    augmentation = SiameseAugmentation.mnist_evaluation()
    assert augmentation.names == ("crop", "scale", "rotate")
    assert (augmentation.scale, augmentation.rotate) == ((0.8, 1.2), 45.0)
    assert int(28 * augmentation.crop + 0.5) == 4


@pytest.mark.parametrize("strategy", ["none", "", "crop_shear", "crop-flip", "Flip", "flip_crop_flip", "flip_", None])
def test_unknown_strategies(strategy):
    message = (
        r"Expected `strategy` to be some of \['color', 'crop', 'cutout', 'flip', 'scale', 'rotate'\], each at most "
        rf"once, joined by '_', but got {strategy!r}\."
    )
    with pytest.raises(ValueError, match=message):
        SiameseAugmentation(strategy)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"brightness": -0.1}, "`brightness` of at least 0, but got -0.1"),
        ({"saturation": math.inf}, "`saturation` of at least 0, but got inf"),
        ({"contrast": math.nan}, "`contrast` of at least 0, but got nan"),
        ({"crop": 0}, "`crop` to be positive and finite, but got 0"),
        ({"crop": 4}, "`crop` of at most 1, but got 4"),
        ({"cutout": "half"}, "`cutout` to be positive and finite, but got 'half'"),
        ({"flip": True}, "`flip` to be positive and finite, but got True"),
        ({"rotate": 181}, "`rotate` of at most 180, but got 181"),
        ({"scale": 1.2}, "`scale` as two numbers, but got 1.2"),
        ({"scale": ("a", 2)}, r"`scale` as two numbers, but got \('a', 2\)"),
        ({"scale": (True, 2)}, r"`scale` as two numbers, but got \(True, 2\)"),
        ({"scale": (0, 1.2)}, r"`scale` as two positive factors, the smaller first, but got \(0, 1.2\)"),
        ({"scale": (1.2, 0.8)}, r"`scale` as two positive factors, the smaller first, but got \(1.2, 0.8\)"),
    ],
)
def test_sizes_out_of_range(sizes, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        SiameseAugmentation(**sizes)


def test_what_draw_and_its_function_refuse(generator):
    augmentation = SiameseAugmentation()
    with pytest.raises(ValueError, match=r"Expected `generator` to be a torch.Generator on the CPU, but got 3"):
        augmentation.draw(3)
    with pytest.raises(ValueError, match="Expected `num_images` to be a whole number of at least 1, but got 0"):
        augmentation.draw(generator, 0)
    single, each = augmentation.draw(generator), augmentation.draw(generator, 4)
    with pytest.raises(ValueError, match=r"Expected `images` as normalised floating .*, but got torch.uint8"):
        single(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"Expected `images` of shape \(\.\.\., C, H, W\), but got \(8, 8\)"):
        single(torch.zeros(8, 8))
    for shape in [(3, 1, 8, 8), (1, 8, 8), (4, 3, 1, 8, 8)]:
        with pytest.raises(ValueError, match=r"shape \(\.\.\., 4, C, H, W\), since 4 transforms were drawn"):
            each(torch.zeros(shape))


def test_one_transform_for_all_images_or_one_for_each(generator):
    """With parameters of their own in both cases."""
    together = SiameseAugmentation("crop_scale_rotate").draw(generator, 200)
    assert len(set(together.choices)) == 1
    assert len(together.numbers[:, 4].unique()) == 200
    apart = SiameseAugmentation("crop_scale_rotate", same=False).draw(generator, 200)
    assert set(apart.choices) == {0, 1, 2}
    assert not SiameseAugmentation.mnist_evaluation().same
    kinds = {SiameseAugmentation("crop_scale_rotate").draw(generator, 2).choices[0] for _ in range(50)}
    assert kinds == {0, 1, 2}, "another one in each call"
    with pytest.raises(ValueError, match="Expected `same` to be True or False, but got 1"):
        SiameseAugmentation(same=1)


@pytest.mark.parametrize(
    ("dataset", "strategy"),
    [
        *[(name, "color_crop_cutout_flip_scale_rotate") for name in ("fashion_mnist", "cifar10", "cifar100", "own")],
        *[(name, "color_crop_cutout_scale_rotate") for name in ("mnist", "svhn")],
    ],
)
def test_transforms_of_the_paper(dataset, strategy):
    assert SiameseAugmentation.dsa(dataset) == SiameseAugmentation(strategy)
