"""Protocols that are told, and such that no client can have."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from leakage import Protocol
from leakage.clients.losses import cross_entropy

LOCAL = Protocol((1, 4, 4), 3, num_images=6, local_steps=4, learning_rate=0.05, local_batch_size=3)


def test_a_local_batch_of_all_images_is_the_default():
    assert dataclasses.replace(LOCAL, local_batch_size=6) == dataclasses.replace(LOCAL, local_batch_size=None)
    one_step = Protocol((1, 4, 4), 3, num_images=2)
    assert dataclasses.replace(one_step, local_batch_size=2) == one_step


def test_momentum_and_weight_decay_are_numbers_of_one_kind():
    """So that equal protocols are written alike."""
    told = dataclasses.replace(LOCAL, momentum=0, weight_decay=1)
    assert repr(told) == repr(dataclasses.replace(LOCAL, momentum=0.0, weight_decay=1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_steps": 0}, "`local_steps` to be a whole number of at least 1, but got 0"),
        ({"local_steps": True}, "`local_steps` to be a whole number of at least 1, but got True"),
        ({"learning_rate": None}, "a `learning_rate` for 4 local steps, but got None"),
        ({"learning_rate": 0.0}, "`learning_rate` to be positive and finite, but got 0.0"),
        ({"learning_rate": float("inf")}, "`learning_rate` to be positive and finite, but got inf"),
        ({"learning_rate": "0.1"}, "`learning_rate` to be positive and finite, but got '0.1'"),
        ({"learning_rate": "known"}, "`learning_rate` to be positive and finite, but got 'known'"),
        ({"local_steps": 1, "local_batch_size": None}, "no `learning_rate` with one local step.* but got 0.05"),
        ({"local_batch_size": 0}, "`local_batch_size` to be a whole number of at least 1, but got 0"),
        ({"local_batch_size": 4}, "`local_batch_size` to divide `num_images` = 6, .* got 4. Choose a divisor of 6"),
        ({"local_batch_size": 12}, "`local_batch_size` to divide `num_images` = 6, .* got 12"),
        ({"local_batch_size": 2}, "`local_steps` to be a multiple of 3 = `num_images` / .* but got 4"),
        ({"local_steps": 1, "learning_rate": None}, "`local_steps` to be a multiple of 2 = .* but got 1"),
        ({"momentum": -0.1}, "`momentum` of at least 0, but got -0.1"),
        ({"momentum": 1.0}, "`momentum` below 1, .* but got 1.0"),
        ({"momentum": "0.9"}, "`momentum` of at least 0, but got '0.9'"),
        ({"momentum": None}, "`momentum` of at least 0, but got None"),
        ({"weight_decay": -1e-4}, "`weight_decay` of at least 0, but got -0.0001"),
        ({"weight_decay": float("nan")}, "`weight_decay` of at least 0, but got nan"),
        (
            {"local_steps": 1, "learning_rate": None, "local_batch_size": None, "momentum": 0.9},
            "no `momentum` and no `weight_decay` with one local step, .* but got 0.9 and 0.0. Leave them out",
        ),
        (
            {"local_steps": 1, "learning_rate": None, "local_batch_size": None, "weight_decay": 0.1},
            "no `momentum` and no `weight_decay` with one local step, .* but got 0.0 and 0.1",
        ),
    ],
)
def test_wrong_local_steps(changes, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        dataclasses.replace(LOCAL, **changes)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.3}, {"weight": torch.tensor([0.5, 1.0, 4.0])}])
def test_targets_are_those_of_torch(options):
    known = {"weight": "class_weights"}
    given = {known.get(name, name): tuple(one.tolist()) if name == "weight" else one for name, one in options.items()}
    protocol = Protocol((1, 4, 4), 3, num_images=5, **given)
    labels, logits = torch.tensor([0, 2, 2, 1, 0]), torch.randn(5, 3)
    targets = protocol.targets(labels, torch.float32)
    expected = torch.nn.functional.cross_entropy(logits, labels, **options)
    torch.testing.assert_close(cross_entropy(logits, targets).mean(), expected)
    torch.testing.assert_close(protocol.counts(targets.mean(0)), labels.bincount().float())
    assert Protocol(**json.loads(json.dumps(dataclasses.asdict(protocol)))) == protocol, "as read from a file"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "`label_smoothing` below 1, which hides all labels, but got 1.0"),
        ({"label_smoothing": -0.1}, "`label_smoothing` of at least 0, but got -0.1"),
        (
            {"label_smoothing": 0.1, "loss": "mean_squared_error"},
            "`label_smoothing` with plain 'cross_entropy'",
        ),
        ({"class_weights": (1.0, 2.0)}, r"`class_weights` as 3 numbers, one per class, but got \(1.0, 2.0\)"),
        ({"class_weights": (1.0, 0.0, 1.0)}, "`class_weights` to be positive and finite, but got 0.0"),
        (
            {"class_weights": (1.0, 1.0, 1.0), "shuffle": True},
            "`class_weights` with .* but got .* shuffle=True",
        ),
        ({"label_kind": "hard"}, "`label_kind` to be one of .*, but got 'hard'"),
        (
            {"label_kind": "values"},
            "loss 'mean_squared_error' or 'own' with `label_kind` 'values', but got 'cross_entropy'",
        ),
        (
            {"label_kind": "probabilities", "label_smoothing": 0.1},
            "`label_kind` 'classes' with `label_smoothing` or `class_weights`, but got 'probabilities'",
        ),
        ({"loss": "own", "reduction": "sum"}, "no reduction 'sum' and no `shuffle` with loss 'own'"),
    ],
)
def test_options_of_the_loss_that_are_not_possible(options, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        dataclasses.replace(LOCAL, **options)


def test_a_learning_rate_that_is_not_told():
    for steps in (1, 4):
        told = Protocol((1, 4, 4), 3, local_steps=steps, learning_rate="unknown")
        assert (told.learning_rate, told.known_rate) == ("unknown", 0.0)
    assert LOCAL.known_rate == 0.05


def test_more_local_steps_than_an_attack_can_simulate():
    """A crafted file could otherwise make every evaluation endless."""
    assert Protocol((1, 4, 4), 3, local_steps=10_000, learning_rate=0.1).local_steps == 10_000
    with pytest.raises(ValueError, match=r"Expected `local_steps` of at most 10000, as every .* but got 10001"):
        Protocol((1, 4, 4), 3, local_steps=10_001, learning_rate=0.1)


@pytest.mark.parametrize("image_shape", [28, "abc", None, (28, 28), (1, 1, 28, 28)])
def test_image_shapes_of_another_kind(image_shape):
    with pytest.raises(ValueError, match=r"Expected `image_shape` \(C, H, W\), but got "):
        Protocol(image_shape, 10)
