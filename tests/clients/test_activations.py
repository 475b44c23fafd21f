"""What modules take and give, against hooks on the user's own model, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from leakage import Victim
from leakage.clients import Activation
from tests.clients.networks import CLASSES, IMAGE_SHAPE, KINDS, network, private


def everything_hooked(model: nn.Module) -> list[object]:
    return [list(hooks) for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def by_hand(model: nn.Module, images: Tensor) -> dict[str, Activation]:
    """Of a chain, module by module."""
    found = {}
    for name, module in model.named_children():
        outputs = module(images)
        found[name] = Activation(images, outputs)
        images = outputs
    return found


def targets_of(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES).double()


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_the_pass(kind):
    model = network(kind, bias=True)
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=3)
    images, labels = private(4, 3)
    names = [name for name, _ in model.named_children()]
    victim.check_modules(names)
    gradients, activations = vmap(lambda *batch: victim.evaluate(victim.state, *batch, names))(
        images, targets_of(labels)
    )
    assert list(activations) == names
    for row in range(4):
        for name, expected in by_hand(model, images[row]).items():
            torch.testing.assert_close(activations[name].inputs[row], expected.inputs)
            torch.testing.assert_close(activations[name].outputs[row], expected.outputs)
    alone = vmap(lambda *batch: victim.gradients(victim.state, *batch))(images, targets_of(labels))
    assert all(torch.equal(gradients[name], alone[name]) for name in alone)
    assert not any(everything_hooked(victim.model))


def test_no_modules_no_activations():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    images, labels = private(1)
    assert victim.evaluate(victim.state, images[0], targets_of(labels[0]))[1] == {}


@pytest.mark.parametrize("local", [{}, {"local_steps": 4, "learning_rate": 0.3, "local_batch_size": 1}])
def test_activations_and_gradients_can_be_differentiated_together(local):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network("group_norm", bias=True)
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=2, **local)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        gradients, activations = victim.evaluate(victim.state, images, targets.softmax(-1), ["1", "2"])
        prior = activations["1"].inputs.mean().square() + activations["2"].outputs.sin().sum()
        return prior + sum(tensor.square().sum() for tensor in gradients.values())

    images, _ = private(1, 2)
    targets = torch.randn(2, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(loss, (images[0].requires_grad_(), targets.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("local_batch_size", [None, 1, 2])
def test_local_steps_give_the_first_pass_over_all_images(local_batch_size):
    """A batch at the weights of its own step, then the next: by hand with torch's SGD."""
    model = network("mlp", bias=True)
    victim = Victim(
        model,
        image_shape=IMAGE_SHAPE,
        num_images=4,
        local_steps=8,
        learning_rate=0.5,
        local_batch_size=local_batch_size,
    )
    images, labels = (part[0] for part in private(1, 4))
    _, activations = victim.evaluate(victim.state, images, targets_of(labels), ["1", "3"])
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    size = local_batch_size or 4
    for start in range(0, 4, size):
        batch = slice(start, start + size)
        expected = by_hand(model, images[batch])
        for name, activation in activations.items():
            torch.testing.assert_close(activation.inputs[batch], expected[name].inputs)
            torch.testing.assert_close(activation.outputs[batch], expected[name].outputs)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    assert activations["1"].inputs.shape == (4, 60)


def test_what_is_changed_in_place_later_is_as_it_was():
    model = torchvision.models.resnet18(num_classes=CLASSES).eval()
    assert model.relu.inplace
    seen: dict[str, Tensor] = {}
    model.bn1.register_forward_hook(lambda module, inputs, output: seen.update(given=inputs[0], got=output.clone()))
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(images)
    victim = Victim(model, image_shape=(3, 32, 32))
    _, activations = victim.evaluate(victim.state, images, torch.eye(CLASSES)[:1], ["bn1", "layer1.0.conv2"])
    assert activations["bn1"].outputs.min() < 0
    torch.testing.assert_close(activations["bn1"], Activation(seen["given"], seen["got"]))


# -- what can be wrong


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation, self.linear, self.unused, self.pair = nn.Tanh(), nn.Linear(60, CLASSES), nn.Identity(), Pair()
        self.named = Named()

    def forward(self, images: Tensor) -> Tensor:
        flat = self.named(images=self.activation(self.activation(images.flatten(1))))
        return self.linear(self.pair(flat)[0])


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


class Named(nn.Module):
    def forward(self, *, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["linaer"], r"to name modules of the model, such as \['linear', .*\], but got 'linaer'"),
        ([""], "to name modules of the model, such as .*, but got ''"),
        (["linear", "activation"], "that are called once in a forward pass, but got 'activation', which is called"),
        (["unused"], r"that are called once in a forward pass, but got \['unused'\], which are not called"),
        (["pair"], "that return a tensor, but got 'pair', which returns tuple"),
        (["named"], "that take a tensor first, but got 'named', which takes none"),
    ],
)
def test_modules_that_have_no_activations(modules, message):
    victim = Victim(Branches().double(), image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match=f"^Expected `modules` {message}"):
        victim.check_modules(modules)
    assert not any(everything_hooked(victim.model))
    victim.check_modules(["linear"])


def test_nothing_stays_behind_after_a_failed_pass():
    victim = Victim(network("conv", bias=True), image_shape=IMAGE_SHAPE)
    images, labels = private(1)
    with pytest.raises(RuntimeError):
        victim.evaluate(victim.state, images[0, :, :1], targets_of(labels[0]), ["0", "3"])
    assert not any(everything_hooked(victim.model))
