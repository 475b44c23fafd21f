"""Rules after several local steps, and clients that the attacker makes up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from leakage.clients.victim import Victim
from leakage.labels import Auxiliary, infer_labels
from leakage.labels.auxiliary import known_features
from leakage.labels.last_layer import LastLayer, last_layer, mean_gradient
from leakage.labels.simulation import draw_images, simulate
from tests.labels.by_hand import (
    Signed,
    auxiliary_images,
    counts_of,
    images_and_labels,
    linear,
    network,
    recall,
    victim_of,
)

PROTOCOLS: list[Any] = [
    {},
    {"local_steps": 1},
    {"local_steps": 4, "learning_rate": 0.5},
    {"local_steps": 3, "learning_rate": 0.5, "local_batch_size": 2},
    {"local_steps": 12, "learning_rate": 0.2, "local_batch_size": 1},
    {"local_steps": 4, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    {"local_steps": 6, "learning_rate": 0.2, "local_batch_size": 2, "momentum": 0.5},
    {"local_steps": 6, "learning_rate": 0.2, "local_batch_size": 1, "weight_decay": 0.3},
]


def shares(count: int, classes: int, model: Any, options: dict[str, Any]) -> tuple[Victim, Tensor, Tensor, Any]:
    victim = victim_of(model, count, **options)
    images, labels = images_and_labels(0, 5, count, classes)
    return victim, images, labels, victim.share(images, labels)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", PROTOCOLS)
@pytest.mark.parametrize("missing", [None, "no bias", "frozen bias", "frozen weight"])
def test_simulated_clients_share_what_real_ones_do(
    options: dict[str, Any], reduction: str, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linear(4, 12, before=Signed(), bias=missing != "no bias")
    if missing and missing.startswith("frozen"):
        getattr(model[1], missing.split()[1]).requires_grad_(False)
    victim, images, labels, shared = shares(6, 4, model, {**options, "reduction": reduction})
    layer = last_layer(shared, victim)
    known = known_features(layer, Auxiliary(images.flatten(0, 1), labels.flatten()), 0).with_labels(0)
    monkeypatch.setattr("leakage.labels.simulation._NUMBERS_AT_ONCE", 200)  # in parts
    clients = simulate(layer, known, torch.arange(30).view(5, 6))
    for simulated, real in (
        (clients.weight_gradient, layer.weight_gradient),
        (clients.bias_gradient, layer.bias_gradient),
    ):
        assert (simulated is None) == (real is None)
        if simulated is not None:
            torch.testing.assert_close(simulated, real)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", PROTOCOLS[:5])
def test_half_way_is_the_mean_of_the_weights_at_both_ends(options: dict[str, Any], reduction: str) -> None:
    victim, _, _, shared = shares(6, 4, linear(4, 12), {**options, "reduction": reduction})
    layer = last_layer(shared, victim).midway()
    rate, steps = victim.protocol.learning_rate or 0.0, victim.protocol.local_steps
    for name, found in (("weight", layer.weight), ("bias", layer.bias)):
        start, update = shared.state[f"1.{name}"], shared.gradients[f"1.{name}"]
        last = start - rate * (steps - 1) * update  # where about the last gradient was taken
        torch.testing.assert_close(found.expand_as(last), (start + last) / 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1), (0.0, 0.3)])
def test_a_gradient_that_stays_the_same_is_read_exactly(momentum: float, weight_decay: float, reduction: str) -> None:
    """torch's SGD makes the steps; only with weight decay and momentum is it less than exact, by the second order."""
    options: dict[str, Any] = {"local_steps": 6, "learning_rate": 0.01, "local_batch_size": 2, "reduction": reduction}
    protocol = victim_of(linear(4, 12), 4, **options, momentum=momentum, weight_decay=weight_decay).protocol
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 1, 4, 3, dtype=torch.float64, generator=generator)
    weight = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([weight], 0.01, momentum=momentum, weight_decay=weight_decay)
    visited = []
    for _ in range(6):
        weight.grad = gradient * (2 if reduction == "sum" else 1)
        visited.append(weight.detach().clone())
        sgd.step()
    shared = (start - weight.detach()) / 0.06
    found = mean_gradient(protocol, shared, start)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-2 * weight_decay)
    assert not momentum or not torch.allclose(shared, gradient, rtol=0.1)

    # The weights half-way: where gradients are made, weighed by how often momentum has them in a step.
    layer = LastLayer(found, None, start, torch.zeros(1, 4), lambda images: images, protocol, True, False)
    often = torch.tensor([sum(momentum**later for later in range(6 - step)) for step in range(6)], dtype=torch.float64)
    mean = (torch.stack(visited) * (often / often.sum()).view(-1, 1, 1, 1)).sum(0)
    torch.testing.assert_close(layer.midway().weight, mean, rtol=1e-9, atol=1e-2 * weight_decay + 1e-12)


