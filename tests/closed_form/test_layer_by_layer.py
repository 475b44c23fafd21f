"""Images from the last layer's inputs, on small networks whose inputs are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.transforms import Normalize

from leakage.clients.chain import Link
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form import (
    SeparatedFeatures,
    check_layers,
    images_by_layers,
    invert_layers,
    layer_by_layer,
    linear_system,
)
from leakage.closed_form.linear_system import LinearSystem
from leakage.defenses import PRECODE
from leakage.models import MLP, ConvNet, LeNet

Case = tuple[SharedGradient, Victim, SeparatedFeatures, Tensor]


def case(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    victims: int = 3,
    count: int = 1,
    own: bool = False,
    images: Tensor | None = None,
    **options: object,
) -> Case:
    """What victims in float64 share, and the true inputs and gradients of their last layers."""
    victim = Victim(model.double(), image_shape=shape, num_images=count, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(victims, count, *shape, generator=generator, dtype=torch.float64)
    images = drawn if images is None else images
    labels = torch.randint(victim.protocol.num_classes, (victims, count), generator=generator)
    shared = victim.share(images, labels, states=victim.fresh_states([*range(victims)]) if own else None)
    return shared, victim, true_features(shared, victim, images, labels), images


def true_features(shared: SharedGradient, victim: Victim, images: Tensor, labels: Tensor) -> SeparatedFeatures:
    features, gradients = [], []
    for number in range(len(shared)):
        state = {name: tensor[number] if shared.own_weights else tensor for name, tensor in shared.state.items()}
        layer = victim.model.get_submodule(str(victim.classifier))
        hook = layer.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
        logits = functional_call(victim.model, state, images[number]).detach().requires_grad_()
        hook.remove()
        loss = F.cross_entropy(logits, labels[number], reduction="sum")
        gradients.append(torch.autograd.grad(loss, logits)[0])
    return SeparatedFeatures(torch.stack(features), torch.stack(gradients), torch.zeros(len(shared)))


def sequential(*layers: nn.Module, seed: int = 0) -> Callable[[], nn.Module]:
    """A network whose weights are larger than torch draws them, so that its systems are well conditioned."""

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(*layers)
        for parameter in model.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5
        return model

    return build


def batch_norm(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels).eval()
    norm.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return norm


def lenet(size: int = 8, channels: int = 1, **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LeNet(channels, size, 4, **options)  # type: ignore[arg-type]


def mlp(**options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP(1, 5, 4, width=12, **options)  # type: ignore[arg-type]


def conv_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(1, 6, 4, width=6, norm="none", pooling="none", activation="leaky_relu")


GRAY, COLOUR = (1, 6, 6), (3, 6, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "LeNet": (lenet, (1, 8, 8), 1),
    "MLP": (lambda: mlp(activation="sigmoid"), (1, 5, 5), 1),
    "MLP, two images": (lambda: mlp(activation="sigmoid"), (1, 5, 5), 2),
    "ReLU, MLP": (mlp, (1, 5, 5), 1),
    "LeakyReLU": (conv_net, GRAY, 1),
    "two images": (
        sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(288, 4)),
        GRAY,
        2,
    ),
    "ReLU": (
        sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
        ),
        GRAY,
        1,
    ),
    "norms, no bias": (
        sequential(
            *(Normalize([0.5] * 3, [0.2, 0.3, 0.4]), nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)),
            *(batch_norm(8), nn.Tanh(), nn.Conv2d(8, 8, 3, padding="same"), nn.Identity(), nn.LeakyReLU(0.2)),
            *(nn.Flatten(), nn.Linear(72, 40), nn.Sigmoid(), nn.Linear(40, 4)),
        ),
        COLOUR,
        1,
    ),
    "groups and dilation": (
        sequential(
            *(nn.Conv2d(3, 8, 3, padding=2, dilation=2), nn.Sigmoid()),
            *(nn.Conv2d(8, 8, (3, 2), stride=(1, 2), padding=(1, 0), groups=2), nn.Sigmoid()),
            *(nn.Flatten(), nn.Linear(8 * 6 * 3, 4)),
        ),
        COLOUR,
        1,
    ),
    "only a classifier": (sequential(nn.Flatten(), nn.Linear(36, 4)), GRAY, 2),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_exact_where_determined(name: str, own: bool) -> None:
    build, shape, count = NETWORKS[name]
    # Statistics of BatchNorm are not redrawn, all the rest is.
    shared, victim, separated, images = case(build(), shape, count=count, own=own and "norms" not in name)
    found = invert_layers(shared, victim, separated, tolerance=1e-12)
    assert found.determined.all()
    assert found.images.dtype == torch.float64
    torch.testing.assert_close(found.images, images, atol=1e-5, rtol=0)
    assert (found.residual < 1e-6).all()


def test_noise_behind_the_features_does_not_matter() -> None:
    """PRECODE: the gradient of the bottleneck's own first layer holds the features of a single image."""
    model = PRECODE(lenet(), size=6).double()
    victim = Victim(model, image_shape=(1, 8, 8))
    images = torch.rand(3, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[0], [3], [1]])
    shared = victim.share(images, labels, states=victim.fresh_states([0, 1, 2]))
    found, usable = images_by_layers(shared, victim, labels)
    assert usable.all()
    torch.testing.assert_close(found, images, atol=1e-4, rtol=0)
    for refused in (
        Victim(model, image_shape=(1, 8, 8), num_images=2),
        Victim(nn.Sequential(nn.Dropout(0.1), model), image_shape=(1, 8, 8)),
    ):
        with pytest.raises(ValueError, match=r"plain chain of layers, but got \[.*, which draw random numbers"):
            check_layers(refused)


