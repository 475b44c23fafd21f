"""The client's gradients against plain autograd, and what must stay as it was on the user's model."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from leakage import LeNet, Protocol, SharedGradient, Victim
from leakage.seeds import derive_seed

IMAGE_SHAPE = (2, 6, 5)
CLASSES = 4


def network(kind: str, *, bias: bool, classes: int = CLASSES) -> nn.Module:
    """A small classifier of ``IMAGE_SHAPE``."""
    channels, height, width = IMAGE_SHAPE
    layers: dict[str, Callable[[], list[nn.Module]]] = {
        "linear": lambda: [nn.Flatten(), nn.Linear(channels * height * width, classes, bias=bias)],
        "mlp": lambda: [
            nn.Flatten(),
            nn.Linear(channels * height * width, 7, bias=bias),
            nn.Tanh(),
            nn.Linear(7, classes, bias=bias),
        ],
        "conv": lambda: [
            nn.Conv2d(channels, 3, 3, stride=2, bias=bias),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, classes, bias=bias),
        ],
        "batch_norm": lambda: [
            nn.Conv2d(channels, 3, 3, padding=1, bias=bias),
            nn.BatchNorm2d(3, affine=bias),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, classes, bias=bias),
        ],
        "group_norm": lambda: [
            nn.Conv2d(channels, 4, 3, bias=bias),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, classes, bias=bias),
        ],
    }
    return nn.Sequential(*layers[kind]()).eval().double()


KINDS = ("linear", "mlp", "conv", "batch_norm", "group_norm")


def private(victims: int, num_images: int = 1, seed: int = 0, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Images ``(V, N, *IMAGE_SHAPE)`` in double precision and labels ``(V, N)``."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(victims, num_images, *IMAGE_SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(classes, (victims, num_images), generator=generator)


def one_at_a_time(
    model: nn.Module, state: dict[str, Tensor], images: Tensor, labels: Tensor, loss: str, reduction: str
) -> dict[str, Tensor]:
    """The slow reference: one victim, one model, torch's own losses, plain autograd."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    logits = model(images)
    if loss == "cross_entropy":
        value = F.cross_entropy(logits, labels, reduction=reduction)
    else:
        squares = (logits - F.one_hot(labels, logits.shape[1])).square().mean(1)
        value = squares.mean() if reduction == "mean" else squares.sum()
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


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
    optimizer = torch.optim.SGD(parameters.values(), lr=protocol.learning_rate)
    size = protocol.local_batch_size or protocol.num_images
    batches = itertools.cycle(zip(images.split(size), labels.split(size), strict=True))
    for batch, targets in itertools.islice(batches, protocol.local_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets, reduction=protocol.reduction).backward()
        optimizer.step()
    whole = protocol.learning_rate * protocol.local_steps
    return {name: (start[name] - parameters[name].detach()) / whole for name in parameters}


@pytest.mark.parametrize("own", [True, False])
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
def test_local_steps_are_those_of_sgd(kind, training, reduction, local_steps, local_batch_size, own):
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


def test_a_local_batch_of_all_images_is_the_default():
    model = network("conv", bias=True)
    usual, told = (
        Victim(model, image_shape=IMAGE_SHAPE, num_images=3, local_batch_size=size, local_steps=2, learning_rate=0.1)
        for size in (None, 3)
    )
    assert usual.protocol == told.protocol
    assert usual.fingerprint() == told.fingerprint()
    usual.check(told.share(*private(2, 3)))


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


# -- BatchNorm that normalises by the client's own batch


