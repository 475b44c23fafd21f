"""Several small images in one: what is decoded, learned, stored, tested and exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from leakage.condensation import (
    SyntheticSet,
    condensation,
    decode,
    encode,
    evaluate,
    export_dd_ranking,
    kmeans_images,
)
from leakage.files.tensors import write_safetensors
from leakage.seeds import derive_seed


def plain_decode(images: Tensor, factor: int) -> Tensor:
    """Tile by tile."""
    height, width = (side // factor for side in images.shape[2:])
    tiles = [
        image[None, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
        for image in images
        for row in range(factor)
        for column in range(factor)
    ]
    return torch.cat([F.interpolate(tile, size=images.shape[2:], mode="bilinear") for tile in tiles])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "factor"), [((3, 2, 8, 8), 2), ((2, 1, 6, 9), 3), ((2, 3, 4, 4), 1)])
def test_decodes_tile_by_tile(shape: tuple[int, ...], factor: int) -> None:
    images = random(*shape)
    assert torch.equal(decode(images, factor), plain_decode(images, factor))


def test_encodes_means_over_squares_in_the_order_in_which_they_are_decoded() -> None:
    images = random(8, 2, 4, 6)
    stored = encode(images, 2)
    assert stored.shape == (2, 2, 4, 6)
    # The third image of the second four is in the lower left.
    expected = images[6].reshape(2, 2, 2, 3, 2).mean((2, 4))
    torch.testing.assert_close(stored[1, :, 2:, :3], expected)
    flat = torch.arange(8.0)[:, None, None, None].expand(8, 1, 4, 4)
    torch.testing.assert_close(decode(encode(flat, 2), 2), flat)
    assert torch.equal(encode(images, 1), images)


def test_refuses_a_factor_or_a_number_of_images_that_does_not_fit(kit: Any) -> None:
    message = "Expected `factor` to divide the size of the images, 8 x 12, but got 3. Choose one of 1, 2, 4."
    for call in (decode, encode):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(9, 1, 8, 12), 3)
        with pytest.raises(ValueError, match="Expected `factor` to be a whole number of at least 1, but got 0"):
            call(torch.zeros(9, 1, 8, 12), 0)
    with pytest.raises(ValueError, match="Expected a multiple of 4 images for factor 2, but got 6"):
        encode(torch.zeros(6, 1, 8, 8), 2)
    with pytest.raises(ValueError, match="Expected `factor` to divide the size of the images, 8 x 8, but got 3"):
        kit.condense(factor=3, iterations=1)
    with pytest.raises(ValueError, match=r"Expected `images_per_class` of at most .*but got 8"):
        kit.condense(2, loops=(1, 1), factor=2, iterations=1, initialization="real")  # the smallest class has 5
    with pytest.raises(ValueError, match="Expected `factor` to divide the size of the images, 4 x 4, but got 3"):
        stored(factor=3)


def test_the_stored_pixels_learn_through_the_decoding(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a step on the decoded images themselves, whose derivative is taken back by hand."""
    options: dict[str, Any] = {"loops": (1, 1), "iterations": 1, "learning_rate": 1.0, "momentum": 0.0, "seed": 3}
    start = kit.images(kit.condense(1, factor=2, **options | {"learning_rate": 1e-30}))
    moved = kit.images(kit.condense(1, factor=2, **options))
    decoded = decode(start, 2)
    monkeypatch.setattr(condensation, "start_images", lambda *_: decoded.clone())
    step = kit.images(kit.condense(4, **options)) - decoded
    leaf = start.requires_grad_()
    (expected,) = torch.autograd.grad(decode(leaf, 2), leaf, step)
    torch.testing.assert_close(moved - start, expected)
    assert float(expected.abs().max()) > 1e-4


