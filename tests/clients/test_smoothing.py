"""Networks with their kinks rounded off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from leakage.clients.low_rank import in_basis
from leakage.clients.smoothing import SHARPNESS, smoothed
from leakage.clients.victim import Victim
from leakage.models import ConvNet

KINKED = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.1),
    nn.PReLU(),
    nn.PReLU(3),
    nn.Hardtanh(-0.5, 2.0),
    nn.ReLU6(),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.MaxPool2d((2, 3), stride=1, dilation=2),
    nn.MaxPool2d(3, stride=(2, 3), padding=1, ceil_mode=True),
    nn.MaxPool2d(3, ceil_mode=True),
]


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("module", KINKED, ids=repr)
def test_becomes_the_function_itself(module: nn.Module) -> None:
    module, x = module.double(), inputs(2, 3, 8, 8)
    exact = module(x.clone()).detach()
    errors = []
    for sharpness in (1.0, 10.0, 100.0, 1e4):
        with smoothed(torch.tensor(sharpness).double()):
            found = module(x.clone()).detach()
        assert found.shape == exact.shape
        errors.append(float((found - exact).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-4
    assert bool((module(x.clone()) == exact).all()), "it lasts no longer than it should"


@pytest.mark.parametrize(
    "call", [F.relu, torch.relu, torch.Tensor.relu, lambda x: torch.relu_(x.clone()), lambda x: F.relu_(x.clone())]
)
def test_reaches_functions_too(call: Any) -> None:
    x = inputs(4, 5)
    beta = 2.0 / x.square().mean().sqrt()
    with smoothed(torch.tensor(2.0).double()):
        found = call(x)
    torch.testing.assert_close(found, (beta * x).exp().log1p() / beta)


def test_is_relative_to_what_it_is_given() -> None:
    x = inputs(3, 7)
    with smoothed(torch.tensor(3.0).double()):
        torch.testing.assert_close(F.relu(1e-3 * x), 1e-3 * F.relu(x))
        assert bool((F.relu(torch.zeros(3).double()) > 0).all()), "nothing to be relative to"


def test_smooth_functions_and_none_change_nothing() -> None:
    x = inputs(2, 3)
    with smoothed(torch.tensor(1.0)):
        torch.testing.assert_close(F.silu(x), x * x.sigmoid())
    with smoothed(None):
        assert torch.equal(F.relu(x), x.clamp(min=0))


def test_second_derivatives_of_many_victims_each_with_its_sharpness() -> None:
    net, x = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), inputs(3, 1, 2, 4, 4)

    def value(x: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
        with smoothed(sharpness):
            return net(x).square().sum()

    def steep(x: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
        return grad(value)(x, sharpness).square().sum()

    sharpness = torch.tensor([1.0, 5.0, 50.0]).double()
    together = vmap(grad(steep))(x, sharpness)
    for place in range(3):
        torch.testing.assert_close(together[place], grad(steep)(x[place], sharpness[place]))


@pytest.mark.parametrize("steps", [1, 3, 10])  # from 8 on activations are made again
def test_a_client_is_smoothed_by_what_travels_with_its_buffers(steps: int) -> None:
    torch.manual_seed(0)
    net = ConvNet(1, 8, 4, width=4, depth=2, norm="none", pooling="max").double().eval()
    options: dict[str, Any] = {"local_steps": steps, "learning_rate": 0.1} if steps > 1 else {}
    victim = Victim(net, image_shape=(1, 8, 8), num_images=2, **options)
    images, targets = inputs(2, 1, 8, 8), F.one_hot(torch.tensor([1, 3]), 4).double()

    def gradient(sharpness: float | None, sparing: bool) -> list[torch.Tensor]:
        state = victim.state if sharpness is None else {**victim.state, SHARPNESS: torch.tensor(sharpness).double()}

        def size(x: torch.Tensor) -> torch.Tensor:
            found = victim.evaluate(state, x, targets, sparing=sparing)[0]
            return torch.stack([part.square().sum() for part in found.values()]).sum()

        return [*victim.evaluate(state, images, targets)[0].values(), grad(size)(images)]

    for kept, made_again in zip(gradient(2.0, False), gradient(2.0, True), strict=True):
        torch.testing.assert_close(kept, made_again)
    exact, sharp, soft = gradient(None, True), gradient(1e9, True), gradient(2.0, True)
    for a, b, c in zip(exact[:-1], sharp[:-1], soft[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert float((a - c).abs().max()) > 1e-3 * float(a.abs().max())


def test_so_is_one_whose_last_layer_is_given_in_fewer_numbers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 20)).double()
    victim = Victim(net, image_shape=(1, 3, 3), num_images=2)
    shared = victim.share(inputs(1, 2, 1, 3, 3).sigmoid(), torch.tensor([[4, 11]]))
    reduced = in_basis(shared, victim)
    assert reduced.basis is not None
    images, targets = inputs(2, 1, 3, 3).sigmoid(), F.one_hot(torch.tensor([4, 11]), 20).double()
    sizes = []
    for state, basis in ((shared.state, None), (reduced.state, reduced.basis[0])):
        for sharpness in (1.0, 30.0):
            own = {**state, SHARPNESS: torch.tensor(sharpness).double()}
            found = victim.evaluate(own, images, targets, basis=basis)[0]
            sizes.append(torch.stack([part.square().sum() for part in found.values()]).sum())
    torch.testing.assert_close(sizes[:2], sizes[2:])
    assert abs(sizes[0] - sizes[1]) > 1e-3 * sizes[0]