def normalising_twice(*, statistics: bool = True) -> nn.Sequential:
    """Two BatchNorm layers, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3, track_running_stats=statistics),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(36, 5),
            nn.BatchNorm1d(5, track_running_stats=statistics),
            nn.Linear(5, CLASSES),
        )
        for layer in (model[1], model[5]):
            nn.init.uniform_(layer.weight, 0.5, 2)
        for layer in (model[1], model[5]) if statistics else ():
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model.double()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("evaluating", ["", "1", "5"])
def test_batch_norm_in_training_mode(evaluating, own):
    """Each layer in its own mode; the reference is the user's model as it stands."""
    model = normalising_twice()
    if evaluating:
        model.get_submodule(evaluating).eval()
    before = everything(model)
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=3)
    buffers = {name for name, _ in victim.model.named_buffers()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert buffers == {f"{evaluating}.{name}" for name in statistics if evaluating}
    images, labels = private(4, 3)
    states = victim.fresh_states([1, 2, 3, 4]) if own else None
    shared = victim.share(images, labels, states=states)
    victim.check(shared)
    assert shared.state.keys() == victim.state.keys()
    assert everything(model) == before
    for index in range(4):
        state = model.state_dict() | ({} if states is None else {name: states[name][index] for name in states})
        expected = one_at_a_time(model, state, images[index], labels[index], "cross_entropy", "mean")
        for name, gradient in expected.items():
            torch.testing.assert_close(shared.gradients[name][index], gradient)


def test_batch_norm_without_running_statistics_is_that_of_training_mode():
    training, without = normalising_twice(), normalising_twice(statistics=False).eval()
    victims = [Victim(model, image_shape=IMAGE_SHAPE, num_images=2) for model in (training, without)]
    one, other = (victim.share(*private(3, 2)) for victim in victims)
    victims[0].check(other)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(other.gradients[name], gradient)
    evaluated = Victim(training.eval(), image_shape=IMAGE_SHAPE, num_images=2)
    assert victims[0].fingerprint() != evaluated.fingerprint()


def test_fresh_states_do_not_depend_on_the_mode_of_batch_norm():
    training, evaluating = (
        Victim(normalising_twice().train(mode), image_shape=IMAGE_SHAPE, num_images=2).fresh_states([4, 9])
        for mode in (True, False)
    )
    assert evaluating.keys() - training.keys() == {name for name in evaluating if "running" in name or "num_" in name}
    for name, tensor in training.items():
        assert torch.equal(tensor, evaluating[name]), name


def test_statistics_that_are_not_used_are_refused():
    evaluated, training = (
        Victim(normalising_twice().train(mode), image_shape=IMAGE_SHAPE, num_images=2) for mode in (False, True)
    )
    shared = evaluated.share(*private(2, 2))
    message = r"no running statistics of BatchNorm .* but got \['1\.num_batches_tracked'.*Call `model\.eval\(\)` if"
    with pytest.raises(ValueError, match=message):
        training.check(shared)
    with pytest.raises(ValueError, match=message):
        training.share(*private(2, 2), states=evaluated.fresh_states([0, 1]))
    with pytest.raises(ValueError, match=r"missing \['1\.num_batches_tracked', '1\.running_mean'"):
        evaluated.check(training.share(*private(2, 2)))


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


# -- what is shared


def test_defaults_of_what_is_shared():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    images, labels = private(3)
    shared = victim.share(images, labels)
    assert shared.ids.tolist() == [0, 1, 2]
    assert shared.labels is None, "the attacker must not be told the labels unless asked to"
    assert not shared.own_weights
    assert shared.state.keys() == dict(victim.model.state_dict()).keys()
    assert not any(tensor.requires_grad for tensor in (*shared.gradients.values(), *shared.state.values()))


def test_ids_and_revealed_labels():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE, num_images=2)
    images, labels = private(3, 2)
    shared = victim.share(images, labels, ids=torch.tensor([7, 5, 9]), reveal_labels=True)
    assert shared.ids.tolist() == [7, 5, 9]
    assert torch.equal(shared.labels, labels)
    with pytest.raises(ValueError, match=r"to have shape \(2, \.\.\.\), but got \(3,"):
        victim.share(images, labels, ids=torch.tensor([7, 5]))


# -- the user's model