def test_a_part_of_the_images_is_matched_at_a_time_and_all_in_turn(kit: Any) -> None:
    images = [
        kit.images(kit.condense(5, pool=1, iterations=count, synthetic_batch_size=2, learning_rate=0.5, momentum=0.0))
        for count in range(4)[1:]
    ]
    start = kit.images(kit.condense(5, pool=1, iterations=1, learning_rate=1e-30, momentum=0.0))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(derive_seed(0, 0, "synthetic batch")))
    for before, after, chosen in zip([start, *images], images, order.split(2), strict=False):
        changed = (before != after).flatten(1).any(1).view(3, 5)
        assert changed.nonzero()[:, 1].unique().tolist() == sorted(chosen.tolist())
        assert bool(changed[:, chosen].all())
    # As many as there are, or more, are all of them.
    alike = [kit.condense(3, pool=1, iterations=4, factor=2, synthetic_batch_size=size) for size in (None, 12, 50)]
    assert all(torch.equal(kit.images(one), kit.images(alike[0])) for one in alike)


def stored(**changes: Any) -> SyntheticSet:
    options: dict[str, Any] = {
        "images": random(4, 3, 4, 4),
        "labels": torch.tensor([0, 0, 1, 1]),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "class_names": ("a", "b"),
        "factor": 2,
    }
    return SyntheticSet(**options | changes)


def test_a_set_hands_out_decoded_images(tmp_path: Path) -> None:
    synthetic = stored()
    decoded = synthetic.decoded()
    assert torch.equal(decoded.images, plain_decode(synthetic.images, 2))
    assert decoded.labels.tolist() == [0] * 8 + [1] * 8
    assert (decoded.factor, decoded.decoded() is decoded) == (1, True)
    images, labels = synthetic.to_dataset().tensors
    assert torch.equal(images, decoded.images)
    assert torch.equal(labels, decoded.labels)
    synthetic.save_images(tmp_path)
    assert len(list(tmp_path.glob("a/*.png"))) == 8
    read = torch.from_numpy(np.array(Image.open(tmp_path / "b" / "3.png"))).permute(2, 0, 1)
    torch.testing.assert_close(read / 255, decoded.images[11].clamp(0, 1), atol=1 / 255, rtol=0)


def test_a_file_keeps_the_factor(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    stored().save(path)
    assert SyntheticSet.load(path).factor == 2
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["factor"]) == 2
    replace(stored(), factor=1).save(path)
    with safe_open(path, framework="pt") as file:
        assert "factor" not in file.metadata()


@pytest.mark.parametrize("factor", ["3", "0", "true", '"2"', "2.0", "[2]", "1e400"])
def test_refuses_a_file_with_a_wrong_factor(factor: str, tmp_path: Path) -> None:
    header = {"mean": "[0.5]", "std": "[0.5]", "class_names": '["a"]', "dataset": '""', "factor": factor}
    path = tmp_path / "set.safetensors"
    write_safetensors(
        path, "leakage.SyntheticSet", {"images": torch.zeros(1, 1, 4, 4), "labels": torch.zeros(1).long()}, header
    )
    with pytest.raises(ValueError, match=r"Expected a synthetic set in .*set\.safetensors.*`factor`"):
        SyntheticSet.load(path)


def test_is_tested_and_exported_as_decoded(kit: Any, tmp_path: Path) -> None:
    condensation = kit.condense(2, loops=(2, 1), iterations=1, factor=2)
    synthetic = condensation.synthetic_set()
    assert (synthetic.factor, len(synthetic)) == (2, 6)
    assert synthetic.recipe is not None
    assert synthetic.recipe.options["factor"] == 2
    data = kit.data()
    options: dict[str, Any] = {"network": kit.network(), "networks": 2, "epochs": 2, "device": "cpu", "progress": False}
    found = evaluate(synthetic, data, **options)
    assert torch.equal(found.accuracies, evaluate(synthetic.decoded(), data, **options).accuracies)
    export_dd_ranking(stored(dataset="cifar10"), tmp_path)
    assert torch.load(tmp_path / "labels.pt").tolist() == [0] * 8 + [1] * 8


def test_starts_from_real_images_at_half_the_resolution(kit: Any) -> None:
    start = kit.images(kit.condense(1, pool=1, factor=2, initialization="kmeans", iterations=1, learning_rate=1e-30))
    real = kmeans_images(kit.data(), 4, derive_seed(0, 0, "start")).normalised()
    torch.testing.assert_close(
        start, F.avg_pool2d(real, 2).view(3, 2, 2, 1, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(3, 1, 8, 8)
    )
