"""Defenses that see a client's images: DP-SGD and Soteria, against plain loops over images and features."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage import Victim
from leakage.clients.local_steps import draw_orders
from leakage.defenses import DPSGD, Clip, Defense, Soteria, known_defenses
from leakage.defenses.base import known_noise
from leakage.dummies import Pixels, RevealedLabels
from leakage.inversion.evaluator import Evaluator
from leakage.inversion.simulation import stepping
from leakage.objectives import SquaredDistance
from tests.clients.networks import CLASSES, IMAGE_SHAPE, network, one_at_a_time, private

Gradients = dict[str, Tensor]


def client(*defenses: Defense, model: nn.Module | None = None, **options: Any) -> Victim:
    return Victim(model or network("mlp", bias=True), image_shape=IMAGE_SHAPE, defenses=defenses, **options)


def flat(gradients: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in gradients.values()])


# -- DP-SGD


def clipped_one_by_one(
    model: nn.Module, state: Gradients, images: Tensor, labels: Tensor, norm: float, **options: Any
) -> Gradients:
    """The slow reference: one image, one gradient, one norm."""
    loss, reduction = options.get("loss", "cross_entropy"), options.get("reduction", "mean")
    total: Gradients = {}
    for image, label in zip(images, labels, strict=True):
        gradients = one_at_a_time(model, state, image[None], label[None], loss, reduction)
        length = math.sqrt(math.fsum(number * number for number in flat(gradients).tolist()))
        for name, tensor in gradients.items():
            total[name] = total.get(name, 0) + tensor * min(1, norm / length)
    return {name: tensor / len(images) if reduction == "mean" else tensor for name, tensor in total.items()}


@pytest.mark.parametrize("loss", ["cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "batch_norm", "group_norm"])
def test_dp_sgd_clips_the_gradient_of_each_image(kind, reduction, loss):
    model, options = network(kind, bias=True), {"loss": loss, "reduction": reduction}
    images, labels = private(2, 4)
    # A norm that some of the images are longer than.
    states = client(model=model).fresh_states([1, 2])
    own = [{name: tensor[row] for name, tensor in states.items()} for row in range(2)]
    lengths = [
        float(flat(one_at_a_time(model, own[row], image[None], label[None], loss, "sum")).norm())
        for row in range(2)
        for image, label in zip(images[row], labels[row], strict=True)
    ]
    norm = sorted(lengths)[4]
    victim = client(DPSGD(0.0, norm), model=model, num_images=4, **options)
    shared = victim.share(images, labels, states=states)
    for row in range(2):
        expected = clipped_one_by_one(model, own[row], images[row], labels[row], norm, **options)
        for name, tensor in expected.items():
            torch.testing.assert_close(shared.gradients[name][row], tensor)


def test_dp_sgd_clips_what_is_shared_and_no_other_weights():
    model = network("mlp", bias=True)
    model[1].requires_grad_(False)
    images, labels = private(1, 3)
    shared = client(DPSGD(0.0, 0.1), model=model, num_images=3).share(images, labels)
    expected = clipped_one_by_one(model, model.state_dict(), images[0], labels[0], 0.1)
    assert {*shared.gradients} == {"3.weight", "3.bias"} == {*expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(shared.gradients[name][0], tensor)


@pytest.mark.parametrize("kind", ["mlp", "batch_norm"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dp_sgd_that_shortens_nothing_and_adds_nothing_is_the_plain_gradient(kind, reduction):
    model, options = network(kind, bias=True), {"num_images": 3, "reduction": reduction}
    shared, plain = (
        client(*defenses, model=model, **options).share(*private(2, 3)) for defenses in ([DPSGD(0.0, 1e9)], [])
    )
    for name, tensor in plain.gradients.items():
        torch.testing.assert_close(shared.gradients[name], tensor)


def test_dp_sgd_with_batch_norm_of_a_single_image():
    model = network("batch_norm", bias=True).train()
    shared, plain = (client(*defenses, model=model).share(*private(2)) for defenses in ([DPSGD(0.0, 1e9)], []))
    for name, tensor in plain.gradients.items():
        torch.testing.assert_close(shared.gradients[name], tensor)


@pytest.mark.parametrize(("reduction", "size"), [("mean", 0.5 * 0.2 / 4), ("sum", 0.5 * 0.2)])
def test_dp_sgd_adds_normal_noise_of_its_size(reduction, size):
    options = {"model": network("mlp", bias=True), "num_images": 4, "reduction": reduction}
    noisy, plain = (client(DPSGD(sigma, 0.2), **options).share(*private(40, 4)) for sigma in (0.5, 0.0))
    noise = torch.cat([(noisy.gradients[name] - plain.gradients[name]).flatten(1) for name in plain.gradients], 1)
    assert noise.shape == (40, 459)
    assert float(noise.std()) == pytest.approx(size, rel=0.02)
    assert abs(float(noise.mean())) < 0.02 * size
    assert float((noise / noise.std()).pow(4).mean()) == pytest.approx(3, rel=0.05)
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 0.25


@pytest.mark.parametrize("norm", [0.1, 1e9])
def test_dp_sgd_of_gradients_alone_is_that_of_one_image(norm):
    gradients = {name: tensor[0] for name, tensor in client().share(*private(1)).gradients.items()}
    found = DPSGD(0.3, norm)(gradients, torch.Generator().manual_seed(0))
    quiet = DPSGD(0.0, norm)(gradients, torch.Generator())
    torch.testing.assert_close(flat(quiet), flat(Clip(norm)(gradients, torch.Generator())))
    assert float((flat(found) - flat(quiet)).std()) == pytest.approx(0.3 * norm, rel=0.15)


@pytest.mark.parametrize(
    ("defenses", "options", "message"),
    [
        (
            [DPSGD(1.0, 1.0)],
            {"model": network("batch_norm", bias=True).train(), "num_images": 2},
            "a network that treats each image independently for DPSGD, but got BatchNorm",
        ),
        (
            [DPSGD(1.0, 1.0)],
            {"model": nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), network("mlp", bias=True)).double()}
            | {"num_images": 2},
            "a network that treats each image independently for DPSGD, but got BatchNorm",
        ),
        (
            [DPSGD(1.0, 1.0)],
            {"learning_rate": 0.1, "reveal_learning_rate": False},
            "share a gradient for DPSGD, .* reveal_learning_rate=False",
        ),
        (
            [Clip(1.0), DPSGD(1.0, 2.0)],
            {},
            r"DPSGD once, as the first of `defenses`, .* got \[Clip\(norm=1.0\), DPSGD\(",
        ),
        ([DPSGD(1.0, 1.0), DPSGD(1.0, 1.0)], {}, "DPSGD once, as the first of `defenses`"),
        ([DPSGD(1.0, 1.0)] * 2, {}, "DPSGD once, as the first of `defenses`"),
    ],
    ids=["batch norm", "batch norm without statistics", "rate", "second", "two", "one twice"],
)
def test_clients_that_dp_sgd_is_not_for(defenses, options, message):
    with pytest.raises(ValueError, match=rf"^Expected (clients of |clients that )?{message}"):
        client(*defenses, **options)


STEPS = {"num_images": 4, "local_steps": 4, "local_batch_size": 2, "learning_rate": 0.3}


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.1}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("shuffle", [False, True])
def test_dp_sgd_in_local_steps_is_what_the_optimizer_does(options, shuffle):
    model, (images, labels) = network("mlp", bias=True), private(1, 4)
    victim = client(DPSGD(0.0, 0.7), model=model, shuffle=shuffle, **STEPS, **options)
    shared = victim.share(images, labels, seed=3)
    orders = draw_orders(victim.protocol, [0], 3)
    order = orders[0].tolist() if orders is not None else [0, 1, 2, 3] * 2
    by = copy.deepcopy(model)
    rest = {name: options.get(name, 0) for name in ("momentum", "weight_decay")}
    optimizer = torch.optim.SGD(by.parameters(), 0.3, **rest)
    for start in range(0, 8, 2):
        batch = order[start : start + 2]
        state = {name: tensor.detach().clone() for name, tensor in by.state_dict().items()}
        found = clipped_one_by_one(
            model, state, images[0][batch], labels[0][batch], 0.7, reduction=options.get("reduction", "mean")
        )
        for name, parameter in by.named_parameters():
            parameter.grad = found[name]
        optimizer.step()
    for name, parameter in by.named_parameters():
        moved = (model.get_parameter(name) - parameter).detach() / (0.3 * 4)
        torch.testing.assert_close(shared.gradients[name][0], moved)
    if not shuffle:
        attacker = stepping(victim.without_secrets(), victim.defenses)
        simulated = attacker.gradients(shared.state, images[0], F.one_hot(labels[0], CLASSES).double())
        torch.testing.assert_close(flat(simulated), flat({name: part[0] for name, part in shared.gradients.items()}))
        plain = victim.without_secrets().gradients(shared.state, images[0], F.one_hot(labels[0], CLASSES).double())
        assert float((flat(plain) - flat(simulated)).norm()) > 0.1 * float(flat(simulated).norm())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8}, {"reduction": "sum"}], ids=str)
def test_dp_sgd_adds_new_noise_in_each_step_and_the_attacker_knows_how_much(options):
    given = {"model": network("mlp", bias=True), **STEPS, "learning_rate": 1e-9, **options}
    noisy, plain = (client(DPSGD(sigma, 0.2), **given).share(*private(8, 4)) for sigma in (0.5, 0.0))
    noise = torch.cat([(noisy.gradients[name] - plain.gradients[name]).flatten(1) for name in plain.gradients], 1)
    known = known_noise(known_defenses(noisy.protocol.defenses), noisy)
    assert float(noise.square().mean()) == pytest.approx(float(known[0]), rel=0.1)
    if not options:
        assert float(noise.std()) == pytest.approx(0.5 * 0.2 / 2 / 4**0.5, rel=0.05)


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_attack_knows_of_clipping_in_each_step(shuffle):
    images, labels = private(1, 4)
    victim = client(DPSGD(0.0, 0.7), model=network("mlp", bias=True), shuffle=shuffle, **STEPS)
    shared = victim.share(images, labels, reveal_labels=True)
    unknowns = {"images": images}
    if shuffle:  # logits of the true order
        (order,) = draw_orders(victim.protocol, [0], 0)
        unknowns["order"] = 60 * F.one_hot(order.view(1, 2, 2, 2), 4).sum(3).double()
    values = []
    for known in (victim.defenses, ()):
        evaluator = Evaluator(victim.without_secrets(), SquaredDistance(), Pixels(), RevealedLabels(), defenses=known)
        values.append(float(evaluator(shared, evaluator.begin(shared), unknowns)[0]))
    assert values[0] < 1e-9
    assert values[1] > 1e-3


# -- epsilon


def test_epsilon_grows_with_less_noise_more_steps_and_more_images():
    def epsilon(sigma: float = 1.0, steps: int = 100, rate: float = 0.01, delta: float = 1e-5) -> float:
        return DPSGD(sigma, 1.0).epsilon(steps, rate, delta, "rdp")

    assert epsilon(4.0) < epsilon(2.0) < epsilon() < epsilon(0.5)
    assert epsilon(steps=1) < epsilon() < epsilon(steps=1000)
    assert epsilon(rate=0.001) < epsilon() < epsilon(rate=0.1)
    assert epsilon(delta=1e-3) < epsilon() < epsilon(delta=1e-8)


def test_epsilon_of_one_step_on_all_images_is_that_of_the_gaussian_mechanism():
    """By the formula of Balle and Wang for delta, exactly; Opacus' accountant is not far above it."""

    def delta(epsilon: float, sigma: float) -> float:
        def below(x: float) -> float:
            return math.erfc(-x / math.sqrt(2)) / 2

        half = 1 / (2 * sigma)
        return below(half - epsilon * sigma) - math.exp(epsilon) * below(-half - epsilon * sigma)

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle, 2.0) > 1e-5 else (low, middle)
    # Neighbours have one image more or less, whose gradient has norm C.
    found = {name: DPSGD(2.0, 3.0).epsilon(1, 1.0, 1e-5, name) for name in ("prv", "rdp")}
    assert found == {name: pytest.approx(low, rel=1e-9) for name in ("prv", "rdp")}
    assert DPSGD(2.0, 3.0).epsilon(1, 1 - 1e-9, 1e-5) == pytest.approx(low, rel=0.02)