def everything(model: nn.Module) -> dict[str, object]:
    """All that somebody could leave behind on a model."""
    hooks = [name for name in vars(model) if name.endswith("hooks")]
    assert "_forward_hooks" in hooks
    return {
        "hooks": [[list(getattr(module, hook) or ()) for hook in hooks] for module in model.modules()],
        "mode": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if tensor.grad is None else tensor.grad.tolist() for tensor in model.parameters()],
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "parameters": [id(parameter) for parameter in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def used_model(kind: str = "batch_norm") -> nn.Sequential:
    """A model in the middle of its life: hooks, gradients, frozen parts, mixed modes."""
    model = network(kind, bias=True)
    assert isinstance(model, nn.Sequential)
    model(private(1)[0][0]).sum().backward()
    model[0].weight.requires_grad_(False)
    model[2].train()
    model[-1].register_forward_hook(lambda module, inputs, output: None)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_nothing_stays_behind(training):
    model = used_model()
    model[1].train(training)
    before = everything(model)
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    victim.share(*private(3))
    victim.share(*private(2), states=victim.fresh_states([0, 1]))
    victim.fingerprint()
    assert everything(model) == before


class Fails(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        raise RuntimeError("out of order")


def test_nothing_stays_behind_after_a_failed_construction():
    model = used_model()
    before = everything(model)
    with pytest.raises(ValueError, match="Expected `model` to take images"):
        Victim(model, image_shape=(3, 6, 5))
    with pytest.raises(ValueError, match=r"Expected `model` to take images .* out of order"):
        Victim(nn.Sequential(model, Fails()), image_shape=IMAGE_SHAPE)
    assert everything(model) == before


def test_nothing_stays_behind_after_a_failed_capture():
    model = used_model()
    with torch.no_grad():
        model[-1].bias[0] = math.nan
    before = repr(everything(model))
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match="Expected finite numbers"):
        victim.share(*private(3))
    assert repr(everything(model)) == before


def test_later_training_does_not_change_the_victim():
    model = network("mlp", bias=True)
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    before = victim.share(*private(2)).gradients
    with torch.no_grad():
        model[1].weight.zero_()
    after = victim.share(*private(2)).gradients
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unsuccessful_victim_leaves_autograd_as_it_was():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match="Expected `labels`"):
        victim.share(private(1)[0], torch.tensor([[CLASSES]]))
    assert torch.is_grad_enabled()


# -- fresh networks


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_states_do_not_depend_on_grouping(kind):
    victim = Victim(network(kind, bias=True), image_shape=IMAGE_SHAPE)
    seeds = [derive_seed(3, index, "weights") for index in range(5)]
    whole = victim.fresh_states(seeds)
    parts = [victim.fresh_states(part) for part in (seeds[:1], seeds[1:4], seeds[4:])]
    backwards = victim.fresh_states(seeds[::-1])
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name
        assert torch.equal(tensor, backwards[name].flip(0)), name
    weight = next(name for name in victim.trainable if name.endswith("weight"))
    assert not torch.equal(whole[weight][0], whole[weight][1])


def test_fresh_states_leave_the_global_random_state():
    victim = Victim(network("conv", bias=True), image_shape=IMAGE_SHAPE)
    before = torch.random.get_rng_state()
    victim.fresh_states([1, 2, 3])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fresh_states_do_not_depend_on_the_global_random_state():
    victim = Victim(network("conv", bias=True), image_shape=IMAGE_SHAPE)
    first = victim.fresh_states([5])
    torch.rand(7)
    second = victim.fresh_states([5])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fresh_states_are_the_networks_own_initialisation():
    states = Victim(LeNet(), image_shape=(1, 28, 28)).fresh_states(list(range(20)))
    for name, tensor in states.items():
        assert tensor.abs().max() <= 0.5
        assert tensor.abs().max() > 0.45, f"{name} has torch's narrower initialisation"


def test_fresh_states_reset_statistics():
    model = network("batch_norm", bias=True)
    model[1].running_mean.fill_(3.0)
    states = Victim(model, image_shape=IMAGE_SHAPE).fresh_states([0, 1])
    assert torch.equal(states["1.running_mean"], torch.zeros(2, 3, dtype=torch.float64))
    assert states["1.num_batches_tracked"].shape == (2,)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale


def test_fresh_states_errors():
    with pytest.raises(ValueError, match="Expected `seeds` to hold one seed per victim, but got none"):
        Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE).fresh_states([])
    victim = Victim(nn.Sequential(Scale(), nn.Flatten(), nn.Linear(60, 3)), image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match=r"`reset_parameters\(\)`, but got Scale '0'.*use weights='shared'"):
        victim.fresh_states([0])


def test_fresh_states_by_a_parent_that_draws_the_weights():
    class Parent(nn.Sequential):
        def reset_parameters(self) -> None:
            nn.init.uniform_(self[0].scale)
            self[2].reset_parameters()

    victim = Victim(Parent(Scale(), nn.Flatten(), nn.Linear(60, 3)), image_shape=IMAGE_SHAPE)
    assert victim.fresh_states([0, 1])["0.scale"].unique().numel() == 2