def test_half_way_with_nothing_that_moves() -> None:
    model = linear(4, 12, bias=False)
    victim, _, _, shared = shares(6, 4, model, PROTOCOLS[2])
    layer = last_layer(shared, victim)
    assert torch.equal(layer.midway().bias, torch.zeros(1, 4))
    once = dataclasses.replace(layer, protocol=dataclasses.replace(layer.protocol, local_steps=1, learning_rate=None))
    assert once.midway() is once


@pytest.mark.usefixtures("quick_posterior")
@pytest.mark.parametrize("options", PROTOCOLS[2:])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rule", ["llg", "ilrg", "mean_feature", "posterior", "rlu"])
def test_local_updates_of_an_untrained_network(rule: str, options: dict[str, Any], reduction: str) -> None:
    model = network(0, classes=6, width=40)
    rate = options["learning_rate"] * (0.1 if reduction == "mean" else 0.02)
    options = {**options, "learning_rate": rate, "reduction": reduction}
    victim, _, labels, shared = shares(6, 6, model, options)
    learns = rule in ("posterior", "rlu")
    inferred = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary_images(1, 6, 10) if learns else None)
    assert recall(inferred.counts, labels) > (0.8 if rule != "llg" else 0.7)


@pytest.mark.parametrize("rule", ["ilrg", "mean_feature"])
def test_weights_half_way_serve_better_than_the_first(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"local_steps": 10, "learning_rate": 0.5}
    victim = victim_of(network(0, classes=6, width=40), 12, **options)
    images, labels = images_and_labels(0, 50, 12, 6)
    shared = victim.share(images, labels)
    found = recall(infer_labels(shared, victim, rule=rule).counts, labels)
    monkeypatch.setattr(LastLayer, "midway", lambda layer: layer)
    assert found > recall(infer_labels(shared, victim, rule=rule).counts, labels) + 0.02


def test_draws_of_clients() -> None:
    victim, _, _, shared = shares(9, 4, linear(4, 12), {})
    layer = last_layer(shared, victim)
    labels = torch.tensor([3, 1, 0, 0, 2, 1, 1, 3])
    drawn, counts = draw_images(labels, layer, 500, seed=1)
    assert drawn.shape == (500, 9)
    assert torch.equal(counts_of(labels[drawn], 4), counts)
    assert set(drawn.unique().tolist()) == set(range(8)), "every image is drawn"
    assert (counts.max(1).values == 9).any(), "some clients have nearly one class"
    assert abs(counts.float().mean(0) / 9 - 1 / 4).max() < 0.05, "no class is preferred"
    firsts = labels[drawn[:, 0]].bincount(minlength=4) / 500
    assert abs(firsts - 1 / 4).max() < 0.08, "the order is not that of the labels"
    again, _ = draw_images(labels, layer, 500, seed=1)
    assert torch.equal(drawn, again)
    other, _ = draw_images(labels, layer, 500, seed=2)
    assert not torch.equal(drawn, other)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("rule", "count"), [("idlg", 1), ("row_minimum", 3), ("rlg", 3), ("auto", 1), ("auto", 3)])
def test_without_the_learning_rate_rules_go_by_direction(rule: str, count: int, steps: int) -> None:
    """They find what they find where it is told; from an update that is a thousand times shorter than the gradient."""
    model = network(0, classes=6, width=40)
    told = {"local_steps": steps} | ({"learning_rate": 1e-3} if steps > 1 else {})
    untold = {"local_steps": steps, "learning_rate": 1e-3, "reveal_learning_rate": False}
    victims = [victim_of(model, count, **options) for options in (told, untold)]
    images, labels = images_and_labels(0, 5, count, 6)
    expected = rule if rule != "auto" else "idlg" if count == 1 else "row_minimum"
    first, second = (
        infer_labels(victim.share(images, labels), victim, rule=name)
        for victim, name in zip(victims, (expected, rule), strict=True)
    )
    assert torch.equal(first.counts, second.counts)
    assert second.rule == expected


def test_without_the_learning_rate_others_are_refused() -> None:
    untold = {"local_steps": 2, "learning_rate": 0.1, "reveal_learning_rate": False}
    victim, _, _, shared = shares(3, 6, network(0, classes=6, width=40), untold)
    message = (
        r"Expected clients that reveal their learning rate for rule='ilrg', but got 'unknown'\. Rules that would work: "
        r"'auto', 'row_minimum', 'rlg'\."
    )
    with pytest.raises(ValueError, match=message):
        infer_labels(shared, victim, rule="ilrg")
    victim, _, _, shared = shares(7, 6, network(0, classes=6, width=40), untold)
    with pytest.raises(
        ValueError, match=r"reveal their learning rate for rule='auto', but got 'unknown'\. Use DLGAttack"
    ):
        infer_labels(shared, victim)
