"""Gradients of many victims in one pass, and derivatives of what depends on them, against each victim for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from leakage.clients.joint_layers import normalised
from leakage.clients.joint_pass import JointPass, has_joint_pass
from leakage.clients.victim import Victim
from leakage.models import MLP, AlexNet, ConvNet, LeNet, ResNet20, ViT

SIZE, CLASSES = 16, 5


class InPlace(nn.Module):
    """What is common in networks of others: activations and sums that change their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.relu, self.classifier = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.first(images))
        more = self.norm(self.second(maps))
        more += maps
        return self.classifier(self.relu(more).mean((2, 3)))


class Several(nn.Module):
    """Layers of other kinds: grouped, dilated, strided, of one dimension, tied, frozen, on rows of features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), groups=2, bias=False)
        self.rows, self.norm = nn.Linear(15, 6), nn.LayerNorm((8, 7, 6))
        self.line, self.again = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.again.weight = self.line.weight
        self.frozen, self.classifier = nn.Linear(8 * 42, 7), nn.Linear(7, CLASSES)
        self.frozen.requires_grad_(False)
        self.frozen.bias.requires_grad_()
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.rows(self.grouped(self.first(images).tanh()).tanh()))
        line = self.again(self.line(maps.flatten(2)).tanh()).flatten(1)
        return self.classifier(self.frozen(line).sigmoid())


class Mixed(nn.Module):
    """Takes all images together."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(3 * SIZE**2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier((images - images.mean(0)).flatten(1))