# -- the classifier


class LogSoftmaxAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(60, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1)).log_softmax(1)


class LinearTwice(LogSoftmaxAtTheEnd):
    """The layer that gives the logits is neither the last by name nor the only linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.another = nn.Linear(60, 60)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.another(images.flatten(1)))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (network("mlp", bias=True), "3"),
        (nn.Sequential(nn.Identity(), network("mlp", bias=False).float(), nn.Identity()), "1.3"),
        (LinearTwice(), "linear"),
        (LogSoftmaxAtTheEnd(), None),
        (nn.Sequential(nn.Flatten(), nn.Linear(60, 3), nn.Sigmoid()), None),
        (nn.Sequential(nn.Conv2d(2, 3, (6, 5)), nn.Flatten()), None),
    ],
    ids=["last", "nested", "not last by name", "log-softmax", "sigmoid", "convolution"],
)
def test_classifier(model, name):
    assert Victim(model, image_shape=IMAGE_SHAPE).classifier == name


# -- fingerprint


def test_fingerprint_is_of_architecture_and_protocol_only():
    one, other = (Victim(LeNet(), image_shape=(1, 28, 28)) for _ in range(2))
    assert not torch.equal(one.state["classifier.bias"], other.state["classifier.bias"])
    assert one.fingerprint() == other.fingerprint()
    others = [
        Victim(LeNet(num_classes=11), image_shape=(1, 28, 28)),
        Victim(LeNet(), image_shape=(1, 27, 27)),
        Victim(LeNet(), image_shape=(1, 28, 28), num_images=2),
        Victim(LeNet(), image_shape=(1, 28, 28), loss="mean_squared_error"),
        Victim(LeNet(), image_shape=(1, 28, 28), reduction="sum"),
        Victim(LeNet(), image_shape=(1, 28, 28), local_steps=2, learning_rate=0.1),
        Victim(LeNet(), image_shape=(1, 28, 28), local_steps=2, learning_rate=0.2),
    ]
    assert len({victim.fingerprint() for victim in (one, *others)}) == 1 + len(others)


# -- errors of construction


def with_dropout(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), layer, nn.Linear(60, 3))


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.AlphaDropout(0.1)], ids=repr)
def test_dropout_in_training_mode(layer):
    with pytest.raises(ValueError, match=r"without dropout in training mode, but got '1'.*Call `model\.eval\(\)`"):
        Victim(with_dropout(layer), image_shape=IMAGE_SHAPE)
    Victim(with_dropout(layer).eval(), image_shape=IMAGE_SHAPE)
    Victim(with_dropout(nn.Dropout(0.0)), image_shape=IMAGE_SHAPE)


def test_functional_dropout_in_training_mode():
    class Functional(LogSoftmaxAtTheEnd):
        def forward(self, images: Tensor) -> Tensor:
            return self.linear(F.dropout(images.flatten(1), training=self.training))

    with pytest.raises(ValueError, match=r"to be a function of images and weights alone.*random"):
        Victim(Functional(), image_shape=IMAGE_SHAPE)
    assert Victim(Functional().eval(), image_shape=IMAGE_SHAPE).classifier == "linear"


def test_batch_norm_with_a_single_value():
    """torch can't normalise it either; two images, or a larger map, can be."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    message = r"Expected several values per channel for BatchNorm .* but got one.*`num_images`.*`model\.eval\(\)`"
    with pytest.raises(ValueError, match=message):
        Victim(model, image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match=message):
        Victim(model, image_shape=IMAGE_SHAPE, num_images=2, local_steps=2, learning_rate=0.1, local_batch_size=1)
    with pytest.raises(ValueError, match=message):
        Victim(torchvision.models.resnet18(num_classes=10), image_shape=(3, 32, 32))
    Victim(model, image_shape=IMAGE_SHAPE, num_images=2)
    Victim(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(60, 3)), image_shape=IMAGE_SHAPE)
    Victim(model.eval(), image_shape=IMAGE_SHAPE)
    normalised_groups = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(2, 2), nn.Flatten(), nn.Linear(2, 3))
    with pytest.raises(ValueError, match="Expected `model` to take images"):
        Victim(normalised_groups, image_shape=IMAGE_SHAPE)


