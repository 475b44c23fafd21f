from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leakage.files.tensors import write_safetensors
from leakage.models import Generator


@pytest.mark.parametrize(("channels", "image_size"), [(1, 28), (3, 32), (2, (8, 12))])
def test_makes_images_in_the_unit_range(channels: int, image_size: Any) -> None:
    model = Generator(channels, image_size, code_size=5, width=4)
    images = model(100 * torch.randn(6, 5))
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    assert images.shape == (6, channels, *sides)
    assert 0 <= images.min() < images.max() <= 1


def test_parameters() -> None:
    width, code, maps = 32, 64, 64 * 7 * 7
    expected = (code + 1) * maps + (64 * 9 + 1) * width + (width * 9 + 1) * width + (width * 9 + 1)
    assert sum(parameter.numel() for parameter in Generator().parameters()) == expected == 231_841


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "Expected `image_size` of multiples of 4, but got 30"),
        ({"image_size": (28, 30)}, r"Expected `image_size` of multiples of 4, but got \(28, 30\)"),
        ({"channels": 0}, "Expected `channels` to be a whole number of at least 1, but got 0"),
        ({"code_size": 1.5}, "Expected `code_size` to be a whole number of at least 1, but got 1.5"),
        ({"width": 0}, "Expected `width` to be a whole number of at least 1, but got 0"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generator(**options)


def test_a_file_holds_weights_and_sizes(tmp_path: Path) -> None:
    generator = Generator(3, (8, 12), code_size=5, width=2)
    generator.save(tmp_path / "generator.safetensors")
    state = torch.get_rng_state()
    loaded = Generator.load(tmp_path / "generator.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    codes = torch.randn(4, 5)
    assert torch.equal(loaded(codes), generator(codes))
    assert (loaded.channels, loaded.image_size, loaded.code_size, loaded.width) == (3, (8, 12), 5, 2)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(FileNotFoundError, match=r"Expected a safetensors file at .* but got no such file"):
        Generator.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="Expected a whole safetensors file, but got"):
        Generator.load(path)
    write_safetensors(path, "leakage.Reconstruction", {"ids": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"Expected format 'leakage.Generator' .* but got 'leakage.Reconstruction'"):
        Generator.load(path)
    weights, sizes = Generator(1, 8, width=2).state_dict(), {"channels": "1", "image_size": "[8, 8]", "width": "2"}
    for header in (sizes, sizes | {"code_size": "63"}, sizes | {"code_size": "0"}, sizes | {"code_size": "[]"}):
        write_safetensors(path, "leakage.Generator", weights, header)
        with pytest.raises(ValueError, match=r"Expected a generator in '.*', but got: "):
            Generator.load(path)
