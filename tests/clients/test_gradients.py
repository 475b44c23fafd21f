"""The client's gradients against plain autograd and torch's SGD, one client at a time."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from leakage import Protocol, Victim
from tests.clients.networks import CLASSES, IMAGE_SHAPE, KINDS, network, one_at_a_time, private


@given(
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    own=st.booleans(),
    freeze_first=st.booleans(),
    loss=st.sampled_from(["cross_entropy", "mean_squared_error"]),
    reduction=st.sampled_from(["mean", "sum"]),
    victims=st.integers(1, 4),
    num_images=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@example("batch_norm", True, True, True, "mean_squared_error", "sum", 3, 2, 0)
@example("conv", False, True, False, "cross_entropy", "mean", 2, 3, 1)
@example("linear", True, False, False, "cross_entropy", "sum", 70, 1, 2)  # more than are captured at once
def test_gradients_are_those_of_one_victim_at_a_time(
    kind, bias, own, freeze_first, loss, reduction, victims, num_images, seed
):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(kind, bias=bias)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    first = next(iter(dict(model.named_parameters())))
    if freeze_first and len(list(model.parameters())) > 1:
        model.get_parameter(first).requires_grad_(False)
    images, labels = private(victims, num_images, seed)
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=num_images, loss=loss, reduction=reduction)
    states = victim.fresh_states([seed + index for index in range(victims)]) if own else None
    shared = victim.share(images, labels, states=states)

    victim.check(shared)
    assert shared.own_weights is own
    for index in range(victims):
        state = model.state_dict() if states is None else {name: states[name][index] for name in states}
        expected = one_at_a_time(model, state, images[index], labels[index], loss, reduction)
        assert shared.gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(shared.gradients[name][index], gradient, msg=lambda text, n=name: f"{n}: {text}")


def test_gradients_can_be_differentiated_again():
    """What an attack needs: the derivative of a gradient distance, against finite differences."""
    model = network("mlp", bias=True)
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    images, _ = private(1)

    def gradient(image: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return tuple(victim.gradients(victim.state, image, targets.softmax(-1)).values())

    targets = torch.randn(1, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(gradient, (images[0].requires_grad_(), targets.requires_grad_()), fast_mode=True)


def with_local_steps(protocol: Protocol, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The slow reference: one client trains by torch's own SGD, and shares how far its weights have come."""
    model = copy.deepcopy(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    options = {"momentum": protocol.momentum, "weight_decay": protocol.weight_decay}
    optimizer = torch.optim.SGD(parameters.values(), lr=protocol.learning_rate, **options)
    size = protocol.local_batch_size or protocol.num_images
    batches = itertools.cycle(zip(images.split(size), labels.split(size), strict=True))
    for batch, targets in itertools.islice(batches, protocol.local_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets, reduction=protocol.reduction).backward()
        optimizer.step()
    whole = protocol.learning_rate * protocol.local_steps
    return {name: (start[name] - parameters[name].detach()) / whole for name in parameters}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("sgd", [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.5, 0.3)])
@pytest.mark.parametrize(
    ("kind", "training", "reduction", "local_steps", "local_batch_size"),
    [
        ("mlp", False, "mean", 2, None),
        ("conv", False, "sum", 4, 2),
        ("conv", False, "mean", 8, 1),
        ("batch_norm", False, "mean", 3, 4),
        ("batch_norm", True, "mean", 3, None),
        ("batch_norm", True, "sum", 4, 2),
    ],
)
def test_local_steps_are_those_of_sgd(kind, training, reduction, local_steps, local_batch_size, sgd, own):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network(kind, bias=True).train(training)
    model[-1].bias.requires_grad_(False)
    images, labels = private(3, 4)
    victim = Victim(
        model,
        image_shape=IMAGE_SHAPE,
        num_images=4,
        reduction=reduction,
        local_steps=local_steps,
        learning_rate=0.3,
        local_batch_size=local_batch_size,
        momentum=sgd[0],
        weight_decay=sgd[1],
    )
    states = victim.fresh_states([5, 6, 7]) if own else None
    shared = victim.share(images, labels, states=states)
    victim.check(shared)
    for index in range(3):
        if states is not None:
            model.load_state_dict({name: states[name][index] for name in states}, strict=False)
        expected = with_local_steps(victim.protocol, model, images[index], labels[index])
        assert shared.gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(shared.gradients[name][index], gradient, msg=lambda text, n=name: f"{n}: {text}")
    one_step = Victim(model, image_shape=IMAGE_SHAPE, num_images=4, reduction=reduction)
    name = victim.trainable[-1]
    assert not torch.allclose(one_step.share(images, labels).gradients[name][2], shared.gradients[name][2], rtol=1e-3)


@pytest.mark.parametrize("local_batch_size", [None, 2])
@pytest.mark.parametrize("kind", ["mlp", "batch_norm"])
def test_a_distance_through_local_steps_can_be_differentiated(kind, local_batch_size):
    """What an attack needs, against finite differences; BatchNorm normalises by the dummies."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = network(kind, bias=True).train()
    victim = Victim(
        model,
        image_shape=IMAGE_SHAPE,
        num_images=4,
        local_steps=2,
        learning_rate=0.5,
        local_batch_size=local_batch_size,
    )
    target = victim.share(*private(1, 4, seed=1)).gradients

    def distance(images: Tensor, targets: Tensor) -> Tensor:
        gradients = victim.gradients(victim.state, images, targets.softmax(-1))
        return sum((gradients[name] - target[name][0]).square().sum() for name in target)

    images, _ = private(1, 4)
    targets = torch.randn(4, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(distance, (images[0].requires_grad_(), targets.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("own", [True, False])
def test_resnet(own):
    model = torchvision.models.resnet18(num_classes=10).eval()
    victim = Victim(model, image_shape=(3, 32, 32))
    assert victim.classifier == "fc"
    images = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3], [7]])
    states = victim.fresh_states([0, 1]) if own else None
    shared = victim.share(images, labels, states=states)
    assert shared.gradients["conv1.weight"].shape == (2, 64, 3, 7, 7)
    for index in range(2):
        state = model.state_dict() if states is None else {name: states[name][index] for name in states}
        expected = one_at_a_time(model, state, images[index], labels[index], "cross_entropy", "mean")
        for name in ("conv1.weight", "layer3.0.bn1.weight", "fc.bias"):
            torch.testing.assert_close(shared.gradients[name][index], expected[name], rtol=1e-3, atol=1e-4)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(60, 60), nn.Linear(60, 60)
            self.last.weight = self.first.weight

        def forward(self, images: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(images.flatten(1))))

    model = Tied().double()
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    images, labels = private(2, classes=60)
    shared = victim.share(images, labels)
    assert sorted(shared.gradients) == ["first.bias", "first.weight", "last.bias"]
    expected = one_at_a_time(model, model.state_dict(), images[1], labels[1], "cross_entropy", "mean")
    torch.testing.assert_close(shared.gradients["first.weight"][1], expected["first.weight"])
    own = victim.share(images, labels, states=victim.fresh_states([1, 2]))
    assert own.gradients["first.weight"].shape == (2, 60, 60)