def test_epsilon_with_hardly_any_noise_and_with_much():
    assert DPSGD(1e-3, 1.0).epsilon(1, 1.0, 1e-5) == pytest.approx(500_000, rel=0.02)
    assert DPSGD(1e6, 1.0).epsilon(1, 1.0, 1e-5) == 0
    assert DPSGD(2.0, 1.0).epsilon(4, 1.0, 1e-5) == pytest.approx(DPSGD(1.0, 1.0).epsilon(1, 1.0, 1e-5), rel=1e-9)


def test_epsilon_by_divergences_is_above_that_of_the_distribution():
    found = {name: DPSGD(1.0, 1.0).epsilon(200, 0.01, 1e-5, name) for name in ("prv", "rdp")}
    assert 0 < found["prv"] < found["rdp"] < 2 * found["prv"]
    assert DPSGD(1.0, 7.0).epsilon(200, 0.01, 1e-5) == found["prv"]


@pytest.mark.parametrize(
    ("sigma", "arguments", "message"),
    [
        (0.0, (10, 0.1, 1e-5), "`noise_multiplier` to be positive and finite, but got 0.0"),
        (1.0, (0, 0.1, 1e-5), "`steps` to be a whole number of at least 1, but got 0"),
        (1.0, (10.0, 0.1, 1e-5), "`steps` to be a whole number of at least 1, but got 10.0"),
        (1.0, (10, 0.0, 1e-5), "`sample_rate` to be positive and finite, but got 0.0"),
        (1.0, (10, 1.1, 1e-5), "`sample_rate` to be above 0 and at most 1, but got 1.1"),
        (1.0, (10, 0.1, 0.0), "`delta` to be above 0 and below 1, but got 0.0"),
        (1.0, (10, 0.1, 1.0), "`delta` to be above 0 and below 1, but got 1.0"),
        (1.0, (10, 0.1, 1e-5, "gdp"), r"`accountant` to be one of \['prv', 'rdp'\], but got 'gdp'"),
    ],
)
def test_wrong_arguments_of_epsilon(sigma, arguments, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        DPSGD(sigma, 1.0).epsilon(*arguments)


def test_epsilon_without_opacus(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ImportError, match=r"^Expected Opacus, .* `pip install leakage\[dp\]`\."):
        DPSGD(1.0, 1.0).epsilon(10, 0.1, 1e-5)


# -- Soteria


def scores(model: nn.Module, layer: str, images: Tensor) -> list[float]:
    """The slow reference: one image, one feature, one derivative."""
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0]))
    totals: list[float] = []
    for image in images:
        image = image.clone().requires_grad_()
        found.clear()
        model(image[None])
        for place, feature in enumerate(found[0]):
            (slope,) = torch.autograd.grad(feature, image, retain_graph=True)
            ratio = abs(feature.item()) / math.sqrt(math.fsum(number**2 for number in slope.flatten().tolist()))
            if place == len(totals):
                totals.append(0.0)
            totals[place] += ratio
    handle.remove()
    return totals


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("kind", "layer", "features"), [("mlp", "3", 7), ("group_norm", "5", 8), ("mlp", "1", 60)])
def test_soteria_leaves_out_the_features_that_tell_most(kind, layer, features, share, num_images):
    model = network(kind, bias=True)
    images, labels = private(2, num_images)
    defended, plain = (
        client(*defenses, model=model, num_images=num_images).share(images, labels)
        for defenses in ([Soteria(share, layer=layer)], [])
    )
    for row in range(2):
        told = scores(model, layer, images[row])
        assert len(told) == features
        pruned = sorted(range(features), key=lambda place: -told[place])[: round(share * features)]
        for name, tensor in plain.gradients.items():
            expected = tensor[row].clone()
            if name == f"{layer}.weight":
                expected[:, pruned] = 0
            assert torch.equal(defended.gradients[name][row], expected), name


