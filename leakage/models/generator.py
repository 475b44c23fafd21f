"""A small generator of images."""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor, nn

from leakage.errors import check_count, check_image_size
from leakage.files.tensors import header_value, read_safetensors, shorten, write_safetensors

_FORMAT = "leakage.Generator"
_OPTIONS = ("channels", "image_size", "code_size", "width")


class Generator(nn.Module):
    """Generates images from codes: a linear layer, then two blocks of 2x upsampling and a convolution.

    The linear layer gives ``2 * width`` maps with a quarter of the image's sides. Two 3x3 convolutions with ``width``
    maps follow, each after nearest-neighbour upsampling by 2. A third convolution gives the channels of the image, and
    a sigmoid maps them to [0, 1]. The defaults have 231,841 parameters.
    :func:`leakage.dummies.training.trained_generator` trains a generator.

    Shapes: codes ``(N, code_size)``, standard normal; images ``(N, channels, *image_size)`` in [0, 1].

    Args:
        channels: channels of the images.
        image_size: height and width in pixels, multiples of 4; one number for square images.
        code_size: length of a code.
        width: number of maps of the last hidden layer.

    Raises:
        ValueError: a size or count is not a whole number of at least 1, or a side is not a multiple of 4.

    Example:
        >>> model = Generator(channels=3, image_size=32, code_size=128)
        >>> model(torch.randn(2, 128)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self, channels: int = 1, image_size: int | tuple[int, int] = 28, *, code_size: int = 64, width: int = 32
    ) -> None:
        super().__init__()
        check_count(channels=channels, code_size=code_size, width=width)
        height, width_of_images = check_image_size(image_size)
        if height % 4 or width_of_images % 4:
            raise ValueError(f"Expected `image_size` of multiples of 4, but got {image_size}.")
        maps = (2 * width, height // 4, width_of_images // 4)
        self.channels, self.image_size = channels, (height, width_of_images)
        self.code_size, self.width = code_size, width
        self.layers = nn.Sequential(
            nn.Linear(code_size, maps[0] * maps[1] * maps[2]),
            nn.Unflatten(1, maps),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Return the images ``(N, channels, *image_size)`` of codes ``(N, code_size)``."""
        images: Tensor = self.layers(codes)
        return images

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file of the weights, with the sizes in its header.

        Raises:
            OSError: the file can't be written.
        """
        header = {name: json.dumps(getattr(self, name)) for name in _OPTIONS}
        write_safetensors(path, _FORMAT, self.state_dict(), header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Generator:
        """Read a file that :meth:`save` wrote, and return the generator in evaluation mode.

        No code in the file is ever run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is of another kind, truncated, or its sizes and weights do not match.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as folder:
            ...     Generator(code_size=16).save(f"{folder}/generator.safetensors")
            ...     Generator.load(f"{folder}/generator.safetensors").code_size
            16
        """
        header, weights = read_safetensors(path, _FORMAT)
        try:
            with torch.device("meta"):  # no weights are drawn, and absurd sizes take no memory
                generator = cls(**{name: header_value(header, name) for name in _OPTIONS})
            generator.load_state_dict(weights, assign=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Expected a generator in '{path}', but got: {shorten(error)}") from error
        return generator.eval()


class Encoder(nn.Module):
    """Maps each image to the mean and log-variance of its code, for the training of a :class:`Generator`.

    Shapes: images ``(N, channels, *image_size)`` in [0, 1]; means and log-variances, each ``(N, code_size)``.
    """

    def __init__(self, channels: int, image_size: tuple[int, int], code_size: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * (image_size[0] // 4) * (image_size[1] // 4), 2 * code_size),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance of each code."""
        mean, log_variance = torch.chunk(self.layers(images), 2, dim=1)
        return mean, log_variance