class Scaled(nn.Module):
    """Has a parameter that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.classifier = nn.Parameter(torch.ones(())), nn.Linear(3 * SIZE**2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.scale * images.flatten(1))


def convnet(**options: Any) -> nn.Module:
    return ConvNet(3, SIZE, CLASSES, width=4, **options)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convnet": convnet,
    "convnet group": lambda: convnet(norm="group", activation="silu", pooling="max"),
    "convnet layer": lambda: convnet(norm="layer", activation="leaky_relu"),
    "convnet batch": lambda: convnet(norm="batch", activation="sigmoid"),
    "resnet20": lambda: ResNet20(3, SIZE, CLASSES, width=4),
    "lenet": lambda: LeNet(3, SIZE, CLASSES),
    "alexnet": lambda: AlexNet(3, SIZE, CLASSES),
    "mlp": lambda: MLP(3, SIZE, CLASSES),
    "in place": InPlace,
    "several": Several,
}


def make(name: str, own: bool, num_images: int, **options: Any) -> tuple[Victim, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[name]().eval().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        victim = Victim(model, image_shape=(3, SIZE, SIZE), num_images=num_images, **options)
        if not own:
            return victim, victim.state
        state = {key: torch.stack([tensor] * 3) for key, tensor in victim.state.items()}
        return victim, {
            key: tensor * (1 + 0.3 * torch.rand_like(tensor)) if tensor.is_floating_point() else tensor
            for key, tensor in state.items()
        }


def dummies(victim: Victim, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    protocol = victim.protocol
    shape = 3, protocol.num_images, *protocol.image_shape
    images = torch.rand(shape, generator=generator, dtype=torch.float64)
    return images, torch.rand(*shape[:2], protocol.num_classes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "own", "num_images"),
    [
        *((name, False, 3) for name in NETWORKS),
        *((name, True, 2) for name in NETWORKS),
        ("resnet20", False, 1),
        ("several", True, 1),
    ],
)
def test_it_gives_what_each_victim_gives_for_itself(
    name: str, own: bool, num_images: int, generator: torch.Generator
) -> None:
    victim, state = make(name, own, num_images, reduction="sum" if num_images == 2 else "mean")
    images, targets = dummies(victim, generator)
    assert has_joint_pass(victim, state, own)
    run = JointPass(victim, state, own, images, targets)
    lanes = 0 if own else None
    expected = vmap(victim.gradients, in_dims=(lanes, 0, 0))(state, images, targets)
    assert list(run.gradients) == victim.trainable
    for key, gradient in expected.items():
        torch.testing.assert_close(run.gradients[key], gradient, rtol=1e-9, atol=1e-12)
    directions = {key: torch.randn(g.shape, generator=generator, dtype=g.dtype) for key, g in expected.items()}

    def along(images: Tensor, targets: Tensor, state: Any, direction: Any) -> Tensor:
        found = victim.gradients(state, images, targets)
        return torch.stack([(found[key] * direction[key]).sum() for key in found]).sum()

    by = vmap(grad(along, argnums=(0, 1)), in_dims=(0, 0, lanes, 0))(images, targets, state, directions)
    pulled = run.pull_back({("gradients", key): direction for key, direction in directions.items()})
    for found, wanted in zip(pulled, by, strict=True):
        assert bool(wanted.abs().max() > 0)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def test_activations_are_each_victims_own_and_lead_back(generator: torch.Generator) -> None:
    victim, state = make("resnet20", False, 2)
    images, targets = dummies(victim, generator)
    name = "features.1"
    run = JointPass(victim, state, False, images, targets, [name])

    def seen(images: Tensor) -> Tensor:
        return victim.evaluate(state, images, targets[0], [name])[1][name].inputs

    torch.testing.assert_close(run.activations[name].inputs, vmap(seen)(images), rtol=1e-9, atol=1e-12)
    slope = torch.randn(run.activations[name].inputs.shape, generator=generator, dtype=torch.float64)
    by_images, by_targets = run.pull_back({("inputs", name): slope})
    expected = vmap(grad(lambda images, slope: (seen(images) * slope).sum()))(images, slope)
    torch.testing.assert_close(by_images, expected, rtol=1e-9, atol=1e-12)
    assert not by_targets.any()


def test_slopes_of_some_gradients_are_enough(generator: torch.Generator) -> None:
    victim, state = make("convnet", False, 1)
    given = dummies(victim, generator)

    def pulled(wanted: Callable[[str], bool], others: bool) -> tuple[Tensor, Tensor]:
        run = JointPass(victim, state, False, *given)
        found = {("gradients", key): part * wanted(key) for key, part in run.gradients.items() if wanted(key) or others}
        return run.pull_back(found)

    found = pulled(lambda key: "bias" in key, others=False)
    torch.testing.assert_close(found, pulled(lambda key: "bias" in key, others=True))
    assert bool(found[0].any())
    assert not any(bool(part.any()) for part in pulled(lambda key: False, others=False))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(convnet(norm="batch").train(), id="statistics of the batch"),
        pytest.param(ViT(3, SIZE, CLASSES), id="attention"),
        pytest.param(Mixed(), id="images mixed"),
        pytest.param(Scaled(), id="parameter of no layer"),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_other_networks_have_none(model: nn.Module, own: bool) -> None:
    victim = Victim(model, image_shape=(3, SIZE, SIZE), num_images=2)
    state = {key: torch.stack([tensor] * 3) for key, tensor in victim.state.items()} if own else victim.state
    assert not has_joint_pass(victim, state, own)


def test_local_steps_have_none() -> None:
    victim = Victim(LeNet(3, SIZE, CLASSES), image_shape=(3, SIZE, SIZE), local_steps=2, learning_rate=0.1)
    assert not has_joint_pass(victim, victim.state, False)


def test_nothing_is_left_behind(generator: torch.Generator) -> None:
    victim, state = make("in place", False, 1)
    before = {key: tensor.clone() for key, tensor in state.items()}
    run = JointPass(victim, state, False, *dummies(victim, generator), ["norm"])
    run.pull_back({("gradients", key): part for key, part in run.gradients.items()})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in victim.model.modules())
    for key, tensor in victim.state.items():
        assert torch.equal(tensor, before[key])
        assert not tensor.requires_grad
        assert tensor.grad is None


def test_normalised_rows_are_differentiated_twice(generator: torch.Generator) -> None:
    rows = torch.randn(6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        normalised(rows, 6, 1e-3),
        (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-3).sqrt(),
    )
    assert torch.autograd.gradcheck(lambda rows: normalised(rows, 6, 1e-3), rows)
    assert torch.autograd.gradgradcheck(lambda rows: normalised(rows, 6, 1e-3), rows)