def test_soteria_looks_at_the_weights_of_each_client():
    model = network("mlp", bias=True)
    victim = client(Soteria(0.5, layer="3"), model=model)
    states = victim.fresh_states([1, 2, 3])
    images, labels = private(1)
    shared = victim.share(images.expand(3, -1, -1, -1, -1), labels.expand(3, -1), states=states)
    masks = []
    for row in range(3):
        model.load_state_dict({name: tensor[row] for name, tensor in states.items()})
        told = scores(model, "3", images[0])
        masks.append(sorted(sorted(range(7), key=lambda place: -told[place])[:4]))
        found = [place for place in range(7) if not shared.gradients["3.weight"][row][:, place].any()]
        assert found == masks[-1]
    assert masks[0] != masks[1]


@pytest.mark.parametrize(
    ("defense", "options", "message"),
    [
        (Soteria(layer="3"), {"local_steps": 2, "learning_rate": 0.1}, r"clients of one step .* got local_steps=2\."),
        (Soteria(), {}, r"`layer` of Soteria to be .* one of \['1', '3'\], but got 'classifier'\."),
        (Soteria(layer="0"), {"model": network("conv", bias=True)}, r"one of \['3'\], but got '0'\."),
    ],
)
def test_clients_that_soteria_is_not_for(defense, options, message):
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        client(defense, **options)


def test_soteria_needs_a_layer_that_shares_its_gradient():
    model = network("mlp", bias=True)
    model[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"a linear layer that shares its gradient, .* but got '3'"):
        client(Soteria(layer="3"), model=model)


def test_soteria_needs_a_layer_with_one_vector_for_each_image():
    """Not a linear layer of tokens, as those inside of a transformer."""
    model = nn.Sequential(nn.Flatten(2), nn.Linear(30, 8), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES)).double()
    with pytest.raises(ValueError, match=r"Soteria"):
        client(Soteria(0.5, layer="1"), model=model).share(*private(1))


def test_soteria_needs_images():
    with pytest.raises(ValueError, match=r"^Expected Soteria to see a client's images, .* but got gradients alone"):
        Soteria()({"classifier.weight": torch.ones(2, 2)}, torch.Generator())
