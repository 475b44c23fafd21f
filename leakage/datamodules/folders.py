"""Folders of images, one folder per class."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor

from leakage.datamodules.benchmarks import data_folder

# Those of the extensions that torchvision knows, and GIF, which bears them now and then. Pillow would hand others to
# programs such as Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pixels of an image that is not scaled; of one that is, Pillow's own limit holds (89 million). Decoding takes up to 8
# bytes for each, and an attack many times that for each victim.
_MOST_PIXELS = 2**24


def parts_of(folder: Path) -> dict[str, Path]:
    """The folders of the training and of the test images, where ``train/`` and ``test/`` inside hold class folders."""
    parts = {name: folder / name for name in ("train", "test")}
    both = all(part.is_dir() and any(entry.is_dir() for entry in part.iterdir()) for part in parts.values())
    return parts if both else {}


def find_faces(root: str | os.PathLike[str] | None) -> Path:
    """The folder of LFW's persons: ``root``, or the archive's folder in it, also within torchvision's ``lfw-py``."""
    within, archives = data_folder(root), ("lfw", "lfw_funneled", "lfw-deepfunneled")
    for place in (within / parent / name for parent in ("", "lfw-py") for name in archives):
        if place.is_dir():
            return place
    if root is None or not within.is_dir():
        raise FileNotFoundError(
            f"Expected the LFW faces (one folder per person) in '{within}', as one of {list(archives)}, but got none. "
            "They can't be downloaded automatically: unpack the archive there, or say where it lies with `root` or "
            "the environment variable LEAKAGE_DATA."
        )
    return within


def open_folder(folder: Path, *, image_size: tuple[int, int] | None, channels: int) -> datasets.ImageFolder:
    """A folder in ImageFolder layout, each image decoded when it is asked for, to uint8 ``(C, H, W)``.

    Raises:
        FileNotFoundError: a folder without class folders or images.
        ValueError: fewer than two classes, or a folder that is there twice; when an image is asked for, one that
            can't be decoded.
    """
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
        images = datasets.ImageFolder(folder, loader=loader, transform=pil_to_tensor)
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
