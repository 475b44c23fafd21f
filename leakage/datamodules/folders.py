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

# The formats of the extensions that torchvision accepts, and GIF, which files with these extensions sometimes contain.
# Pillow would pass other formats to programs such as Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# The most pixels of an image that is not scaled; for one that is, Pillow's own limit applies (89 million). Decoding
# takes up to 8 bytes per pixel, and an attack many times that for each victim.
_MOST_PIXELS = 2**24


def parts_of(folder: Path) -> dict[str, Path]:
    """Return the subfolders ``train/`` and ``test/`` by name if both hold class folders, else an empty dictionary."""
    parts = {name: folder / name for name in ("train", "test")}
    both = all(part.is_dir() and any(entry.is_dir() for entry in part.iterdir()) for part in parts.values())
    return parts if both else {}


def find_faces(root: str | os.PathLike[str] | None) -> Path:
    """Find the folder of LFW's persons: an archive's folder in ``root`` or in its ``lfw-py``, else ``root``."""
    within, archives = data_folder(root), ("lfw", "lfw_funneled", "lfw-deepfunneled")
    for place in (within / parent / name for parent in ("", "lfw-py") for name in archives):
        if place.is_dir():
            return place
    if root is None or not within.is_dir():
        raise FileNotFoundError(
            f"Expected the LFW faces (one folder per person) in '{within}', as one of {list(archives)}, but got none. "
            "They can't be downloaded automatically: unpack the archive there, or give its folder with `root` or the "
            "environment variable LEAKAGE_DATA."
        )
    return within


def open_folder(folder: Path, *, image_size: tuple[int, int] | None, channels: int) -> datasets.ImageFolder:
    """Open a folder in ImageFolder layout. Each image is decoded to uint8 ``(C, H, W)`` when it is accessed.

    Raises:
        FileNotFoundError: the folder has no class folders or no images.
        ValueError: there are fewer than two classes, or links lead to the same folder twice; on access, the image
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
        raise OSError(f"Expected readable folders in '{folder}', but got: {error}") from error
    if len(images.classes) < 2:
        raise ValueError(
            f"Expected at least two class folders in '{folder}', but got only {images.classes}: with one "
            "class every gradient is zero."
        )
    return images


def _check_links(folder: Path) -> None:
    """Raise a ``ValueError`` if links lead to the same folder twice, in a circle or by two paths."""
    seen: dict[tuple[int, int], str] = {}
    for place, _, _ in os.walk(folder, followlinks=True):
        status = Path(place).stat()
        first = seen.setdefault((status.st_dev, status.st_ino), place)
        if first != place:
            raise ValueError(f"Expected each folder below '{folder}' once, but got '{first}' again as '{place}'.")


def _decode(path: str, *, size: tuple[int, int] | None, channels: int) -> Image.Image:
    """Decode an 8-bit image file, then scale and crop it."""
    try:
        if not Path(path).is_file():  # reading a pipe might never end
            raise ValueError("no such file, or not a regular file")
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            file = Image.open(path, formats=_FORMATS)
        with file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"mode {file.mode}, with more than 8 bits per channel")
            if size is None and file.width * file.height > _MOST_PIXELS:
                raise ValueError(f"{file.width} x {file.height} pixels, more than 2**24. Set `image_size`.")
            image = file.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, ...
        raise ValueError(f"Expected an 8-bit image in '{path}', but got: {error}") from error
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BILINEAR)
    return image
