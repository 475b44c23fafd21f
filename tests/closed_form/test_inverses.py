"""Which networks are a plain chain, and the inverses of its functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize

from leakage.clients.chain import Link
from leakage.clients.victim import Victim
from leakage.closed_form import find_chain
from leakage.closed_form.inverses import apply, invert
from leakage.models import MLP, ConvNet, LeNet, ResNet18

SHAPE = (3, 8, 8)


def victim_of(model: nn.Module, **options: object) -> Victim:
    return Victim(model, image_shape=SHAPE, **options)  # type: ignore[arg-type]


def behind(*layers: nn.Module, width: int = 4 * 64) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(width, 5))


class Net(nn.Module):
    """Two convolutions and something between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.act, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Sigmoid(), nn.Conv2d(3, 3, 3, padding=1)
        self.classifier = nn.Linear(192, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.act(self.first(images))
        if self.kind == "in place":
            maps = self.second(maps.mul_(2.0))
        elif self.kind == "functional":
            maps = torch.tanh(self.second(maps))
        elif self.kind == "residual":
            maps = maps + self.second(maps)
        elif self.kind == "transposed":
            maps = self.second(maps.mT)
        elif self.kind == "twice":
            maps = self.second(self.act(self.second(maps)))
        elif self.kind == "images":
            maps = self.second(images)
        return self.classifier(maps.flatten(1))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (LeNet(3, 8), ["features.0", "features.2", "features.4", "classifier"]),
        (MLP(3, 8, width=6), ["features.0", "features.2", "classifier"]),
        (
            ConvNet(3, 8, width=4, norm="none", pooling="none", activation="leaky_relu"),
            ["features.0", "features.2", "features.4", "classifier"],
        ),
        (behind(nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5), nn.Conv2d(4, 4, 1)).eval(), ["0", "4", "6"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), ["1"]),
    ],
)
def test_plain_chains(model: nn.Module, names: list[str]) -> None:
    assert [link.name for link in find_chain(victim_of(model)) if link.is_layer] == names


def test_what_a_chain_holds() -> None:
    norm = nn.BatchNorm2d(4).eval()
    scaled = Normalize([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    model = nn.Sequential(scaled, nn.Conv2d(3, 4, 3, stride=2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(36, 5))
    chain = find_chain(victim_of(model))
    assert [(link.name, link.input_shape, link.output_shape) for link in chain] == [
        ("0", SHAPE, SHAPE),
        ("1", SHAPE, (4, 3, 3)),
        ("2", (4, 3, 3), (4, 3, 3)),
        ("3", (4, 3, 3), (4, 3, 3)),
        ("5", (36,), (5,)),
    ]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LeNet(3, 8, activation="silu"), "got SiLU 'features.1', which is not one-to-one"),
        (behind(nn.GELU()), "got GELU '1', which is not one-to-one"),
        (behind(nn.MaxPool2d(2), width=64), "got MaxPool2d '1', pooling that loses most"),
        (ConvNet(3, 8, width=4, norm="none"), "got AveragePooling 'features.2', pooling that loses most"),
        (behind(nn.GroupNorm(2, 4)), "got GroupNorm '1', a norm by the statistics of each image"),
        (behind(nn.BatchNorm2d(4)), r"got BatchNorm2d '1', which normalises by the client's own batch: .*eval\(\)"),
        (behind(nn.LeakyReLU(0.0)), "got LeakyReLU '1', with a negative slope of 0.0, which is not one-to-one"),
        (behind(nn.Softplus()), "got Softplus '1', which is not supported. Supported are Conv2d"),
        (
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(192, 5)),
            "padded by 'circular' instead of zeros",
        ),
        (
            nn.Sequential(nn.Flatten(2), nn.Linear(64, 2), nn.Flatten(), nn.Linear(6, 5)),
            "got Linear '1', applied to several vectors",
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.Flatten(), nn.Linear(108, 5)),
            "Expected a plain chain",
        ),
        (
            ResNet18(3, 8, norm="none"),
            r"got ReLU 'features.3.0.relu', whose input is not the output of Identity 'features.3.0.bn2'",
        ),
        (Net("in place"), "got Conv2d 'second', whose input is not the output of Sigmoid 'act'"),
        (Net("functional"), "got Linear 'classifier', whose input is not the output of Conv2d 'second'"),
        (Net("residual"), "got Linear 'classifier', whose input is not the output of Conv2d 'second'"),
        (Net("transposed"), "got Conv2d 'second', whose input is not the output of Sigmoid 'act'"),
        (Net("twice"), "got Sigmoid 'act', which is called more than once"),
        (Net("images"), "got Conv2d 'second', whose input is not the output of Sigmoid 'act'"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Sigmoid()), "Expected a network whose logits are"),
    ],
)
def test_other_networks_are_refused_by_name(model: nn.Module, message: str) -> None:
    victim = victim_of(model, num_images=2)
    with pytest.raises(ValueError, match=message):
        find_chain(victim)
    for module in victim.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_nothing_stays_behind() -> None:
    victim = victim_of(LeNet(3, 8))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    find_chain(victim)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in victim.model.modules())


def batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3).double().eval()
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return norm


@pytest.mark.parametrize(
    "module",
    [
        nn.Sigmoid(),
        nn.Tanh(),
        nn.LeakyReLU(0.3),
        nn.ReLU(),
        batch_norm(),
        Normalize([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]),
    ],
)
def test_inverse_and_slope(module: nn.Module, generator: torch.Generator) -> None:
    inputs = torch.randn(2, 4, *SHAPE, generator=generator, dtype=torch.float64).requires_grad_()
    function = Link("name", module, SHAPE, SHAPE)
    state = {f"name.{name}": tensor[None] for name, tensor in module.state_dict().items()}
    outputs = torch.stack([module(part) for part in inputs])
    torch.testing.assert_close(apply(function, inputs.flatten(2), state), outputs)
    found, slope = invert(function, outputs.detach().flatten(2), state)
    (expected,) = torch.autograd.grad(outputs.sum(), inputs)
    torch.testing.assert_close(slope, expected)
    known = slope != 0
    assert bool(known.all()) != isinstance(module, nn.ReLU)
    torch.testing.assert_close(found[known], inputs.detach()[known])


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Tanh(), nn.ReLU()])
def test_outputs_beyond_the_range_count_as_its_nearest_value(module: nn.Module) -> None:
    outputs = torch.tensor([-2.0, 2.0], dtype=torch.float64).reshape(1, 1, 2)
    found, slope = invert(Link("name", module, (2,), (2,)), outputs, {})
    assert found.isfinite().all()
    assert found[0, 0, 0] < found[0, 0, 1]
    assert (slope >= 0).all()


def test_noise_of_a_relu_counts_as_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1e-5 * torch.rand(2, 500, generator=generator, dtype=torch.float64)
    outputs = torch.cat([noise, 2e-4 + torch.rand(2, 500, generator=generator, dtype=torch.float64)], dim=1)
    outputs[1, :500] = 0
    for scale in (1.0, 1e-20):
        found, slope = invert(Link("name", nn.ReLU(), (500,), (500,)), scale * outputs.reshape(2, 2, 500), {})
        assert torch.equal(slope[:, 1], torch.ones_like(slope[:, 1]))
        assert torch.equal(found[:, 1], scale * outputs[:, 500:])
        assert not slope[:, 0].any()
        assert not found[:, 0].any()


def test_normalises_in_the_precision_of_the_images() -> None:
    images = torch.rand(2, 1, 1, 3, 3, dtype=torch.float64)
    normalize = Link("normalize", Normalize([0.1], [0.3]), (1, 3, 3), (1, 3, 3))
    outputs = apply(normalize, images, {})
    torch.testing.assert_close(outputs, (images - 0.1) / 0.3, rtol=0, atol=1e-12)
    torch.testing.assert_close(invert(normalize, outputs, {})[0], images, rtol=0, atol=1e-12)