def test_statistics_updated_on_the_way():
    model = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(60, 3))
    with pytest.raises(ValueError, match="no statistics updated on the way"):
        Victim(model, image_shape=IMAGE_SHAPE)
    Victim(model.eval(), image_shape=IMAGE_SHAPE)


def test_nothing_to_share():
    for model in (nn.Flatten(), LeNet().requires_grad_(False)):
        with pytest.raises(ValueError, match="parameters that require gradients, but got none: nothing is shared"):
            Victim(model, image_shape=(1, 28, 28))


@pytest.mark.parametrize("image_shape", [(3, 28, 28), (1, 32, 32), (1, 28, 32)])
def test_images_that_the_model_does_not_take(image_shape):
    shape = ", ".join(map(str, image_shape))
    with pytest.raises(ValueError, match=rf"`model` to take images of shape \(N, {shape}\), but got: "):
        Victim(LeNet(), image_shape=image_shape)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Conv2d(2, 3, 3), r"\(1, 3, 4, 3\)"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(60, 3)), r"\(3,\)"),
        (nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Flatten(0, 1), nn.Flatten()), r"\(2, 18\)"),
    ],
    ids=["maps", "no batch", "two for one"],
)
def test_no_logits(model, got):
    with pytest.raises(ValueError, match=rf"`model` to give logits of shape \(N, K\), but got {got} for one image"):
        Victim(model, image_shape=IMAGE_SHAPE)


def test_logits_that_are_no_tensor():
    class Tuple(LogSoftmaxAtTheEnd):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            logits = super().forward(images)
            return logits, logits

    for num_images, number in ((1, "one image"), (2, "2 images"), (9, "2 images")):
        with pytest.raises(ValueError, match=f"but got tuple for {number}"):
            Victim(Tuple(), image_shape=IMAGE_SHAPE, num_images=num_images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"loss": "hinge"},
            r"`loss` to be one of \['cross_entropy', 'mean_squared_error'\], but got 'hinge'",
        ),
        ({"reduction": "none"}, r"`reduction` to be one of \['mean', 'sum'\], but got 'none'"),
        ({"num_images": 0}, "`num_images` to be a whole number of at least 1, but got 0"),
        ({"num_images": -2}, "`num_images` to be a whole number of at least 1, but got -2"),
        ({"local_steps": 2}, "a `learning_rate` for 2 local steps, but got None"),
        ({"num_images": 4, "local_batch_size": 3}, "`local_batch_size` to divide `num_images` = 4"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        Victim(LeNet(), image_shape=(1, 28, 28), **arguments)


# -- errors of capture


def shape_of(shape: Sequence[int]) -> str:
    return str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 3, 6, 5), (2, 1, 2, 5, 6), (2, 2, 2, 6, 5), (2, 2, 6, 5), (0, 1, 2, 6, 5)],
    ids=["channels", "size", "number of images", "no victims' dimension", "no victims"],
)
def test_images_of_another_shape(shape):
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    message = rf"`images` of shape \(V, 1, 2, 6, 5\), but got {shape_of(shape)}"
    with pytest.raises(ValueError, match=message):
        victim.share(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[:2], dtype=torch.long))


@pytest.mark.parametrize(
    ("value", "got"),
    [(1.5, "0.0 to 1.5"), (-0.1, "-0.1 to 0.0"), (255.0, "0.0 to 255.0"), (math.nan, "nan to nan")],
)
def test_images_of_another_range(value, got):
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    images = torch.zeros(2, 1, *IMAGE_SHAPE, dtype=torch.float64)
    images[1, 0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"`images` as floating-point numbers in \[0, 1\], but got .* from {got}"):
        victim.share(images, torch.zeros(2, 1, dtype=torch.long))


