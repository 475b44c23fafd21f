"""Features of all images of a batch from the gradient of the last layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form import feature_search
from leakage.closed_form import features as module
from leakage.closed_form.feature_search import _Linearised
from leakage.closed_form.features import SeparatedFeatures, feature_equations, separate_features
from tests.labels.by_hand import images_and_labels, linear, network

CLASSES, VICTIMS = 6, 3


def setting(
    count: int, *, own: bool = False, relu: bool = False, bias: bool = True, victims: int = VICTIMS, **options: Any
) -> tuple[Victim, SharedGradient, Tensor, Tensor]:
    """A victim in float64, what is shared, images and labels."""
    model = network(1, classes=CLASSES, bias=bias, activation=nn.ReLU() if relu else None, scale=2).double()
    victim = Victim(model, image_shape=(3, 2, 2), num_images=count, **options)
    images, labels = images_and_labels(2, victims, count, CLASSES)
    states = victim.fresh_states([*range(victims)]) if own else None
    return victim, victim.share(images.double(), labels, states=states), images.double(), labels


def truth(victim: Victim, shared: SharedGradient, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features and gradients by the logits, image by image."""
    features, deltas = [], []
    for index in range(len(images)):
        state = {name: tensor[index] if shared.own_weights else tensor for name, tensor in shared.state.items()}
        inner = victim.model[:-1]  # type: ignore[index]
        features.append(functional_call(inner, {k: v for k, v in state.items() if k[0] != "3"}, images[index]))
        logits = functional_call(victim.model, state, images[index])
        expected = torch.eye(CLASSES, dtype=logits.dtype)[labels[index]]
        cross_entropy = victim.protocol.loss == "cross_entropy"
        deltas.append(logits.softmax(1) - expected if cross_entropy else 2 / CLASSES * (logits - expected))
    return torch.stack(features), torch.stack(deltas)


