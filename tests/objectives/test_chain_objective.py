"""The squared gradient distance of chains without autograd, against differentiating the victim's gradients twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value
from torchvision.transforms import Normalize

from leakage.clients.low_rank import in_basis
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.defenses import Clip, Defense, Quantise, RandomPruning, Soteria
from leakage.defenses.base import simulate as simulated
from leakage.inversion.simulation import Simulation
from leakage.models import MLP, ConvNet, LeNet
from leakage.models.layers import AveragePooling
from leakage.objectives import SquaredDistance, chain_layers
from leakage.objectives.chain_objective import ChainObjective

SHAPE = (3, 8, 8)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


def chain(*layers: nn.Module, inputs: int = 3, width: int = 4 * 64) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(width, 5))


class Reshaped(nn.Module):
    """A chain whose convolutions take other maps than the layers before them give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tanh, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 5, 3)
        self.pool, self.third, self.fourth = nn.AvgPool2d(2), nn.Linear(75, 48), nn.Conv2d(3, 5, 2)
        self.classifier = nn.Linear(45, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.tanh(self.first(images)).view(len(images), 2, 12, 8))
        hidden = self.third(self.pool(maps).flatten(1))
        return self.classifier(self.fourth(hidden.view(len(images), 3, 4, 4)).flatten(1))


def make(
    model: nn.Module, *, shape: tuple[int, int, int] = SHAPE, victims: int = 3, own: bool = True,
    dtype: torch.dtype = torch.float64, **options: object,
) -> tuple[Victim, SharedGradient, Tensor, Tensor]:  # fmt: skip
    """A victim, what it shared, and other images and class probabilities (any real values)."""
    victim = Victim(model.to(dtype), image_shape=shape, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    size, classes = (victims, victim.protocol.num_images), victim.protocol.num_classes
    images = torch.rand(*size, *shape, generator=generator, dtype=dtype)
    labels = torch.randint(classes, size, generator=generator)
    shared = victim.share(images, labels, states=victim.fresh_states([*range(victims)]) if own else None)
    dummies = torch.randn(*size, *shape, generator=generator, dtype=dtype)
    return victim, shared, dummies, torch.randn(*size, classes, generator=generator, dtype=dtype)


def check(
    victim: Victim, shared: SharedGradient, images: Tensor, targets: Tensor, given: SharedGradient | None = None
) -> None:
    """Compare with a loop over single victims that differentiates twice, through their defenses."""
    defenses = victim.defenses
    simulate = Simulation(defenses, victim).for_all if defenses else None
    found = ChainObjective(victim, simulate)(shared if given is None else given, images, targets)
    assert [part.shape for part in found] == [images.shape[:1], images.shape, targets.shape]
    for index in range(len(shared)):
        state = {name: tensor[index] if shared.own_weights else tensor for name, tensor in shared.state.items()}
        wanted = {name: tensor[index] for name, tensor in shared.gradients.items()}

        def distance(images: Tensor, targets: Tensor, state: object = state, wanted: object = wanted) -> Tensor:
            gradients = victim.gradients(state, images, targets)  # type: ignore[arg-type]
            return SquaredDistance()(simulated(defenses, gradients, wanted), wanted)  # type: ignore[arg-type]

        (by_images, by_targets), value = grad_and_value(distance, argnums=(0, 1))(images[index], targets[index])
        for part, expected in zip(found, (value, by_images, by_targets), strict=True):
            assert part.dtype == images.dtype
            error = (part[index] - expected).abs().max()
            assert error <= TOLERANCE[images.dtype] * expected.abs().max(), (index, error)
        assert value > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "leaky_relu", "silu"])
def test_lenet(activation: str, num_images: int, own: bool, dtype: torch.dtype) -> None:
    check(*make(LeNet(3, 8, 5, activation=activation), num_images=num_images, own=own, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "silu"])