def test_a_batch_equals_one_victim_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, victim, separated, _ = case(lenet(), (1, 8, 8), victims=5, own=True)
    together = invert_layers(shared, victim, separated)
    monkeypatch.setattr(layer_by_layer, "_MEMORY", {"cpu": 1})
    alone = invert_layers(shared, victim, separated)
    torch.testing.assert_close(together.images, alone.images, atol=1e-7, rtol=0)
    assert torch.equal(together.equations, alone.equations)


def test_a_victim_that_is_not_finite_spoils_no_other() -> None:
    shared, victim, separated, images = case(lenet(), (1, 8, 8), own=True)
    separated.features[1] = torch.nan
    found = invert_layers(shared, victim, separated, tolerance=1e-12)
    torch.testing.assert_close(found.images[[0, 2]], images[[0, 2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str) -> None:
    build, shape, count = NETWORKS["two images"]
    shared, victim, separated, images = case(build(), shape, count=count, reduction=reduction)
    found = invert_layers(shared, victim, separated, tolerance=1e-12)
    torch.testing.assert_close(found.images, images, atol=1e-5, rtol=0)
    assert (found.residual < 1e-8).all()


def test_a_layer_that_shares_no_gradient_has_its_own_equations() -> None:
    model = lenet()
    model.features[4].requires_grad_(False)
    shared, victim, separated, images = case(model, (1, 8, 8))
    found = invert_layers(shared, victim, separated, tolerance=1e-12)
    assert found.equations[:, 2].tolist() == [48] * 3
    torch.testing.assert_close(found.images, images, atol=1e-4, rtol=0)


def test_equations_are_counted_and_too_few_reported() -> None:
    model = sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))()
    shared, victim, separated, _ = case(model, COLOUR)
    found = invert_layers(shared, victim, separated)
    active = (separated.features > 0).sum((1, 2))
    assert found.layers == ("0",)
    assert found.unknowns.tolist() == [108]
    assert torch.equal(found.equations[:, 0], active + 3 * 18)
    assert torch.equal(found.determined, active + 54 >= 108)
    assert not found.determined.any()
    # The equations that there are hold.
    assert (found.residual < 1e-6).all()
    assert found.images.isfinite().all()