def test_images_of_another_type():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    labels = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`images` as floating-point numbers in \[0, 1\], but got torch.uint8"):
        victim.share(torch.zeros(2, 1, *IMAGE_SHAPE, dtype=torch.uint8), labels)
    with pytest.raises(ValueError, match=r"precision of the weights, torch.float64, but got torch.float32"):
        victim.share(torch.zeros(2, 1, *IMAGE_SHAPE), labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), r"`labels` of shape \(2, 1\), but got \(2,\)"),
        (torch.tensor([[0, 1], [1, 2]]), r"`labels` of shape \(2, 1\), but got \(2, 2\)"),
        (torch.tensor([[0], [4]]), "`labels` as class indices from 0 to 3, but got torch.int64 from 0 to 4"),
        (
            torch.tensor([[-1], [3]]),
            "`labels` as class indices from 0 to 3, but got torch.int64 from -1 to 3",
        ),
        (torch.tensor([[0.0], [1.0]]), "`labels` as class indices from 0 to 3, but got torch.float32"),
    ],
)
def test_wrong_labels(labels, message):
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match=message):
        victim.share(private(2)[0], labels)


def test_non_finite_gradients_name_the_victims():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    states = victim.fresh_states([0, 1, 2])
    states["3.bias"][1, 0] = math.nan
    with pytest.raises(ValueError, match=r"finite numbers in the gradient of '1\.weight'.*\(victims \[8\]\)"):
        victim.share(*private(3), states=states, ids=torch.tensor([7, 8, 9]))


def test_states_that_do_not_fit():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    images, labels = private(2)
    states = victim.fresh_states([0, 1])
    with pytest.raises(ValueError, match=r"a state for every tensor of the model, but got missing \['3\.bias'\]"):
        victim.share(images, labels, states={name: states[name] for name in states if name != "3.bias"})
    with pytest.raises(ValueError, match=r"unknown \['4\.weight'\]"):
        victim.share(images, labels, states=states | {"4.weight": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match=r"state of '.*' to have shape \(2, .*\), but got \(3, "):
        victim.share(images, labels, states=victim.fresh_states([0, 1, 2]))


# -- shared gradients of somebody else


@pytest.fixture
def mlp() -> tuple[Victim, SharedGradient]:
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    return victim, victim.share(*private(3))


def test_check_of_missing_and_unknown_names(mlp):
    victim, shared = mlp
    shared.gradients["classifier.bias"] = shared.gradients.pop("3.bias")
    message = r"a gradient for every tensor of the model, but got missing \['3\.bias'\] and unknown \['classifier"
    with pytest.raises(ValueError, match=message):
        victim.check(shared)


def test_check_of_other_shapes(mlp):
    victim, shared = mlp
    shared.gradients["3.bias"] = shared.gradients["3.bias"][:, :-1]
    with pytest.raises(ValueError, match=r"gradient of '3\.bias' to have shape \(3, 4\), but got \(3, 3\)"):
        victim.check(shared)


def test_check_of_the_state(mlp):
    victim, shared = mlp
    weight = shared.state.pop("1.weight")
    with pytest.raises(ValueError, match=r"a state for every tensor .* missing \['1\.weight'\] and unknown \[\]"):
        victim.check(shared)
    shared.state["1.weight"] = weight.T
    with pytest.raises(ValueError, match=r"state of '1\.weight' to have shape \(7, 60\), but got \(60, 7\)"):
        victim.check(shared)


def test_check_of_another_protocol(mlp):
    victim, _ = mlp
    other = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE, reduction="sum")
    with pytest.raises(ValueError, match=r"of the protocol .*reduction='mean'.* but got .*reduction='sum'"):
        victim.check(other.share(*private(3)))


def test_check_of_non_finite_numbers(mlp):
    victim, shared = mlp
    shared.gradients["3.bias"][2] = math.inf
    with pytest.raises(ValueError, match=r"finite numbers in the gradient of '3\.bias'.*\(victims \[2\]\)"):
        victim.check(shared)


def test_check_of_a_gradient_for_a_frozen_parameter(mlp):
    _, shared = mlp
    model = network("mlp", bias=True)
    model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"missing \[\] and unknown \['1\.weight'\]"):
        Victim(model, image_shape=IMAGE_SHAPE).check(shared)


def test_check_of_weights_of_another_kind(mlp):
    victim, shared = mlp
    shared.state["1.weight"] = shared.state["1.weight"].long()
    with pytest.raises(ValueError, match=r"state of '1\.weight' of a type like torch\.float64, but got torch\.int64"):
        victim.check(shared)
