"""Fuzzed image folders: broken, misnamed, huge and odd images, circular links, names of any bytes."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from fuzz_common import BrokenError, Outcome, attempt, mutated_bytes
from fuzz_tensor_files import with_code
from hypothesis import strategies as st
from PIL import Image

from leakage.datamodules import LabelledImages, Victims

# The path of a file below the folder, its type, and its bytes or the target of the link.
_Entry = tuple[bytes, str, Any]
_FORMATS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "EPS", "ICO", "TGA", "PCX", "PDF"]
_MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"]
_EXTENSIONS = [".png", ".jpg", ".JPEG", ".bmp", ".ppm", ".pgm", ".tif", ".webp", ".gif", ".txt", "", ".png.bak"]
_NAMES = [
    "x",
    "a b",
    "-rf",
    "é漢",
    "line\nbreak",
    "'quoted\"",
    "%s{}",
    "\udcff\udcfe",
    "n" * 200,
    ".hidden",
    "CON",
    "~",
]
_SIZES = [(8, 8), (8, 8), (8, 8), (1, 1), (1, 3000), (3000, 1), (9, 8), (40, 20)]


@lru_cache(maxsize=200)
def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (8, 8), frames: int = 1) -> bytes:
    """Create an image file; b"" if the format does not support the mode."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    try:
        image = Image.fromarray(pixels.numpy()).convert(mode)
        file = io.BytesIO()
        more = {"save_all": True, "append_images": [image.rotate(90)] * (frames - 1)} if frames > 1 else {}
        image.save(file, kind, **more)
    except (OSError, ValueError, KeyError):
        return b""
    return file.getvalue()


def huge_png(width: int, height: int, rows: int = 1) -> bytes:
    """Create a 1-bit PNG whose header claims this size, with ``rows`` rows of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * min(rows * (width // 8 + 2), 2**26))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _contents(marker: Path) -> st.SearchStrategy[bytes]:
    kinds = st.sampled_from(_FORMATS)
    postscript = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({marker}) (w) file closefile\nshowpage\n%%EOF\n"
    text = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x10zTXta\0\0" + zlib.compress(b"\0" * 10**7)
    return st.one_of(
        kinds.flatmap(lambda kind: mutated_bytes(picture(kind) or b"\0")),
        st.builds(picture, kinds, st.sampled_from(_MODES), st.sampled_from(_SIZES), st.sampled_from([1, 1, 3])),
        st.builds(
            huge_png,
            st.sampled_from([0, 8, 9_000, 12_000, 13_500, 65_000, 2**31 - 1]),
            st.sampled_from([0, 8, 9_000, 12_000, 13_500, 65_000, 2**31 - 1]),
            st.sampled_from([0, 1, 9_000]),
        ),
        st.sampled_from(
            [b"", b"\0" * 100, with_code(marker), postscript.encode(), text, b"<svg/>", b"P6 99999999 9999 255 "]
        ),
    )


def inputs(marker: Path) -> st.SearchStrategy[tuple[list[_Entry], dict[str, Any]]]:
    """Return entries to add to the valid images of a folder, and options to read it with."""
    stems = st.sampled_from(_NAMES) | st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=4)
    folders = st.sampled_from([b"cat/", b"cat/", b"dog/", b"dog/sub/", b"", b"empty/", b"bird/"])
    files = st.tuples(
        st.tuples(folders, stems, st.sampled_from(_EXTENSIONS) | st.just(".png")).map(_path),
        st.just("file"),
        _contents(marker),
    )
    links = st.tuples(
        st.sampled_from([b"cat/loop", b"dog/loop", b"cat/x.png", b"dog/other", b"loop", b"dog/sub.png"]),
        st.sampled_from(["link", "link", "link", "fifo", "folder"]),
        st.sampled_from(
            [b".", b"..", b"../cat", b"../dog", b"nowhere", b"x.png", b"/dev/zero", b"/dev/stdin", b"loop"]
        ),
    )
    options = st.fixed_dictionaries(
        {},
        optional={"image_size": st.sampled_from([None, 8, (3, 5)]), "channels": st.sampled_from([1, 3])},
    )
    return st.tuples(st.lists(st.one_of(files, files, links), min_size=1, max_size=4), options)


def _path(parts: tuple[bytes, str, str]) -> bytes:
    folder, stem, extension = parts
    return folder + stem.encode("utf-8", "surrogateescape" if "\udcff" in stem else "replace") + extension.encode()


def _lay_out(folder: Path, entries: list[_Entry]) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"{number}.png").write_bytes(picture())
    for name, kind, what in entries:
        path = os.path.join(os.fsencode(folder), name)  # noqa: PTH118 - names of any bytes
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
            if kind == "link":
                os.symlink(what, path)  # noqa: PTH211
            elif kind == "fifo":
                os.mkfifo(path)
            elif kind == "folder":
                os.makedirs(path)  # noqa: PTH103
            else:
                with open(path, "xb") as file:  # noqa: PTH123
                    file.write(what)
        except OSError:  # such as two entries with the same name
            continue


def check(entries: list[_Entry], options: dict[str, Any], folder: Path, marker: Path) -> Outcome:
    """Read a folder with these entries as labelled images and as victims."""
    root = folder / "photos"
    shutil.rmtree(root, ignore_errors=True)
    _lay_out(root, entries)

    def read() -> tuple[LabelledImages, Victims]:
        labelled = LabelledImages(root, **options)
        labelled.setup("fit")
        victims = Victims(root, victims=len(labelled.train) + len(labelled.test), **options)
        victims.setup("fit")
        return labelled, victims

    outcome = attempt(read, named=str(folder), marker=marker)
    if not outcome.refusal:
        labelled, victims = outcome.value
        if labelled.image_shape != victims.victim.protocol.image_shape:
            raise BrokenError(f"Expected images of one shape, but got {labelled.image_shape}.")
        found = len(labelled.train) + len(labelled.test)
        if found > 6 + len(entries):
            raise BrokenError(f"Expected each image once, but got {found} of {6 + len(entries)} files.")
    elif not entries:
        raise BrokenError(f"Expected a valid folder to be read, but got {outcome.refusal}.")
    return outcome
