"""Local steps differentiated in little memory, against the plain simulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vjp, vmap
from torch.nn import functional as F

from leakage import Victim
from leakage.clients.local_steps import recomputed
from leakage.inversion.memory import peak_memory
from tests.clients.networks import CLASSES, IMAGE_SHAPE, network, private


def made(kind: str, local_steps: int, *, batch: int | None = None, train: bool = False, **options: float) -> Victim:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network(kind, bias=True).train(train)
    steps = {"local_steps": local_steps, "learning_rate": 0.3, "local_batch_size": batch}
    return Victim(model, image_shape=IMAGE_SHAPE, num_images=4, **steps, **options)


@pytest.mark.parametrize(("modules", "seeds"), [((), 1), (("0", "1"), 2)])
@pytest.mark.parametrize(
    ("kind", "local_steps", "batch", "train"),
    [("conv", 8, None, False), ("conv", 66, 2, False), ("batch_norm", 10, 2, False), ("batch_norm", 12, 2, True)],
)
def test_values_and_gradients_are_those_of_the_plain_simulation(kind, local_steps, batch, train, modules, seeds):
    """Of several victims with weights of their own, and of several sets of images of each."""
    victim = made(kind, local_steps, batch=batch, train=train, momentum=0.9 if batch else 0.0, weight_decay=0.01)
    images, labels = private(3, 4)
    sets = images[:, None] * torch.linspace(0.5, 1, seeds, dtype=torch.float64).view(1, -1, 1, 1, 1, 1)
    logits = F.one_hot(labels, CLASSES).double()
    states = victim.fresh_states([1, 2, 3])

    def objective(images: Tensor, logits: Tensor, state: dict[str, Tensor], sparing: bool) -> Tensor:
        gradients, seen = victim.evaluate(state, images, logits.softmax(-1), modules, sparing=sparing)
        assert len(seen) == len(modules)
        assert all(len(activation.outputs) == 4 for activation in seen.values())
        own = sum(gradient.square().sum() for gradient in gradients.values())
        return own + sum(activation.outputs.sin().sum() for activation in seen.values())

    def of_sets(sets: Tensor, logits: Tensor, state: dict[str, Tensor]) -> Tensor:
        return vmap(lambda images: objective(images, logits, state, True))(sets).mean()

    (by_sets, by_logits), values = vmap(grad_and_value(of_sets, argnums=(0, 1)))(sets, logits, states)

    for index in range(3):
        own, state = logits[index].requires_grad_(), {name: tensor[index] for name, tensor in states.items()}
        leaf = sets[index].clone().requires_grad_()
        value = torch.stack([objective(images, own, state, False) for images in leaf]).mean()
        by_leaf, by_own = torch.autograd.grad(value, (leaf, own))
        torch.testing.assert_close(values[index], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(by_sets[index], by_leaf, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(by_logits[index], by_own, rtol=1e-9, atol=1e-12)
        assert by_leaf.abs().max() > 1e-6


def test_gradients_agree_with_finite_differences():
    victim = made("conv", 8, batch=2, momentum=0.5, weight_decay=0.1)
    images, labels = private(1, 4)
    targets = F.one_hot(labels[0], CLASSES).double()

    def gradients(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(victim.evaluate(victim.state, images, targets, sparing=True)[0].values())

    assert torch.autograd.gradcheck(gradients, images[0].requires_grad_(), fast_mode=True)


def test_memory_does_not_grow_with_the_steps():
    """By the activations of none, and by less than the weights of each."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(32, 10))
    images, targets = torch.rand(1, 4, 1, 32, 32), torch.eye(10)[None, :4]

    def needed(local_steps: int, *, sparing: bool) -> int:
        victim = Victim(model, image_shape=(1, 32, 32), num_images=4, local_steps=local_steps, learning_rate=0.1)

        def objective(images: Tensor, targets: Tensor) -> Tensor:
            gradients = victim.evaluate(victim.state, images, targets, sparing=sparing)[0]
            return sum((gradient.square().sum() for gradient in gradients.values()), torch.zeros(()))

        return peak_memory(lambda: vmap(grad_and_value(objective))(images, targets), torch.device("cpu"))

    few, many, very_many = (needed(steps, sparing=True) for steps in (8, 32, 128))
    plain = needed(32, sparing=False)
    assert many < 1.3 * few
    assert very_many < 1.3 * few
    assert plain > 8 * many
    assert needed(4, sparing=True) == needed(4, sparing=False)


def test_derivatives_of_any_order():
    """By nested arguments, the second and third, also the linear maps that Gauss-Newton takes."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def curve(given: dict[str, Tensor], whole: Tensor) -> tuple[Tensor, list[Tensor]]:
        return given["x"] ** 4 * whole, [given["x"].sin()]

    def total(x: Tensor) -> Tensor:
        first, (second,) = recomputed(curve, {"x": x}, torch.tensor(2))
        return first + second

    def nth(function, times):
        for _ in range(times):
            function = grad(function)
        return function

    def by_hand(x: Tensor) -> list[Tensor]:
        return [2 * x**4 + x.sin(), 8 * x**3 + x.cos(), 24 * x**2 - x.sin(), 48 * x - x.cos()]

    for times, expected in enumerate(by_hand(x)):
        torch.testing.assert_close(vmap(nth(total, times))(x), expected)
    values, pull = vjp(total, x)
    push = vjp(lambda by: pull(by)[0], torch.zeros_like(values))[1]
    torch.testing.assert_close(push(torch.ones_like(x))[0], by_hand(x)[1])
