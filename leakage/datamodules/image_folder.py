"""Folders of images, one folder per class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import to_tensor

from leakage.datamodules.images import ImageVictims, LabelledImages, data_folder
from leakage.errors import check_image_size

# Those of the extensions that torchvision knows, and GIF, which bears them now and then. Pillow would hand others to
# programs such as Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pixels of an image that is not scaled; of one that is, Pillow's own limit holds (89 million). Decoding takes up to 8
# bytes for each, and an attack many times that for each victim.
_MOST_PIXELS = 2**24


class ImageFolderVictims(ImageVictims):
    """Victims of any folder in ImageFolder layout, ``root/<class>/<image>``.

    Classes are numbered in the order of their folders' names. The images of all victims are
    decoded once at ``setup``, so that none of them can fail during the attack.

    Args:
        root: the folder of the class folders.
        image_size: height and width in pixels, one number for square images; images are scaled
            (bilinear, with antialiasing) and cropped around the centre to fit. By default
            they stay as they are, and must all be of one size, of at most 2**24 pixels. No image may have
            more than Pillow's limit for safety, 89 million.
        channels: 3 for RGB or 1 for grey, converted where needed.
        **kwargs: as for :class:`~leakage.datamodules.images.ImageVictims`.

    Raises:
        ValueError: another ``image_size`` or ``channels``; a corrupt or enormous image (the message names the
            file), images of different sizes, fewer than two classes, links in circles, and as
            :class:`~leakage.datamodules.images.ImageVictims`.
        FileNotFoundError: no such folder, or one without class folders or images.

    Example:
        >>> data = ImageFolderVictims("photos", image_size=32, victims=10)
        >>> data.setup("fit")  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int | tuple[int, int] | None = None,
        channels: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.image_size, self.channels = check_size_and_channels(image_size, channels)

    def check_images(self, indices: list[int], image_shape: tuple[int, ...]) -> None:
        """Decode the images of all victims once, to find the faulty ones before the attack."""
        for index in indices:
            check_same_size(self._images[index][0], image_shape, self._files[index])

    def find_folder(self) -> Path:
        """The folder of the class folders."""
        return self.root

    def open_images(self) -> tuple[LabelledImages, int]:
        """The images, each decoded when it is asked for, and the number of class folders."""
        images = open_folder(
            self.find_folder(), image_size=self.image_size, channels=self.channels, transform=to_tensor
        )
        self._files = [path for path, _ in images.samples]
        return images, len(images.classes)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """As in the base class, with size and channels."""
        return super().configuration | {"image_size": self.image_size, "channels": self.channels}


class LFWVictims(ImageFolderVictims):
    """Labelled Faces in the Wild: 13,233 photographs of 5,749 persons, scaled to (3, 32, 32).

    The number of classes is the number of persons' folders found. The networks are large (4.4
    million parameters each with 5,749 persons), so few of them fit into the lanes.

    Args:
        root: the folder of the persons' folders, or one that holds it as ``lfw``,
            ``lfw_funneled`` or ``lfw-deepfunneled`` (also within ``lfw-py``, as torchvision has
            it); by default the environment variable ``LEAKAGE_DATA``, else ``~/.cache/leakage``.
            Nothing is downloaded: the original server is gone.
        image_size: as for :class:`ImageFolderVictims`.
        **kwargs: as for :class:`ImageFolderVictims`.

    Raises:
        FileNotFoundError: the faces are not there.

    References:
        Huang et al., *Labeled Faces in the Wild*, 2007.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        image_size: int | tuple[int, int] | None = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_folder(root), image_size=image_size, **kwargs)
        self._root_given = root is not None

    def find_folder(self) -> Path:
        """The folder of the persons' folders."""
        archives = ("lfw", "lfw_funneled", "lfw-deepfunneled")
        for place in (self.root / parent / name for parent in ("", "lfw-py") for name in archives):
            if place.is_dir():
                return place
        if not (self._root_given and self.root.is_dir()):
            raise FileNotFoundError(
                f"Expected the LFW faces (one folder per person) in '{self.root}', as one of "
                f"{list(archives)}, but got none. They can't be downloaded automatically: unpack the archive "
                "there, or say where it lies with `root` or the environment variable LEAKAGE_DATA."
            )
        return self.root


