"""Gradients of real and synthetic images, against plain loops over classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.condensation import SiameseAugmentation, matching
from leakage.condensation.matching import match, matched_parameters, real_gradients
from leakage.condensation.networks import train_on
from leakage.objectives import DISTANCES


@pytest.fixture
def network(kit: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made: nn.Module = kit.network().double().eval()
    return made


def shared_random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def as_it_is(images: Tensor) -> Tensor:
    return images


def plain_gradients(network: nn.Module, images: Tensor, label: int, names: list[str], **options: Any) -> dict[str, Any]:
    """Mean gradient over images of one class, in one piece."""
    parameters = [parameter for name, parameter in network.named_parameters() if name in names]
    loss = F.cross_entropy(network(images), torch.full((len(images),), label))
    return dict(zip(names, torch.autograd.grad(loss, parameters, **options), strict=True))


def test_row_cosine_leaves_biases_out_and_no_distance_looks_at_frozen_weights(network: nn.Module) -> None:
    names = [name for name, _ in network.named_parameters()]
    weights = ["features.0.weight", "features.4.weight", "classifier.weight"]
    assert matched_parameters(network, "row_cosine") == weights
    assert matched_parameters(network, "squared") == matched_parameters(network, "cosine") == names
    network.get_parameter("features.0.weight").requires_grad_(False)
    assert matched_parameters(network, "row_cosine") == weights[1:]
    assert matched_parameters(network, "squared") == names[1:]


@pytest.mark.parametrize("at_once", [1, 4, 8, 100])
def test_real_gradients_are_those_of_the_mean_loss_of_each_class(
    network: nn.Module, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(matching, "REAL_AT_ONCE_ON_CPU", at_once)
    # Classes of different sizes: below a chunk, a multiple of one, and neither.
    classes = [shared_random(generator, count, 1, 8, 8) for count in (1, 8, 13)]
    prepare = [lambda images: images, lambda images: images * 2, lambda images: images.flip(-1)]
    names = [name for name, _ in network.named_parameters()]
    found = real_gradients(network, names, classes, prepare)
    assert list(found) == names
    for label, (images, transform) in enumerate(zip(classes, prepare, strict=True)):
        expected = plain_gradients(network, transform(images), label, names)
        for name in names:
            torch.testing.assert_close(found[name][label], expected[name], msg=f"{name} of class {label}")
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(gradient.requires_grad for gradient in found.values())


def test_real_gradients_of_some_parameters_only(network: nn.Module, generator: torch.Generator) -> None:
    classes = [shared_random(generator, 3, 1, 8, 8) for _ in range(3)]
    found = real_gradients(network, ["classifier.weight"], classes, [as_it_is] * 3)
    assert {name: tuple(gradient.shape) for name, gradient in found.items()} == {"classifier.weight": (3, 3, 16)}
    expected = plain_gradients(network, classes[2], 2, ["classifier.weight"])
    torch.testing.assert_close(found["classifier.weight"][2], expected["classifier.weight"])


def test_weights_that_are_not_used_have_a_gradient_of_zero(network: nn.Module, generator: torch.Generator) -> None:
    network.add_module("auxiliary", nn.Linear(2, 2).double())
    classes = [shared_random(generator, 3, 1, 8, 8) for _ in range(3)]
    found = real_gradients(network, ["auxiliary.weight", "classifier.weight"], classes, [as_it_is] * 3)
    assert not found["auxiliary.weight"].any()
    assert found["classifier.weight"].any()
    images = shared_random(generator, 3, 2, 1, 8, 8)
    distances, derivatives = match(network, found, images, distance="row_cosine")
    without = {"classifier.weight": found["classifier.weight"]}
    expected, expected_derivatives = match(network, without, images, distance="row_cosine")
    torch.testing.assert_close(distances, expected + 2)  # one for each row without a direction
    torch.testing.assert_close(derivatives, expected_derivatives)
    before = network.get_parameter("auxiliary.weight").detach().clone()
    train(network, images[0], torch.zeros(2, dtype=torch.long), generator)
    assert torch.equal(network.get_parameter("auxiliary.weight"), before)


def plain_match(
    network: nn.Module,
    targets: dict[str, Tensor],
    images: Tensor,
    distance: str,
    transforms: list[Callable[[Tensor], Tensor]],
) -> tuple[Tensor, Tensor]:
    """One class after another, differentiated twice by torch.autograd."""
    distances, derivatives = [], []
    for label, transform in enumerate(transforms):
        leaf = images[label].clone().requires_grad_()
        gradients = plain_gradients(network, transform(leaf), label, list(targets), create_graph=True)
        wanted = {name: target[label] for name, target in targets.items()}
        distances.append(DISTANCES[distance]()(gradients, wanted))
        derivatives.append(torch.autograd.grad(distances[-1], leaf)[0])
    return torch.stack(distances).detach(), torch.stack(derivatives)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("images_per_class", [1, 3, 12])
@pytest.mark.parametrize("in_turn", [False, True])
def test_matches_as_a_plain_loop_does(
    network: nn.Module, generator: torch.Generator, distance: str, images_per_class: int, in_turn: bool
) -> None:
    names = matched_parameters(network, distance)
    targets = {name: shared_random(generator, 3, *network.get_parameter(name).shape) for name in names}
    images = shared_random(generator, 3, images_per_class, 1, 8, 8)
    before = images.clone()
    distances, derivatives = match(network, targets, images, distance=distance, in_turn=in_turn)
    expected = plain_match(network, targets, images, distance, [as_it_is] * 3)
    torch.testing.assert_close((distances, derivatives), expected)
    assert derivatives.abs().max() > 1e-6
    assert torch.equal(images, before)
    assert not distances.requires_grad
    assert not derivatives.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_how_many_classes_are_matched_at_once_does_not_matter(
    network: nn.Module, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(matching, "SYNTHETIC_AT_ONCE_ON_CPU", at_once)
    targets = {"classifier.weight": shared_random(generator, 3, 3, 16)}
    images = shared_random(generator, 3, 1, 1, 8, 8)
    expected = plain_match(network, targets, images, "row_cosine", [as_it_is] * 3)
    torch.testing.assert_close(match(network, targets, images, distance="row_cosine"), expected)


@pytest.mark.parametrize("strategy", ["color", "crop", "cutout", "flip", "scale", "rotate"])
@pytest.mark.parametrize("in_turn", [False, True])
def test_differentiates_through_a_transform_for_each_class(
    network: nn.Module, generator: torch.Generator, strategy: str, in_turn: bool
) -> None:
    augmentation = SiameseAugmentation(strategy)
    transforms = [augmentation.draw(generator) for _ in range(3)]
    names = matched_parameters(network, "row_cosine")
    targets = {name: shared_random(generator, 3, *network.get_parameter(name).shape) for name in names}
    images = shared_random(generator, 3, 3, 1, 8, 8)
    found = match(network, targets, images, distance="row_cosine", transforms=transforms, in_turn=in_turn)
    torch.testing.assert_close(found, plain_match(network, targets, images, "row_cosine", transforms))
    assert not images.requires_grad


def test_images_match_themselves(network: nn.Module, generator: torch.Generator) -> None:
    classes = shared_random(generator, 3, 4, 1, 8, 8)
    names = matched_parameters(network, "row_cosine")
    targets = real_gradients(network, names, list(classes), [as_it_is] * 3)
    for distance in DISTANCES:
        distances, _ = match(network, targets, classes, distance=distance)
        # The small number below the fraction keeps the row-wise distance from zero.
        torch.testing.assert_close(distances, torch.zeros_like(distances), atol=2e-2, rtol=0)


def train(network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator, **options: Any) -> None:
    defaults = {"epochs": 3, "learning_rate": 0.05, "batch_size": 4}
    train_on(network, images, labels, generator=generator, **defaults | options)


@pytest.mark.parametrize("count", [3, 4, 11])
def test_trains_as_plain_sgd_does(kit: Any, generator: torch.Generator, count: int) -> None:
    networks = [kit.network().double() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    images, labels = shared_random(generator, count, 1, 8, 8), torch.arange(count) % 3
    train(networks[0], images, labels, torch.Generator().manual_seed(8))

    order_generator = torch.Generator().manual_seed(8)
    optimizer = torch.optim.SGD(networks[1].parameters(), lr=0.05)
    for _ in range(3):
        # What fits into one batch has no order.
        order = torch.randperm(count, generator=order_generator) if count > 4 else torch.arange(count)
        for first in range(0, count, 4):
            chosen = order[first : first + 4]
            optimizer.zero_grad()
            F.cross_entropy(networks[1](images[chosen]), labels[chosen]).backward()
            optimizer.step()
    for (name, found), expected in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
        assert found.grad is None


def test_the_order_is_the_generators_alone(kit: Any, generator: torch.Generator) -> None:
    start = kit.network().double()
    images, labels = shared_random(generator, 11, 1, 8, 8), torch.arange(11) % 3
    results = []
    for seed, global_seed in ((8, 0), (8, 1), (9, 0)):
        network = kit.network().double()
        network.load_state_dict(start.state_dict())
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            state = torch.get_rng_state()
            train(network, images, labels, torch.Generator().manual_seed(seed))
            assert torch.equal(torch.get_rng_state(), state)
        results.append(network.classifier.weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_training_augments_every_batch(kit: Any, generator: torch.Generator) -> None:
    networks = [kit.network().double() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    images, labels = shared_random(generator, 6, 1, 8, 8), torch.arange(6) % 3
    mirror = SiameseAugmentation("flip", flip=1.0)
    train(networks[0], images, labels, torch.Generator().manual_seed(8), augmentation=mirror, batch_size=6)
    train(networks[1], images.flip(-1), labels, torch.Generator().manual_seed(8), batch_size=6)
    torch.testing.assert_close(networks[0].classifier.weight, networks[1].classifier.weight)


def test_frozen_weights_stay(kit: Any, generator: torch.Generator) -> None:
    network = kit.network().double()
    network.features.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    train(network, shared_random(generator, 3, 1, 8, 8), torch.arange(3), generator)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
