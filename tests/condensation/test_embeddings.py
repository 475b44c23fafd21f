"""What a network makes of images before its last layer, against plain loops over classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.condensation import SiameseAugmentation, embeddings
from leakage.condensation.embeddings import Embeddings, embed, embed_real, embedding_layer


@pytest.fixture
def network(kit: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made: nn.Module = kit.network().double().eval()
    return made


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def as_it_is(images: Tensor) -> Tensor:
    return images


def plain_embedding(network: nn.Module, images: Tensor) -> Tensor:
    """Of a ConvNet, one image after another."""
    return torch.stack([network.get_submodule("features")(image[None]).flatten() for image in images])


def test_the_embedding_is_what_the_last_linear_layer_takes(network: nn.Module, generator: torch.Generator) -> None:
    assert embedding_layer(network, (1, 8, 8)) == "classifier"
    nested = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 3), nn.Identity()))
    assert embedding_layer(nested, (1, 8, 8)) == "3.0"
    images = random(generator, 4, 1, 8, 8)
    torch.testing.assert_close(embed(network, "classifier", images), plain_embedding(network, images))
    found = embed(nested.double(), "3.0", images)
    torch.testing.assert_close(found, (images.flatten(1) @ nested[1].weight.T + nested[1].bias).relu())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("network", "origin"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU()),
            "Sequential with logits from Linear '1' and operations",
        ),
        (nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), "Sequential with logits from Conv2d '0' and operations"),
    ],
)
def test_a_network_without_a_last_linear_layer_has_none(network: nn.Module, origin: str) -> None:
    with pytest.raises(ValueError, match=rf"logits are the output of an nn\.Linear layer.*, but got {origin}"):
        embedding_layer(network, (1, 8, 8))


def test_looking_for_the_layer_changes_nothing(kit: Any) -> None:
    network = kit.network(norm="batch").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    embedding_layer(network, (1, 8, 8))
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_targets_are_the_means_over_the_real_images_of_each_class(
    network: nn.Module, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(embeddings, "REAL_AT_ONCE_ON_CPU", at_once)
    classes = [random(generator, count, 1, 8, 8) for count in (1, 4, 7)]
    prepare: list[Callable[[Tensor], Tensor]] = [as_it_is, lambda images: images * 2, lambda images: images.flip(-1)]
    found = Embeddings("classifier").targets(network, classes, prepare)
    assert list(found) == ["classifier"]
    for target, images, transform in zip(found["classifier"], classes, prepare, strict=True):
        seen = plain_embedding(network, transform(images))
        torch.testing.assert_close(target, sum(seen) / len(images))
        torch.testing.assert_close(embed_real(network, "classifier", images, transform), seen)
    assert not found["classifier"].requires_grad


def plain_match(
    network: nn.Module, targets: Tensor, images: Tensor, transforms: list[Callable[[Tensor], Tensor]]
) -> tuple[Tensor, Tensor]:
    """One class after another."""
    distances, derivatives = [], []
    for target, own, transform in zip(targets, images, transforms, strict=True):
        leaf = own.clone().requires_grad_()
        difference = plain_embedding(network, transform(leaf)).mean(0) - target
        distances.append((difference @ difference).detach())
        derivatives.append(torch.autograd.grad(difference @ difference, leaf)[0])
    return torch.stack(distances), torch.stack(derivatives)


@pytest.mark.parametrize("strategy", [None, "color", "crop", "cutout", "flip", "scale", "rotate"])
@pytest.mark.parametrize("images_per_class", [1, 4, 12])
def test_matches_as_a_plain_loop_does(
    network: nn.Module, generator: torch.Generator, strategy: str | None, images_per_class: int
) -> None:
    transforms = None if strategy is None else [SiameseAugmentation(strategy).draw(generator) for _ in range(3)]
    targets, images = random(generator, 3, 16), random(generator, 3, images_per_class, 1, 8, 8)
    before = images.clone()
    distances, derivatives = Embeddings("classifier").match(network, {"classifier": targets}, images, transforms)
    expected = plain_match(network, targets, images, transforms or [as_it_is] * 3)
    torch.testing.assert_close((distances, derivatives), expected)
    assert derivatives.abs().max() > 1e-6
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert not distances.requires_grad
    assert not derivatives.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_images_match_themselves(network: nn.Module, generator: torch.Generator) -> None:
    classes, matching = random(generator, 3, 4, 1, 8, 8), Embeddings("classifier")
    targets = matching.targets(network, list(classes), [as_it_is] * 3)
    distances, derivatives = matching.match(network, targets, classes, None)
    torch.testing.assert_close(distances, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(derivatives, torch.zeros_like(classes))