def assert_same_up_to_order(separated: SeparatedFeatures, features: Tensor, deltas: Tensor, labels: Tensor) -> None:
    """Each image's row, among those of its label."""
    for victim in range(len(features)):
        left = [*range(len(labels[victim]))]
        for image, label in enumerate(labels[victim].tolist()):
            near = (separated.features[victim, image] - features[victim]).norm(dim=1)
            match = min((other for other in left if labels[victim, other] == label), key=near.__getitem__)
            left.remove(match)
            torch.testing.assert_close(separated.features[victim, image], features[victim, match], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                separated.logit_gradients[victim, image], deltas[victim, match], rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("loss", ["cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("own", "relu", "bias", "reduction"),
    [
        (False, False, True, "mean"),
        (True, True, True, "sum"),
        (True, False, False, "mean"),
        (False, True, False, "sum"),
    ],
)
def test_exact(loss: str, count: int, own: bool, relu: bool, bias: bool, reduction: str) -> None:
    victim, shared, images, labels = setting(count, own=own, relu=relu, bias=bias, loss=loss, reduction=reduction)
    separated = separate_features(shared, victim, labels)
    assert separated.features.shape == (VICTIMS, count, 16)
    assert separated.logit_gradients.shape == (VICTIMS, count, CLASSES)
    assert separated.residual.shape == (VICTIMS,)
    assert (separated.residual < 1e-9).all()
    assert_same_up_to_order(separated, *truth(victim, shared, images, labels), labels)


@pytest.mark.parametrize(("loss", "count"), [("cross_entropy", 5), ("mean_squared_error", 5)])
def test_as_many_images_as_there_can_nearly_be(loss: str, count: int) -> None:
    victim, shared, images, _ = setting(count, loss=loss, own=True, victims=2)
    labels = torch.stack([torch.arange(count), torch.arange(count).flip(0)])
    shared = victim.share(images, labels, states=shared.state)
    separated = separate_features(shared, victim, labels)
    assert (separated.residual < 1e-9).all()
    assert_same_up_to_order(separated, *truth(victim, shared, images, labels), labels)


def test_mean_squared_error_lets_images_of_repeated_labels_turn() -> None:
    victim, shared, images, _ = setting(3, loss="mean_squared_error", victims=2)
    shared.ids = torch.tensor([4, 9])
    with pytest.raises(ValueError, match=r"at most one pair of equal labels, .* but got more \(victims \[9\]\)"):
        separate_features(shared, victim, torch.tensor([[1, 2, 1], [3, 3, 3]]))
    # The reason: turn the features of equal labels about their mean.
    equations, _, _ = feature_equations(victim.share(images, torch.full((2, 3), 3)), victim, torch.full((2, 3), 3))
    unknowns = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sine, cosine = torch.tensor(0.7).double().sin(), torch.tensor(0.7).double().cos()
    axis = torch.ones(3, 1, dtype=torch.float64) / 3**0.5
    cross = torch.linalg.cross(torch.eye(3, dtype=torch.float64), axis.T.expand(3, 3))
    turn = cosine * torch.eye(3, dtype=torch.float64) + sine * cross + (1 - cosine) * axis @ axis.T
    turned = turn @ unknowns
    assert (turned - unknowns).abs().max() > 0.1
    torch.testing.assert_close(equations.errors(turned), equations.errors(unknowns))


def test_images_of_one_label() -> None:
    victim, shared, images, _ = setting(3)
    labels = torch.full((VICTIMS, 3), 4)
    shared = victim.share(images, labels)
    separated = separate_features(shared, victim, labels)
    assert_same_up_to_order(separated, *truth(victim, shared, images, labels), labels)


def test_float32() -> None:
    victim, shared, images, labels = setting(2, own=True)
    features, _ = truth(victim, shared, images, labels)
    separated = separate_features(shared.to(torch.float32), victim, labels)
    assert separated.features.dtype == separated.residual.dtype == torch.float64
    assert (separated.residual > 1e-9).all()
    assert (separated.residual < 1e-5).all()
    distance = torch.cdist(separated.features, features).amin(2) / features.norm(dim=2)
    assert (distance < 1e-3).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_labels_that_are_wrong_leave_a_residual(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", (4,))  # more would not help
    victim, shared, _, labels = setting(count)
    wrong = labels.clone()
    wrong[:, 0] = (wrong[:, 0] + 1) % CLASSES
    right = separate_features(shared, victim, labels)
    separated = separate_features(shared, victim, wrong)
    assert (separated.residual > 1e-3).all()
    assert (separated.residual > 1e4 * right.residual).all()
    if count == 1:  # labels are not needed for the rest
        assert torch.equal(separated.features, right.features)
        assert torch.equal(separated.logit_gradients, right.logit_gradients)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_victim_does_not_depend_on_the_others(own: bool, bias: bool) -> None:
    victim, shared, images, labels = setting(2, own=own, bias=bias)
    labels[0] = 3  # equal labels too
    shared = victim.share(images, labels, states=shared.state if own else None)
    together = separate_features(shared, victim, labels)
    for group in ([0], [1], [2, 0]):
        some = torch.tensor(group)
        alone = separate_features(shared.select(some), victim, labels[some])
        torch.testing.assert_close(alone.features, together.features[some], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(alone.logit_gradients, together.logit_gradients[some], rtol=1e-6, atol=1e-7)


def test_the_seed_only_chooses_starts_and_leaves_the_global_state() -> None:
    victim, shared, _, labels = setting(3)
    state = torch.random.get_rng_state()
    first, again, other = (separate_features(shared, victim, labels, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.features, again.features)
    assert not torch.equal(first.features, other.features)
    torch.testing.assert_close(first.features, other.features, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", ["cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_jacobian(loss: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, shared, _, labels = setting(3, loss=loss, bias=bias)
    equations, _, _ = feature_equations(shared, victim, labels)
    generator = torch.Generator().manual_seed(0)
    unknowns, step = torch.randn(2, VICTIMS, 3, 3, dtype=torch.float64, generator=generator)
    damping = torch.tensor([0.0, 1e-3, 0.1], dtype=torch.float64)
    direct = _Linearised(equations, unknowns, damping)
    monkeypatch.setattr(feature_search, "MOST_DIRECT", 0)
    products = _Linearised(equations, unknowns, damping)
    given = torch.randn(direct.residuals.shape, dtype=torch.float64, generator=generator)
    (moved, _), pulled = products.product(step.flatten(1)), products.transposed([given, 0 * step.flatten(1)])
    torch.testing.assert_close(direct.residuals, equations.errors(unknowns))
    for index in range(VICTIMS):
        one = equations[torch.tensor([index])]
        jacobian = torch.autograd.functional.jacobian(lambda at, one=one: one.errors(at), unknowns[index : index + 1])
        jacobian = jacobian.reshape(-1, 9)
        torch.testing.assert_close(direct.normal()[index], jacobian.T @ jacobian)
        torch.testing.assert_close(moved[index].flatten(), jacobian @ step[index].flatten())
        torch.testing.assert_close(pulled[index], jacobian.T @ given[index].flatten())
        expected = torch.linalg.lstsq(jacobian, given[index].flatten()).solution.view(3, 3)
        if index == 0:  # without damping
            torch.testing.assert_close(products.solve(given, 1e-12)[0], expected)
            torch.testing.assert_close(direct.solve(given, 1e-12)[0], expected)


def test_many_images_by_conjugate_gradients() -> None:
    count = feature_search.MOST_DIRECT + 2
    victim = Victim(linear(40, 48, scale=0.3).double(), image_shape=(3, 4, 4), num_images=count)
    images = torch.rand(1, count, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(count)[None].clamp(min=1)  # the first two are of one class
    separated = separate_features(victim.share(images, labels), victim, labels)
    features = images.flatten(2)
    error = torch.cdist(separated.features, features).amin(2) / features.norm(dim=2)
    assert (separated.residual < 1e-9).all()
    assert (error < 1e-6).all()


def test_a_gradient_of_zeros() -> None:
    victim, shared, _, labels = setting(2)
    shared.gradients = {name: torch.zeros_like(tensor) for name, tensor in shared.gradients.items()}
    separated = separate_features(shared, victim, labels)
    assert separated.features.isfinite().all()


def test_more_images_than_the_gradient_tells_apart() -> None:
    for loss, bias, most in (
        ("cross_entropy", True, 5),
        ("cross_entropy", False, 4),
        ("mean_squared_error", True, 6),
        ("mean_squared_error", False, 5),
    ):
        victim, shared, _, labels = setting(most + 1, loss=loss, bias=bias)
        with pytest.raises(
            ValueError, match=f"Expected at most {most} images, .* but got {most + 1}. Without features, use"
        ):
            separate_features(shared, victim, labels)


def test_fewer_features_than_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Sigmoid(), nn.Linear(2, CLASSES))
    victim = Victim(model, image_shape=(3, 2, 2), num_images=3)
    images, labels = images_and_labels(0, 1, 3, CLASSES)
    with pytest.raises(ValueError, match=r"Expected at most 2 images, .*2 features.* but got 3"):
        separate_features(victim.share(images, labels), victim, labels)


def test_local_steps() -> None:
    victim, shared, _, labels = setting(2, local_steps=2, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"Expected victims of one local step, .* `local_steps` 2"):
        separate_features(shared, victim, labels)


def test_logits_that_no_linear_layer_gives() -> None:
    victim = Victim(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh()), image_shape=(3, 2, 2))
    images, labels = images_and_labels(0, 1, 1, 4)
    with pytest.raises(
        ValueError,
        match=r"Expected logits that are the output of an nn.Linear layer, .* operations after it. Without features",
    ):
        separate_features(victim.share(images, labels), victim, labels)


def test_frozen_last_layer() -> None:
    model = network(1, classes=CLASSES)
    model[3].weight.requires_grad_(False)
    victim = Victim(model, image_shape=(3, 2, 2))
    images, labels = images_and_labels(0, 1, 1, CLASSES)
    with pytest.raises(ValueError, match=r"Expected the weights of the last layer '3' to share .* frozen"):
        separate_features(victim.share(images, labels), victim, labels)


def test_frozen_bias_is_as_good_as_none() -> None:
    model = network(1, classes=CLASSES, scale=2).double()
    model[3].bias.requires_grad_(False)
    victim = Victim(model, image_shape=(3, 2, 2), num_images=2)
    images, labels = images_and_labels(2, VICTIMS, 2, CLASSES)
    shared = victim.share(images.double(), labels)
    separated = separate_features(shared, victim, labels)
    assert_same_up_to_order(separated, *truth(victim, shared, images.double(), labels), labels)


def test_bad_labels() -> None:
    victim, shared, _, labels = setting(2)
    with pytest.raises(ValueError, match=r"Expected `labels` of shape \(3, 2\), but got \(3,\)"):
        separate_features(shared, victim, labels[:, 0])
    with pytest.raises(ValueError, match=r"Expected `labels` as class indices from 0 to 5, but got .* to 6"):
        separate_features(shared, victim, labels.clamp(min=6))
    with pytest.raises(ValueError, match=r"Expected `labels` as class indices from 0 to 5, but got torch\.float32"):
        separate_features(shared, victim, labels.float())


def test_bad_seed_and_gradients_of_another_victim() -> None:
    victim, shared, _, labels = setting(2)
    with pytest.raises(ValueError, match="Expected `seed` to be a whole number of at least 0, but got -1"):
        separate_features(shared, victim, labels, seed=-1)
    other, _, _, _ = setting(3)
    with pytest.raises(ValueError, match="Expected a shared gradient of the victim's protocol, with "):
        separate_features(shared, other, labels)
