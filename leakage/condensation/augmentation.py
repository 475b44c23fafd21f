"""Differentiable siamese augmentation: the same random transform for real and synthetic images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.errors import check_count, check_flag, check_not_negative, check_pair, check_positive

# The transforms, and how many random numbers each needs, in the order of the columns of random numbers.
_NUMBERS = {"color": 3, "crop": 2, "cutout": 2, "flip": 1, "scale": 2, "rotate": 1}
# Data sets of digits, whose meaning a mirror image changes.
_DIGITS = ("mnist", "svhn")


@dataclass
class SiameseAugmentation:
    r"""Differentiable siamese augmentation (DSA): random transforms that gradients pass through.

    Condensation matches the gradient of synthetic images S with that of real images T, both under the same transform
    :math:`A_\omega`, and differentiates through the transform with respect to the synthetic images:

    .. math:: \min_S D(\nabla_\theta L(A_\omega(S), \theta), \nabla_\theta L(A_\omega(T), \theta))

    Each call of :meth:`draw` chooses one of the transforms in ``strategy`` and its parameters :math:`\omega`:

    ========== =====================================================================================================
    color      adds :math:`b \sim U(-\tfrac12, \tfrac12)` ``brightness``; multiplies the difference from the mean over
               the channels by :math:`U(0, 1)` ``saturation``, and the difference from the mean over the image by
               ``contrast`` + U(0, 1)
    crop       shifts by whole pixels, by up to ``crop`` of each side in each direction, and fills with zeros
    cutout     sets a rectangle, ``cutout`` of each side, to zero; its centre is anywhere, the border clips it
    flip       mirrors left and right with probability ``flip``
    scale      scales height and width about the centre by separate factors, both uniform in ``scale``
    rotate     rotates about the centre, by up to ``rotate`` degrees either way
    ========== =====================================================================================================

    Zero is the mean colour of the data set, since images are normalised. ``scale`` and ``rotate`` sample bilinearly
    with a single gather, and are zero outside the image. Torchvision's transforms take the same parameters for all
    images of a call and one scale for both axes, and ``grid_sample`` cannot be differentiated twice in torch 2.6.

    Args:
        strategy: names of transforms, each at most once, joined by ``_``.
        brightness: width of the interval of the added value, at least 0, in units of the normalised images.
        saturation: largest saturation factor, at least 0. It does not change images of one channel.
        contrast: smallest contrast factor, at least 0; the largest is greater by 1.
        crop: largest shift as a fraction of the side, above 0 and at most 1, rounded to whole pixels.
        cutout: side of the rectangle as a fraction of the image's side, above 0 and at most 1, rounded to whole pixels.
        flip: probability of the mirror image, above 0 and at most 1.
        scale: smallest and largest factor, positive.
        rotate: largest angle in degrees, above 0 and at most 180.
        same: for calls of :meth:`draw` with ``num_images``: whether all images go through the same transform, each
            with its own parameters, as when DSA trains networks. Otherwise a transform is chosen for each image.

    Raises:
        ValueError: a name is not a transform or occurs twice, or a number is outside its range.

    References:
        Zhao and Bilen, *Dataset Condensation with Differentiable Siamese Augmentation*, ICML 2021,
        https://arxiv.org/abs/2102.08259.

    Example:
        >>> transform = SiameseAugmentation("crop_flip").draw(torch.Generator().manual_seed(0))
        >>> real, synthetic = torch.randn(256, 3, 32, 32), torch.randn(10, 3, 32, 32)
        >>> transform(real).shape, transform(synthetic).shape
        (torch.Size([256, 3, 32, 32]), torch.Size([10, 3, 32, 32]))
        >>> torch.equal(transform(real)[:10], transform(real[:10]))
        True
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"
    _: KW_ONLY
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    cutout: float = 0.5
    flip: float = 0.5
    scale: tuple[float, float] = (1 / 1.2, 1.2)
    rotate: float = 15.0
    same: bool = True

    def __post_init__(self) -> None:
        names = self.names if isinstance(self.strategy, str) else ()
        if not names or not set(names) <= _NUMBERS.keys() or len(set(names)) < len(names):
            raise ValueError(
                f"Expected `strategy` to be some of {list(_NUMBERS)}, each at most once, joined by '_', "
                f"but got {self.strategy!r}."
            )
        check_flag(same=self.same)
        check_not_negative(brightness=self.brightness, saturation=self.saturation, contrast=self.contrast)
        limited = {"crop": 1, "cutout": 1, "flip": 1, "rotate": 180}
        check_positive(**{name: getattr(self, name) for name in limited})
        for name, limit in limited.items():
            if getattr(self, name) > limit:
                raise ValueError(f"Expected `{name}` of at most {limit}, but got {getattr(self, name)!r}.")
        low, high = check_pair(scale=self.scale)
        if not 0 < low <= high < math.inf:
            raise ValueError(f"Expected `scale` as two positive factors, the smaller first, but got {self.scale!r}.")
        self.scale = (low, high)

    @property
    def names(self) -> tuple[str, ...]:
        """The transforms."""
        return tuple(self.strategy.split("_"))

    @classmethod
    def mnist_evaluation(cls) -> SiameseAugmentation:
        """Return the augmentation with which Dataset Condensation evaluates on MNIST: crop, scale or rotate.

        Shifts of up to 4 of 28 pixels, factors in [0.8, 1.2] and angles of up to 45 degrees. The transform is drawn
        separately for each image (``num_images`` of :meth:`draw`).

        References:
            Zhao, Mopuri and Bilen, *Dataset Condensation with Gradient Matching*, ICLR 2021,
            https://arxiv.org/abs/2006.05929.

        Example:
            >>> transform = SiameseAugmentation.mnist_evaluation().draw(torch.Generator().manual_seed(0), 10)
            >>> transform(torch.randn(10, 1, 28, 28)).shape
            torch.Size([10, 1, 28, 28])
        """
        return cls("crop_scale_rotate", crop=0.125, scale=(0.8, 1.2), rotate=45.0, same=False)

    @classmethod
    def dsa(cls, dataset: str) -> SiameseAugmentation:
        """Return DSA's augmentation for a data set: all transforms, but no flip for the digits of MNIST and SVHN.

        References:
            Zhao and Bilen, *Dataset Condensation with Differentiable Siamese Augmentation*, ICML 2021,
            https://arxiv.org/abs/2102.08259; its code, https://github.com/VICO-UoE/DatasetCondensation.

        Example:
            >>> SiameseAugmentation.dsa("mnist").strategy
            'color_crop_cutout_scale_rotate'
        """
        return cls("_".join(name for name in _NUMBERS if name != "flip" or dataset not in _DIGITS))

    def draw(self, generator: torch.Generator, num_images: int | None = None) -> Callable[[Tensor], Tensor]:
        """Draw a random transform: one for all images, or one for each of ``num_images`` images.

        Args:
            generator: a generator on the CPU, so that the transforms are the same for images on any device. The number
                of random numbers that a call takes does not depend on the strategy or the chosen transform.
            num_images: None to apply one transform to every image; a number to draw parameters for each image, and,
                unless :attr:`same`, also a transform for each.

        Returns:
            A deterministic function of normalised images of any floating type on any device. It takes
            ``(..., C, H, W)`` with one transform, ``(..., num_images, C, H, W)`` with one per image, and returns the
            same shape and type. It is affine in the images, so it can be differentiated any number of times, also
            under ``torch.func``.

        Raises:
            ValueError: the generator is not a generator on the CPU, or ``num_images`` is below 1; when the function is
                called, the images have another shape or type.

        Example:
            >>> transform = SiameseAugmentation("rotate").draw(torch.Generator().manual_seed(0), num_images=2)
            >>> same = torch.ones(2, 1, 8, 8)
            >>> torch.equal(*transform(same))
            False
        """
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            got = getattr(generator, "device", generator)
            raise ValueError(f"Expected `generator` to be a torch.Generator on the CPU, but got {got!r}.")
        if num_images is not None:
            check_count(num_images=num_images)
        shape = () if num_images is None else (num_images,)
        numbers = torch.rand(*shape, 1 + sum(_NUMBERS.values()), generator=generator, dtype=torch.float64)
        if self.same and num_images is not None:
            numbers[:, 0] = numbers[0, 0].clone()
        return _Drawn(self, numbers)

    def _color(self, images: Tensor, numbers: Tensor) -> Tensor:
        brightness = _as_images((numbers[..., 0] - 0.5) * self.brightness, images)
        saturation = _as_images(numbers[..., 1] * self.saturation, images)
        contrast = _as_images(numbers[..., 2] + self.contrast, images)
        images = images + brightness
        grey = images.mean(-3, keepdim=True)
        images = (images - grey) * saturation + grey
        mean = images.mean((-3, -2, -1), keepdim=True)
        return (images - mean) * contrast + mean

    def _crop(self, images: Tensor, numbers: Tensor) -> Tensor:
        # The shifts are whole numbers computed on the CPU in double precision, so no device rounds them differently.
        down, right = (
            _per_pixel((number * (2 * most + 1)).floor().long() - most, images.device)
            for number, most in zip(numbers.unbind(-1), _parts(self.crop, images), strict=True)
        )
        rows, columns = _grid(images, torch.int64)
        return _pixels(images)(rows - down, columns - right)

    def _cutout(self, images: Tensor, numbers: Tensor) -> Tensor:
        inside = []
        for number, side, length, positions in zip(
            numbers.unbind(-1), _parts(self.cutout, images), images.shape[-2:], _grid(images, torch.int64), strict=True
        ):
            # For odd sides the centre is a pixel; for even sides a corner between pixels, of which there is one more.
            centre = (number * (length + 1 - side % 2)).floor().long()
            start = _per_pixel(centre - side // 2, images.device)
            inside.append((start <= positions) & (positions < start + side))
        return torch.where((inside[0] & inside[1]).unsqueeze(-3), 0, images)

    def _flip(self, images: Tensor, numbers: Tensor) -> Tensor:
        mirrored = _per_pixel(numbers[..., 0] < self.flip, images.device).unsqueeze(-3)
        return torch.where(mirrored, images.flip(-1), images)

    def _scale(self, images: Tensor, numbers: Tensor) -> Tensor:
        low, high = self.scale
        inverse = 1 / (low + numbers * (high - low))
        zero = torch.zeros_like(inverse[..., 0])
        return _affine(images, inverse[..., 0], zero, zero, inverse[..., 1])

    def _rotate(self, images: Tensor, numbers: Tensor) -> Tensor:
        angle = (2 * numbers[..., 0] - 1) * math.radians(self.rotate)
        return _affine(images, angle.cos(), angle.sin(), -angle.sin(), angle.cos())


class _Drawn:
    """An augmentation with its random numbers in [0, 1), ``(D,)`` for one transform or ``(M, D)`` for one per image."""

    def __init__(self, augmentation: SiameseAugmentation, numbers: Tensor) -> None:
        self.augmentation = augmentation
        self.numbers = numbers
        # Convert to plain numbers here: under torch.func no tensor reveals its values, even one not transformed.
        choices = (numbers[..., 0] * len(augmentation.names)).long().reshape(-1)
        self.choices: list[int] = choices.tolist()
        self.order = choices.argsort(stable=True)
        self.places = self.order.argsort()

    def __call__(self, images: Tensor) -> Tensor:
        """Transform the images."""
        self._check(images)
        names = self.augmentation.names
        if self.numbers.ndim == 1:
            return self._apply(names[self.choices[0]], images, self.numbers)
        # Transform images with the same choice together, then restore their order.
        sizes = [self.choices.count(choice) for choice in range(len(names))]
        groups = torch.split(images.index_select(-4, self.order.to(images.device)), sizes, -4)
        numbers = torch.split(self.numbers[self.order], sizes)
        transformed = [
            self._apply(name, group, own) for name, group, own in zip(names, groups, numbers, strict=True) if len(own)
        ]
        return torch.cat(transformed, -4).index_select(-4, self.places.to(images.device))

    def _apply(self, name: str, images: Tensor, numbers: Tensor) -> Tensor:
        before = list(_NUMBERS)[: list(_NUMBERS).index(name)]
        start = 1 + sum(_NUMBERS[other] for other in before)
        transform: Callable[[Tensor, Tensor], Tensor] = getattr(self.augmentation, f"_{name}")
        return transform(images, numbers[..., start : start + _NUMBERS[name]])

    def _check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise ValueError(f"Expected `images` as normalised floating point numbers, but got {images.dtype}.")
        if self.numbers.ndim == 1:
            if images.ndim < 3:
                raise ValueError(f"Expected `images` of shape (..., C, H, W), but got {tuple(images.shape)}.")
        elif images.ndim < 4 or images.shape[-4] != len(self.numbers):
            raise ValueError(
                f"Expected `images` of shape (..., {len(self.numbers)}, C, H, W), since {len(self.numbers)} transforms "
                f"were drawn, but got {tuple(images.shape)}."
            )


def _parts(part: float, images: Tensor) -> tuple[int, int]:
    """Return a fraction of the height and of the width in whole pixels, with halves rounded up."""
    return int(images.shape[-2] * part + 0.5), int(images.shape[-1] * part + 0.5)


def _as_images(values: Tensor, images: Tensor) -> Tensor:
    """Reshape numbers ``()`` or ``(M,)`` to ``(1, 1, 1)`` or ``(M, 1, 1, 1)``, with type and device of the images."""
    return values.to(images.dtype).to(images.device)[..., None, None, None]


def _per_pixel(values: Tensor, device: torch.device) -> Tensor:
    """Reshape numbers ``()`` or ``(M,)`` to ``(1, 1)`` or ``(M, 1, 1)``, to broadcast with pixel positions."""
    return values.to(device)[..., None, None]


def _grid(images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the rows ``(H, 1)`` and columns ``(1, W)`` of the pixels."""
    rows, columns = (torch.arange(side, device=images.device, dtype=dtype) for side in images.shape[-2:])
    return rows[:, None], columns[None, :]


def _pixels(images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that looks up pixels by whole rows and columns, and gives zero outside the image.

    Rows and columns broadcast to ``(H, W)``, or to ``(M, H, W)`` if each image has its own positions.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images.flatten(-2), (0, 1))  # one zero, which stands for all positions outside

    def take(rows: Tensor, columns: Tensor) -> Tensor:
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        places = torch.where(inside, rows * width + columns, height * width).flatten(-2).unsqueeze(-2)
        places = places.expand(*images.shape[:-2], height * width)
        return padded.gather(-1, places).reshape(images.shape)

    return take


def _affine(images: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Sample images bilinearly: pixel (y, x), from the centre, is taken from (a y + b x, c y + d x), zero outside."""
    dtype = torch.promote_types(images.dtype, torch.float32)  # the 8 bits of bfloat16 are too few for pixel positions
    a, b, c, d = (_per_pixel(entry.to(dtype), images.device) for entry in (a, b, c, d))
    rows, columns = _grid(images, dtype)
    middle, centre = (images.shape[-2] - 1) / 2, (images.shape[-1] - 1) / 2
    y = a * (rows - middle) + b * (columns - centre) + middle
    x = c * (rows - middle) + d * (columns - centre) + centre
    top, left = y.floor(), x.floor()
    down, right = (y - top).unsqueeze(-3), (x - left).unsqueeze(-3)
    top, left = top.long(), left.long()
    take = _pixels(images)
    upper = take(top, left) * (1 - right) + take(top, left + 1) * right
    lower = take(top + 1, left) * (1 - right) + take(top + 1, left + 1) * right
    return (upper * (1 - down) + lower * down).to(images.dtype)