def test_of_all_solutions_the_one_most_like_images() -> None:
    model = sequential(nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 4))()
    smooth = torch.linspace(0, 1, 8, dtype=torch.float64).expand(1, 1, 1, 8, 8)
    rough = torch.rand(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for images in (smooth, rough):
        shared, victim, separated, _ = case(model, (1, 8, 8), victims=1, images=images)
        found = invert_layers(shared, victim, separated)
        assert not found.determined
        errors.append((found.images - images).square().mean() / images.var())
    assert errors[0] < errors[1] / 2


def test_iterations_are_limited() -> None:
    shared, victim, separated, images = case(lenet(), (1, 8, 8))
    found = invert_layers(shared, victim, separated, max_iterations=1)
    assert (found.images - images).abs().amax() > 0.01
    assert (found.residual > 1e-3).all()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 6, (3, 5), padding="same"),
        nn.Linear(4 * 7 * 5, 6),
    ],
)
def test_products_with_the_system(layer: nn.Conv2d | nn.Linear, gradient: bool, generator: torch.Generator) -> None:
    victims, count = 2, 3
    layer = layer.double()
    inputs = torch.randn(victims, count, 4, 7, 5, generator=generator, dtype=torch.float64)
    given = inputs.flatten(2) if isinstance(layer, nn.Linear) else inputs
    outputs = torch.stack([layer(part) for part in given])
    geometry = Link("", layer, tuple(given.shape[2:]), tuple(outputs.shape[2:])).geometry
    grouped = (victims, count, geometry.groups, 6 // geometry.groups, -1)
    slopes, errors = torch.rand(2, *outputs.shape, generator=generator, dtype=torch.float64)
    weight = layer.weight.detach().reshape(1, 1, geometry.groups, 6 // geometry.groups, -1)
    system = LinearSystem.weighted(
        geometry,
        weight=weight.expand(victims, count, -1, -1, -1),
        slopes=slopes.reshape(grouped),
        errors=errors.reshape(grouped) if gradient else None,
    )
    x = inputs.reshape(victims, -1)
    product = system.product(x)
    biased = layer.bias.detach().reshape(-1, *[1] * (outputs.ndim - 3))
    torch.testing.assert_close(product[0].reshape(outputs.shape), slopes * (outputs - biased).detach())
    if gradient:
        for victim in range(victims):
            (expected,) = torch.autograd.grad(layer(given[victim]), layer.weight, errors[victim])
            actual = product[1][victim].reshape(expected.shape) / system.scale[victim].squeeze()
            torch.testing.assert_close(actual, expected)
    other = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in product]
    left = sum((a * b).flatten(1).sum(1) for a, b in zip(product, other, strict=True))
    torch.testing.assert_close((x * system.transposed(other)).sum(1), left)
    dense = torch.stack([dense_matrix(system.select(torch.tensor([victim])), x.shape[1]) for victim in range(victims)])
    diagonal = dense.square().sum(1)
    torch.testing.assert_close(1 / system.diagonal, diagonal, rtol=1e-6, atol=1e-6)


def dense_matrix(system: LinearSystem, size: int) -> Tensor:
    columns = [system.product(row[None]) for row in torch.eye(size, dtype=torch.float64)]
    return torch.stack([torch.cat([part.flatten() for part in column]) for column in columns], dim=1)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_dense_preconditioner(groups: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_system, "_FEWEST_CHANNELS", 1)
    layer = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, dilation=(1, 2), groups=groups).double()
    geometry = Link("", layer, (4, 7, 5), (6, 4, 3)).geometry
    shape = (2, 3, groups, 6 // groups, 12)
    system = LinearSystem.weighted(
        geometry,
        weight=layer.weight.detach().reshape(1, 1, groups, 6 // groups, -1).expand(2, 3, -1, -1, -1),
        slopes=torch.rand(shape, generator=generator, dtype=torch.float64),
        errors=torch.randn(shape, generator=generator, dtype=torch.float64),
    )
    assert system.blocks is not None
    dense = dense_matrix(system.select(torch.tensor([1])), 3 * 4 * 35)
    gradient = dense[3 * 6 * 12 :]  # rows of the gradient
    layer_diagonal = dense[: 3 * 6 * 12].square().sum(0).reshape(3, groups, 4 // groups, 35).mean(2)
    whole = (gradient.T @ gradient).reshape(3, 4, 35, 3, 4, 35)
    vector = torch.randn(2, 3 * 4 * 35, generator=generator, dtype=torch.float64)
    expected = torch.empty(3, 4, 35, dtype=torch.float64)
    for channel in range(4):
        block = whole[:, channel, :, :, channel].reshape(105, 105)
        block = block + layer_diagonal[:, channel // (4 // groups)].flatten().diag()
        given = vector[1].reshape(3, 4, 35)[:, channel].flatten()
        expected[:, channel] = torch.linalg.solve(block, given).reshape(3, 35)
    torch.testing.assert_close(system.precondition(vector)[1], expected.flatten(), rtol=1e-5, atol=1e-7)


def test_several_local_steps_are_refused() -> None:
    shared, victim, separated, _ = case(lenet(), (1, 8, 8), local_steps=2, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"Expected victims with `local_steps` 1, .* but got 2"):
        invert_layers(shared, victim, separated)


@pytest.mark.parametrize("name", ["features", "logit_gradients"])
def test_shapes_are_checked(name: str) -> None:
    shared, victim, separated, _ = case(lenet(), (1, 8, 8))
    wrong = dataclasses.replace(separated, **{name: getattr(separated, name)[:, :, 1:]})
    with pytest.raises(ValueError, match=rf"Expected `{name}` of shape \(3, 1, (48|4)\), but got"):
        invert_layers(shared, victim, wrong)


def test_other_networks_are_refused() -> None:
    shared, victim, separated, _ = case(lenet(activation="silu"), (1, 8, 8))
    with pytest.raises(ValueError, match=r"got SiLU 'features\.1'"):
        invert_layers(shared, victim, separated)
