"""What is shared, what must stay as it was on the user's model, and what a client knows of its model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from leakage import LeNet, Victim
from tests.clients.networks import CLASSES, IMAGE_SHAPE, LogSoftmaxAtTheEnd, everything, network, private


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


# -- the classifier


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