def test_mlp(activation: str, num_images: int, own: bool, dtype: torch.dtype) -> None:
    check(*make(MLP(3, 8, width=6, activation=activation), num_images=num_images, own=own, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mean_squared_error"])
def test_losses(loss: str, reduction: str, dtype: torch.dtype) -> None:
    check(*make(LeNet(3, 8, 5, width=2), num_images=2, loss=loss, reduction=reduction, dtype=dtype))


@pytest.mark.parametrize("width", [1, 4, 5, 12, 16, 17])
@pytest.mark.parametrize("shape", [(1, 9, 12), (2, 10, 7), (5, 11, 11)])
def test_widths_and_sizes_that_strides_do_not_divide(shape: tuple[int, int, int], width: int) -> None:
    model = LeNet(shape[0], shape[1:], 5, width=width)
    check(*make(model, shape=shape, victims=2, num_images=2, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize(
    "model",
    [
        chain(nn.Tanh()),
        chain(nn.Tanh(), nn.Conv2d(4, 5, 3, stride=(2, 1), padding=(0, 2), dilation=(1, 2)), nn.Tanh(), width=5 * 24),
        chain(nn.Sigmoid(), nn.Conv2d(4, 6, 3, bias=False), nn.Sigmoid(), nn.Conv2d(6, 5, 1), nn.SiLU(), width=5 * 36),
        chain(nn.Sigmoid(), nn.Conv2d(4, 6, 3, padding="same"), nn.Tanh(), nn.Sigmoid(), width=6 * 64),
        chain(nn.Conv2d(4, 5, 3, padding="valid"), nn.AvgPool2d(3, 2, padding=1), nn.Sigmoid(), width=5 * 9),
        chain(nn.Sigmoid(), nn.Conv2d(4, 5, 2), nn.Sigmoid(), nn.AvgPool2d(2, ceil_mode=True), width=5 * 16),
        chain(nn.SiLU(), AveragePooling(), nn.Identity(), nn.Dropout().eval(), width=4 * 16),
        chain(nn.Conv2d(4, 7, 3, padding=1), width=7 * 64),
        nn.Sequential(Normalize([0.5, 0.4, 0.3], [0.3, 0.2, 0.1]), chain(nn.Sigmoid())),
        nn.Sequential(nn.Tanh(), nn.AvgPool2d(2), chain(nn.LeakyReLU(0.2), width=4 * 16)),
        chain(nn.Conv2d(4, 3, 1), Normalize([0.5, 0.4, 0.3], [0.3, 0.2, 0.1]), nn.Tanh(), width=3 * 64),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 7, bias=False), nn.Sigmoid(), nn.Linear(7, 5, bias=False)),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
        Reshaped(),
    ],
    ids=[
        "tanh", "geometry", "no bias", "two activations", "pool before sigmoid", "pool after sigmoid", "nothing",
        "linear", "normalised", "before layers", "normalised behind", "no biases", "one layer", "reshaped",
    ],
)  # fmt: skip
def test_other_chains(model: nn.Module, dtype: torch.dtype) -> None:
    check(*make(model, num_images=2, victims=2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("frozen", ["features.0", "features.2.weight", "features.4.bias", "classifier.weight"])
def test_frozen_parameters_share_nothing(frozen: str, dtype: torch.dtype) -> None:
    model = LeNet(3, 8, 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    check(*make(model, dtype=dtype))


def test_several_images_with_the_same_weights_in_the_layout_of_single_ones() -> None:
    check(*make(LeNet(3, 8, 5), victims=1, own=False, num_images=3, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_victims_do_not_depend_on_one_another(own: bool, dtype: torch.dtype) -> None:
    victim, shared, images, targets = make(LeNet(1, 12, 5), shape=(1, 12, 12), victims=5, own=own, dtype=dtype)
    objective = ChainObjective(victim)
    together = objective(shared, images, targets)
    order = torch.tensor([3, 0])
    apart = objective(shared.select(order), images[order], targets[order])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one[order], other, rtol=TOLERANCE[dtype], atol=0 if dtype == torch.float64 else 1e-5)


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5, bias=False))


def with_frozen_bias() -> nn.Module:
    model = LeNet(3, 8, 5)
    model.classifier.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("loss", ["cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize(
    "model",
    [LeNet(3, 8, 5), MLP(3, 8, width=6), without_bias(), with_frozen_bias(), chain(nn.ReLU(), nn.AvgPool2d(1)),
     nn.Sequential(nn.Flatten(), nn.Linear(192, 5))],
    ids=["lenet", "mlp", "no bias", "frozen bias", "chain", "one layer"],
)  # fmt: skip
def test_a_last_layer_whose_gradient_is_given_in_a_basis(
    model: nn.Module, loss: str, num_images: int, own: bool, dtype: torch.dtype
) -> None:
    victim, shared, images, targets = make(model, num_images=num_images, own=own, loss=loss, dtype=dtype)
    given = in_basis(shared, victim)
    check(victim, shared, images, targets, given)
    unit = torch.tensor([2.0**20, 1.0, 2.0**-5], dtype=dtype)
    plain = ChainObjective(victim)(given, images, targets)
    for part, scaled in zip(plain, ChainObjective(victim)(given, images, targets, unit), strict=True):
        assert torch.equal(scaled, part * unit.square().view(-1, *[1] * (part.ndim - 1)))


def test_the_result_follows_changes_of_what_was_shared() -> None:
    victim, shared, images, targets = make(LeNet(3, 8, 5))
    objective = ChainObjective(victim)
    before = objective(shared, images, targets)[0]
    assert torch.equal(before, objective(shared, images, targets)[0])
    shared.gradients["classifier.bias"] += 1
    inside = objective(shared, images, targets)[0]
    assert torch.allclose(inside, ChainObjective(victim)(shared, images, targets)[0])
    assert not torch.allclose(inside, before)
    shared.state["features.0.weight"] = shared.state["features.0.weight"] + 1
    other = objective(shared, images, targets)[0]
    assert torch.equal(other, ChainObjective(victim)(shared, images, targets)[0])
    assert not torch.allclose(other, inside)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("model", [LeNet(3, 8, 5), MLP(3, 8, width=6, activation="silu"), chain(nn.Tanh())])
def test_a_unit_that_is_a_power_of_two_scales_exactly(
    model: nn.Module, loss: str, own: bool, dtype: torch.dtype
) -> None:
    victim, shared, images, targets = make(model, num_images=3, own=own, loss=loss, dtype=dtype)
    unit = torch.tensor([2.0**20, 1.0, 2.0**-5], dtype=dtype)
    plain = ChainObjective(victim)(shared, images, targets)
    for part, scaled in zip(plain, ChainObjective(victim)(shared, images, targets, unit), strict=True):
        assert torch.equal(scaled, part * unit.square().view(-1, *[1] * (part.ndim - 1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("defenses", [[Clip(0.05), RandomPruning(0.5)], [Quantise(4)], [Soteria(0.5)]], ids=repr)
def test_simulated_defenses(defenses: list[Defense], own: bool, dtype: torch.dtype) -> None:
    # In single precision, LeNet has added channels.
    victim, shared, images, targets = make(LeNet(3, 8, 5), num_images=2, own=own, dtype=dtype, defenses=defenses)
    check(victim, shared, images, targets)
    unit, simulate = torch.tensor([2.0**20, 1.0, 2.0**-5], dtype=dtype), Simulation(defenses, victim).for_all
    plain = ChainObjective(victim, simulate)(shared, images, targets)
    for part, scaled in zip(plain, ChainObjective(victim, simulate)(shared, images, targets, unit), strict=True):
        assert torch.equal(scaled, part * unit.square().view(-1, *[1] * (part.ndim - 1)))


def test_a_unit_keeps_tiny_gradients_from_underflowing() -> None:
    model = LeNet(3, 8, 5)
    with torch.no_grad():
        model.classifier.bias[2] = 75  # other classes have probabilities of about 1e-33
    victim, shared, images, targets = make(model, own=False, dtype=torch.float32)
    shared = victim.share(images.sigmoid(), torch.full((3, 1), 2))
    targets = torch.eye(5)[torch.full((3, 1), 2)]
    assert not any(part.any() for part in ChainObjective(victim)(shared, images, targets)[:2])
    unit = torch.full((3,), 2.0**105)
    found = ChainObjective(victim)(shared, images, targets, unit)
    shared, images, targets, unit = shared.to(torch.float64), images.double(), targets.double(), unit.double()
    exact = ChainObjective(Victim(model.double(), image_shape=SHAPE))(shared, images, targets, unit)
    assert bool((found[0] > 1e-4).all())
    for part, expected in zip(found[:2], exact, strict=False):
        error = (part - expected).abs().max() / expected.abs().max()
        assert error < 1e-3, error


def test_the_result_follows_changes_of_the_unit() -> None:
    victim, shared, images, targets = make(LeNet(3, 8, 5))
    objective, unit = ChainObjective(victim), torch.ones(3, dtype=torch.float64)
    plain = objective(shared, images, targets)[0]
    assert torch.equal(objective(shared, images, targets, unit)[0], plain)
    unit.mul_(2)
    assert torch.equal(objective(shared, images, targets, unit)[0], 4 * plain)
    assert torch.equal(objective(shared, images, targets)[0], plain)


def test_inputs_are_left_as_they_were_and_no_graph_is_built() -> None:
    victim, shared, images, targets = make(LeNet(3, 8, 5), dtype=torch.float32)
    images.requires_grad_()
    tensors = [*shared.state.values(), *shared.gradients.values(), images, targets]
    copies = [tensor.clone() for tensor in tensors]
    found = ChainObjective(victim)(shared, images, targets)
    assert not any(part.requires_grad for part in found)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_without_fast_groups_convolutions_are_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    victim, shared, images, targets = make(LeNet(3, 8, 5), dtype=torch.float32, num_images=2)
    fast = ChainObjective(victim)(shared, images, targets)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(chain_layers, "_GroupedConvolution")
    slow = ChainObjective(victim)(shared, images, targets)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-4)


class Scaled(nn.Module):
    """A network with a parameter outside of its layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(192, 192), nn.Linear(192, 192)
        self.scale = nn.Parameter(torch.ones(1))
        if kind == "tied":
            self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.sigmoid(images.flatten(1)) if self.kind == "functional" else images.flatten(1)
        logits = self.second(self.first(hidden))
        return logits * self.scale if self.kind == "logits" else logits


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chain(nn.GELU()), "plain chain of layers, but got GELU '1', which is not supported. Supported are Conv2d"),
        (chain(nn.BatchNorm2d(4).eval()), "but got BatchNorm2d '1', which is not supported"),
        (chain(nn.Conv2d(4, 4, 3, padding=1, groups=2)), "but got Conv2d '1', of 2 groups"),
        (chain(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "but got Conv2d '1', padded by 'reflect'"),
        (
            chain(nn.Conv2d(4, 4, 2, padding="same", dilation=1)),
            "but got Conv2d '1', padded by more pixels on one side",
        ),
        (chain(nn.Linear(8, 8)), "but got Linear '1', applied to several vectors of each image"),
        (Scaled("functional"), "but got Linear 'first', whose input is not the output of the images"),
        (Scaled("tied"), "but got Linear 'second', whose parameters are computed from others or shared"),
        (Scaled("unused"), r"hold all trainable parameters, but got \['scale'\]"),
        (Scaled("logits"), "logits are the output of a linear layer, but got those of Linear 'second' and operations"),
        (ConvNet(3, 8, 5, width=4), "Expected a plain chain of layers"),
    ],
)
def test_other_networks_are_refused(model: nn.Module, message: str) -> None:
    victim = Victim(model, image_shape=SHAPE, num_images=2)
    with pytest.raises(ValueError, match=message):
        ChainObjective(victim)


def test_several_local_steps_are_refused() -> None:
    victim = Victim(LeNet(3, 8), image_shape=SHAPE, num_images=2, local_steps=2, learning_rate=0.1)
    with pytest.raises(ValueError, match="Expected `victim` to make one local step, but got 2"):
        ChainObjective(victim)