def check_size_and_channels(
    image_size: int | tuple[int, int] | None, channels: int
) -> tuple[tuple[int, int] | None, int]:
    """Height and width, None for those of the files, and channels; a ``ValueError`` if they are neither."""
    if channels not in (1, 3):
        raise ValueError(f"Expected `channels` to be 1 or 3, but got {channels!r}.")
    return None if image_size is None else check_image_size(image_size), channels


def check_same_size(image: Tensor, image_shape: tuple[int, ...], path: str) -> None:
    """Raise a ``ValueError`` naming ``path`` unless its ``image`` has ``image_shape``, that of the first."""
    if tuple(image.shape) != image_shape:
        raise ValueError(
            f"Expected images of one size, but got {image_shape} and {tuple(image.shape)} in '{path}'. "
            "Set `image_size`."
        )


def open_folder(
    folder: Path,
    *,
    image_size: tuple[int, int] | None,
    channels: int,
    transform: Callable[[Image.Image], Tensor],
    argument: str = "root",
) -> datasets.ImageFolder:
    """A folder in ImageFolder layout, each image decoded when it is asked for.

    Args:
        folder: the folder of the class folders.
        image_size: height and width to scale and crop to, None for those of the files.
        channels: 1 or 3.
        transform: what makes a tensor of an image.
        argument: what the caller's user calls the folder.

    Raises:
        FileNotFoundError: no such folder, or one without class folders or images.
        ValueError: fewer than two classes, or a folder that is there twice; when an image is asked for, one that
            can't be decoded.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected `{argument}` to be a folder of images, but got no folder '{folder}'.")
    entries = list(folder.iterdir())
    if not any(entry.is_dir() for entry in entries):
        loose = sum(entry.suffix.lower() in IMG_EXTENSIONS for entry in entries)
        found = f"{loose} images without class folders" if loose else "none"
        raise FileNotFoundError(
            f"Expected class folders of images in '{folder}', but got {found}. The layout is <folder>/<class>/<image>."
        )
    _check_links(folder)
    loader = partial(_decode, size=image_size, channels=channels)
    try:
        images = datasets.ImageFolder(folder, loader=loader, transform=transform)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Expected images in every folder of '{folder}', but got: {error}.") from error
    except OSError as error:  # such as a link to itself
        raise OSError(f"Expected folders in '{folder}' that can be read, but got: {error}") from error
    if len(images.classes) < 2:
        raise ValueError(
            f"Expected at least two class folders in '{folder}', but got only {images.classes}: with one "
            "class every gradient is zero."
        )
    return images


def _check_links(folder: Path) -> None:
    """Raise a ``ValueError`` for links that lead to a folder twice: in circles, or to ever more of the same images."""
    seen: dict[tuple[int, int], str] = {}
    for place, _, _ in os.walk(folder, followlinks=True):
        status = Path(place).stat()
        first = seen.setdefault((status.st_dev, status.st_ino), place)
        if first != place:
            raise ValueError(f"Expected each folder below '{folder}' once, but got '{first}' as '{place}' again.")


def _decode(path: str, *, size: tuple[int, int] | None, channels: int) -> Image.Image:
    """An image file of 8 bits, scaled and cropped."""
    try:
        if not Path(path).is_file():  # reading a pipe might never end
            raise ValueError("no such file, or none of bytes")
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            file = Image.open(path, formats=_FORMATS)
        with file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"mode {file.mode}, of more than 8 bits per channel")
            if size is None and file.width * file.height > _MOST_PIXELS:
                raise ValueError(f"{file.width} x {file.height} pixels, more than 2**24. Set `image_size`.")
            image = file.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, ...
        raise ValueError(f"Expected an 8-bit image in '{path}', but got: {error}") from error
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BILINEAR)
    return image
