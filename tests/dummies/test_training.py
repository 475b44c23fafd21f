"""Generators against a plain loop, on the bundled sample at 12x12 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.datamodules import LabelledImages, LabelledTensors, Source, Victims
from leakage.dummies.training import TrainedGenerator, trained_generator
from leakage.models import Generator
from leakage.seeds import derive_seed


class Small(LabelledImages):
    """A fifth of the sample; made smaller to ``size`` pixels a side."""

    def __init__(self, size: int = 12) -> None:
        images, labels = zip(*Source("sample").open(), strict=True)
        small = F.interpolate(torch.stack(images), size=(size, size), mode="area").mul(255).round().byte()
        parts = [
            LabelledTensors(small[start::7], torch.tensor(labels)[start::7], tuple("abcdefghij")) for start in (0, 1)
        ]
        super().__init__((parts[0], parts[1]))


def train(root: Path, data: LabelledImages | None = None, **options: Any) -> TrainedGenerator:
    options = {"epochs": 2, "code_size": 8, "width": 4, "accelerator": "cpu", "progress": False} | options
    return trained_generator(Small() if data is None else data, root=root, **options)


def same(one: TrainedGenerator, other: TrainedGenerator) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs) and one.error == other.error


def test_follows_a_plain_loop(tmp_path: Path) -> None:
    """Encoder and decoder by hand, with the orders and the noise of the seed."""
    found = train(tmp_path, epochs=2, seed=3)
    data = Small()
    data.setup("fit")
    images = data.train.images.float() / 255
    first = train(tmp_path, epochs=0, seed=3)
    (folder,) = tmp_path.iterdir()
    generator = first.model.train()
    weights = encoder_weights(generator, seed=3)
    optimizer = torch.optim.Adam([*weights, *generator.parameters()], lr=1e-3)
    with torch.random.fork_rng():
        for epoch in range(2):
            order = torch.Generator().manual_seed(derive_seed(3, epoch, "training order"))
            batches = torch.randperm(len(images), generator=order).tensor_split(-(-len(images) // 64))
            torch.manual_seed(derive_seed(3, epoch, "training noise"))
            for batch in batches:
                mean, log_variance = encode(weights, images[batch]).chunk(2, dim=1)
                written = generator(mean + log_variance.exp().sqrt() * torch.randn(mean.shape))
                misses = (written - images[batch]).square().flatten(1).sum(1) / (2 * 0.02)
                code = torch.distributions.Normal(mean, log_variance.exp().sqrt())
                apart = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum(1)
                optimizer.zero_grad()
                (misses + apart).mean().backward()
                optimizer.step()
    for ours, theirs in zip(found.model.parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    test = data.test.images.float() / 255
    with torch.no_grad():
        error = float((generator(encode(weights, test).chunk(2, dim=1)[0]) - test).square().mean())
    assert found.error == pytest.approx(error, rel=1e-3)
    assert json.loads((folder / "configuration.json").read_text())["variance"] == 0.02


def encoder_weights(generator: Generator, seed: int) -> list[Tensor]:
    """Drawn after the generator's, layer by layer, as torch draws them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Generator(1, 12, code_size=8, width=4)
        layers = [
            torch.nn.Conv2d(1, 4, 4, stride=2, padding=1),
            torch.nn.Conv2d(4, 8, 4, stride=2, padding=1),
            torch.nn.Linear(8 * 9, 16),
        ]
    return [parameter.detach().requires_grad_() for layer in layers for parameter in layer.parameters()]


def encode(weights: list[Tensor], images: Tensor) -> Tensor:
    maps = F.leaky_relu(F.conv2d(images, *weights[:2], stride=2, padding=1), 0.2)
    maps = F.leaky_relu(F.conv2d(maps, *weights[2:4], stride=2, padding=1), 0.2)
    return F.linear(maps.flatten(1), *weights[4:])


def test_training_lowers_the_error_and_a_seed_gives_the_same_weights(tmp_path: Path) -> None:
    before, after = (train(tmp_path / "one", epochs=epochs, learning_rate=3e-3) for epochs in (0, 30))
    assert after.error < 0.5 * before.error
    assert same(after, train(tmp_path / "two", epochs=30, learning_rate=3e-3))
    assert not same(after, train(tmp_path / "two", epochs=30, learning_rate=3e-3, seed=1))
    assert not after.model.training
    # Codes that are drawn give images of many kinds.
    images = after.model(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    assert float(images.std(0).mean()) > 0.05


def test_a_break_changes_nothing_and_what_was_trained_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.rand(3)
    random = torch.random.get_rng_state()
    whole = train(tmp_path / "whole", epochs=3)
    train(tmp_path / "broken", epochs=1)
    assert same(whole, train(tmp_path / "broken", epochs=3))
    assert torch.equal(torch.random.get_rng_state(), random)
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_, **__: pytest.fail("trained again"))
    assert same(whole, train(tmp_path / "whole", epochs=3))


def test_is_trained_on_what_it_has_seen_alone(tmp_path: Path) -> None:
    trained = train(tmp_path, num_images=30, epochs=1)
    assert len(trained.seen) == 30
    assert not same(trained, train(tmp_path, num_images=31, epochs=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": 0.0}, "`variance` to be positive and finite, but got 0.0"),
        ({"learning_rate": -1.0}, "`learning_rate` to be positive and finite, but got -1.0"),
        ({"epochs": -1}, "`epochs` to be a whole number of at least 0, but got -1"),
        ({"num_images": 1000}, "`num_images` of at most 143, the training images of "),
        ({"code_size": 0}, "`code_size` to be a whole number of at least 1, but got 0"),
        ({"data": Victims("sample")}, "`data` to be a LabelledImages, but got Victims"),
        ({"data": Small(10)}, r"`image_size` of multiples of 4, but got \(10, 10\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        train(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_diverge(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"^Expected finite weights in training, .* in epoch 1 with learning_"):
        train(tmp_path, epochs=1, learning_rate=1e30)
