from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leakage.datamodules import LabelledImages, Victims


@settings(max_examples=50)
@given(data=st.data())
def test_a_folder_is_read_or_refused(fuzz: SimpleNamespace, folder: Path, marker: Path, data: st.DataObject) -> None:
    entries, options = data.draw(fuzz.image_folders.inputs(marker))
    fuzz.image_folders.check(entries, options, folder, marker)


@pytest.fixture
def photos(fuzz: SimpleNamespace, folder: Path, marker: Path) -> Path:
    assert not fuzz.image_folders.check([], {}, folder, marker).refusal
    return folder / "photos"


def refused(photos: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledImages(photos).setup("fit")
    with pytest.raises(ValueError, match=message):
        Victims(photos, victims=7).setup("fit")


def test_links_in_circles(photos: Path) -> None:
    """Two of them would give 2**40 folders."""
    for name in ("a", "b"):
        (photos / "cat" / name).symlink_to(".")
    refused(photos, r"Expected each folder below '.*photos' once, but got '.*cat' again as '.*cat/[ab]'")


def test_a_link_to_a_folder_that_is_nowhere_else_is_followed(photos: Path) -> None:
    (photos / "dog").rename(photos.parent / "elsewhere")
    (photos / "dog").symlink_to("../elsewhere")
    data = LabelledImages(photos)
    data.setup("fit")
    assert len(data.train) + len(data.test) == 6
    (photos.parent / "elsewhere").rename(photos.parent / "unused")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe(photos: Path) -> None:
    os.mkfifo(photos / "cat" / "x.png")
    refused(photos, r"Expected an 8-bit image in '.*x.png', but got: no such file, or not a regular file")


def test_postscript_is_handed_to_no_program(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", never)
    (photos / "cat" / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n")
    refused(photos, r"Expected an 8-bit image in '.*x.png', but got: cannot identify image file")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_huge_images(fuzz: SimpleNamespace, photos: Path, side: int) -> None:
    """Also those of which Pillow would only warn."""
    (photos / "cat" / "x.png").write_bytes(fuzz.image_folders.huge_png(side, side))
    refused(photos, r"Expected an 8-bit image in '.*x.png', but got: Image size \(\d+ pixels\) exceeds limit")


def test_more_images_than_memory(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def full(*sizes: int, **options: object) -> torch.Tensor:
        if len(sizes) == 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*sizes, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ValueError, match=r"that fit into memory, but got 6 of shape \(3, 8, 8\). Set `image_size`"):
        LabelledImages(photos).setup("fit")


def test_images_of_every_kind_beside_one_another(photos: Path) -> None:
    image = Image.open(photos / "cat" / "0.png")
    for mode, kind in (("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "bmp"), ("RGBA", "webp"), ("LA", "png")):
        image.convert(mode).save(photos / "cat" / f"{mode}.{kind}")
    image.save(photos / "cat" / "moving.webp", save_all=True, append_images=[image.rotate(90)])
    data = LabelledImages(photos)
    data.setup("fit")
    assert len(data.train) + len(data.test) == 13
    assert data.image_shape == (3, 8, 8)
