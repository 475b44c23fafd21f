"""What goes into the last layer, as the network itself computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakage.clients.victim import Victim
from leakage.labels import Auxiliary, auxiliary
from leakage.labels import last_layer as module
from leakage.labels.auxiliary import known_features, natural_noise
from leakage.labels.last_layer import LastLayer, has_non_negative_features, last_layer
from tests.labels.by_hand import images_and_labels, linear, network, victim_of


def batch_norm(*, train: bool) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 2),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5, 4),
    )
    with torch.no_grad():
        model[1](torch.rand(50, 5, 2, 2))  # running statistics other than 0 and 1
    return model.train(train)


def real_features(victim: Victim, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """By a hook on the last layer."""
    seen: list[Tensor] = []
    layer = victim.model.get_submodule(str(victim.classifier))
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    try:
        functional_call(victim.model, state, images)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("model", [network(0, classes=4), batch_norm(train=False)])
def test_features_of_each_network(model: nn.Module, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NETWORKS_AT_ONCE", 2)
    monkeypatch.setattr(module, "_IMAGES_AT_ONCE", 4)
    victim = victim_of(model, 2)
    images, labels = images_and_labels(0, 5, 2, 4)
    states = victim.fresh_states([*range(5)]) if own else None
    shared = victim.share(images, labels, states=states)
    looked_at = images.flatten(0, 1)[:7]
    layer = last_layer(shared, victim)
    known = known_features(layer, Auxiliary(looked_at), 0)
    assert len(known.features) == (5 if own else 1)
    for number, (features, predictions) in enumerate(zip(known.features, known.predictions, strict=True)):
        state = {name: tensor[number] if own else tensor for name, tensor in shared.state.items()}
        torch.testing.assert_close(features, real_features(victim, state, looked_at))
        logits = functional_call(victim.model, state, looked_at)
        torch.testing.assert_close(predictions, logits.softmax(1))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("count", "size"), [(6, None), (6, 3)])
def test_batch_norm_in_training_mode_normalises_as_many_images_as_the_client(
    count: int, size: int | None, own: bool
) -> None:
    steps = {"local_steps": 2, "learning_rate": 0.1, "local_batch_size": size} if size else {}
    victim = victim_of(batch_norm(train=True), count, **steps)
    images, labels = images_and_labels(0, 3, count, 4)
    states = victim.fresh_states([0, 1, 2]) if own else None
    shared = victim.share(images, labels, states=states)
    layer = last_layer(shared, victim)
    looked_at, _ = images_and_labels(1, 1, 14, 4)
    together = size or count
    found = layer.features(looked_at[0])
    assert found.shape == (3 if own else 1, 14, 5)
    # In an order of their own, as images may come class by class.
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([order, order])
    for number, features in enumerate(found):
        state = {name: tensor[number] if own else tensor for name, tensor in shared.state.items()}
        for first in range(0, 14, together):
            expected = real_features(victim, state, looked_at[0, padded[first : first + together]])
            torch.testing.assert_close(features[order[first : first + together]], expected[: 14 - first])
    torch.testing.assert_close(
        layer.features(looked_at[0, :2])[0], real_features(victim, state_of(shared, own), looked_at[0, :2])
    )


def state_of(shared: object, own: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = shared.state  # type: ignore[attr-defined]
    return {name: tensor[0] if own else tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("activation", "expected"),
    [(nn.Sigmoid(), True), (nn.ReLU(), True), (nn.Softplus(), True), (nn.Tanh(), False), (nn.SiLU(), False)],
)
def test_whether_features_can_be_negative(activation: nn.Module, expected: bool) -> None:
    assert has_non_negative_features(victim_of(network(0, classes=3, activation=activation), 2)) == expected


def test_the_layer_holds_gradients_as_means_over_images() -> None:
    images, labels = images_and_labels(0, 4, 6, 3)
    layers = []
    for reduction in ("mean", "sum"):
        victim = victim_of(linear(3, 12), 6, reduction=reduction)
        layers.append(last_layer(victim.share(images, labels), victim))
    for name in ("weight_gradient", "bias_gradient", "weight", "bias"):
        torch.testing.assert_close(getattr(layers[0], name), getattr(layers[1], name))
    assert layers[0].num_classes == 3
    assert len(layers[0]) == 4


def layer_of(victim: Victim, *, own: bool = False) -> LastLayer:
    images, labels = images_and_labels(0, 4, victim.protocol.num_images, victim.protocol.num_classes)
    return last_layer(victim.share(images, labels, states=victim.fresh_states([*range(4)]) if own else None), victim)


def test_some_images_of_many() -> None:
    images, labels = images_and_labels(1, 1, 8, 3)
    known = known_features(layer_of(victim_of(linear(3, 12), 2)), Auxiliary(images[0], labels[0].int()), 0)
    some = known.select(torch.tensor([5, 1])).with_labels(0)
    assert len(known) == 8
    assert len(some) == 2
    assert torch.equal(some.features[0], images[0, [5, 1]].flatten(1))
    assert torch.equal(some.labels, labels[0, [5, 1]])
    assert torch.equal(some.one_hot.argmax(1), some.labels)


def test_images_without_labels_are_drawn_for_every_class_by_their_predictions() -> None:
    images, _ = images_and_labels(1, 1, 50, 3)
    victim = victim_of(linear(3, 12, scale=2.0), 2)
    known = known_features(layer_of(victim), Auxiliary(images[0]), 0)
    drawn = known.with_labels(0)
    each = max(auxiliary._DRAWN_FOR_EACH, 50 // 3)
    assert drawn.labels.bincount().tolist() == [each] * 3
    theirs = {tuple(row) for row in images[0].flatten(1).tolist()}
    assert {tuple(row) for row in drawn.features[0].tolist()} <= theirs
    for label in range(3):
        predicted = drawn.predictions[0, drawn.labels == label, label].mean()
        assert predicted > known.predictions[0, :, label].mean(), "those that look most like it"
    assert torch.equal(drawn.features, known.with_labels(0).features)
    assert not torch.equal(drawn.features, known.with_labels(1).features)


@pytest.mark.parametrize("labelled", [False, True])
def test_parts_are_disjoint_and_hold_every_class(labelled: bool) -> None:
    images, _ = images_and_labels(1, 1, 24, 3)
    labels = torch.arange(24) % 3
    known = known_features(layer_of(victim_of(linear(3, 12), 2)), Auxiliary(images[0], labels if labelled else None), 0)
    first, second = known.split(1 / 4, 0)
    assert (len(first), len(second)) == (6, 18)
    rows = [{tuple(row) for row in part.features[0].tolist()} for part in (first, second)]
    assert rows[0] | rows[1] == {tuple(row) for row in images[0].flatten(1).tolist()}
    if labelled:
        assert first.with_labels(0).labels.bincount().tolist() == [2, 2, 2]
        assert second.with_labels(0).labels.bincount().tolist() == [6, 6, 6]
    assert torch.equal(first.features, known.split(1 / 4, 0)[0].features)
    assert not torch.equal(first.features, known.split(1 / 4, 1)[0].features)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 28, 28), (3, 7, 5), (2, 1, 9)])
def test_noise_like_natural_images(shape: tuple[int, ...]) -> None:
    noise = natural_noise(16, shape, seed=0)
    assert noise.shape == (16, *shape)
    assert ((noise >= 0) & (noise <= 1)).all()
    assert torch.equal(noise, natural_noise(16, shape, seed=0))
    assert not torch.equal(noise, natural_noise(16, shape, seed=1))


def test_neighbouring_pixels_of_the_noise_are_alike() -> None:
    noise = natural_noise(32, (3, 32, 32), seed=0)
    near = (noise[..., 1:] - noise[..., :-1]).square().mean()
    far = (noise[..., 16:] - noise[..., :16]).square().mean()
    assert near < far / 2


@pytest.mark.parametrize("own", [False, True])
def test_noise_in_place_of_auxiliary_images(own: bool) -> None:
    layer = layer_of(victim_of(network(0, classes=3), 2), own=own)
    known = known_features(layer, None, 0)
    assert known.labels is None
    assert len(known.features) == (4 if own else 1)
    assert torch.equal(known.features, known_features(layer, None, 0).features)
    assert not torch.equal(known.features, known_features(layer, None, 1).features)


def test_as_much_noise_for_one_network_of_its_own_as_for_many() -> None:
    victim = victim_of(network(0, classes=3), 2)
    images, labels = images_and_labels(0, 4, 2, 3)
    shared = victim.share(images, labels, states=victim.fresh_states([*range(4)]))
    many = known_features(last_layer(shared, victim), None, 0)
    one = known_features(last_layer(shared.select(torch.tensor([2])), victim), None, 0)
    torch.testing.assert_close(one.features[0], many.features[2])
