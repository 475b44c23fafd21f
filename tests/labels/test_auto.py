"""Which rule `auto` takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.clients.victim import Victim
from leakage.labels import RULES, Auxiliary, infer_labels, inference, rules
from leakage.labels.auxiliary import KnownFeatures
from leakage.labels.last_layer import LastLayer
from leakage.labels.rules import Knowledge, Rule
from tests.labels.by_hand import auxiliary_images, images_and_labels, linear, network, recall, victim_of

pytestmark = pytest.mark.usefixtures("quick_posterior")

CLASSES = 5


def frozen(name: str) -> nn.Module:
    model = network(0, classes=CLASSES)
    getattr(model[-1], name).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "count", "expected"),
    [
        (network(0, classes=CLASSES), 1, "idlg"),
        (network(0, classes=CLASSES), 2, "mean_feature"),
        (network(0, classes=CLASSES, activation=nn.Tanh()), 20, "mean_feature"),
        (frozen("weight"), 1, "idlg"),
        (frozen("weight"), 3, "geng"),
        (frozen("bias"), 3, "geng"),
        (network(0, classes=CLASSES, bias=False), 3, "geng"),
    ],
)
def test_networks_of_their_own_are_not_tried_on(model: nn.Module, count: int, expected: str) -> None:
    victim = victim_of(model, count)
    images, labels = images_and_labels(0, 2, count, CLASSES)
    shared = victim.share(images, labels, states=victim.fresh_states([0, 1]))
    for auxiliary in (None, auxiliary_images(0, CLASSES)):
        inferred = infer_labels(shared, victim, auxiliary=auxiliary)
        assert inferred.rule == expected
        alone = infer_labels(shared, victim, rule=expected, auxiliary=auxiliary)
        assert torch.equal(inferred.counts, alone.counts)


def test_geng_where_only_the_bias_shares_its_gradient() -> None:
    victim = victim_of(frozen("weight"), 3)
    images, labels = images_and_labels(0, 2, 3, CLASSES)
    assert infer_labels(victim.share(images, labels), victim).rule == "geng"


@pytest.mark.parametrize(
    "model", [network(0, classes=CLASSES), frozen("bias"), network(0, classes=CLASSES, bias=False)]
)
def test_without_auxiliary_images_it_tries_on_noise(model: nn.Module) -> None:
    victim = victim_of(model, 6)
    images, labels = images_and_labels(0, 50, 6, CLASSES)
    shared = victim.share(images, labels)
    inferred = infer_labels(shared, victim)
    assert torch.equal(inferred.counts, infer_labels(shared, victim, rule=inferred.rule).counts)
    assert recall(inferred.counts, labels) > 0.9


def test_one_image_needs_no_learning() -> None:
    victim = victim_of(network(0, classes=CLASSES), 1)
    images, labels = images_and_labels(0, 20, 1, CLASSES)
    inferred = infer_labels(victim.share(images, labels), victim, auxiliary=auxiliary_images(0, CLASSES))
    assert inferred.rule == "idlg"
    assert torch.equal(inferred.labels, labels)


def blobs(seed: int, labels: Tensor) -> Tensor:
    """Images of (1, 4, 4) around a centre of their class."""
    centres = torch.rand(CLASSES, 16, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(*labels.shape, 16, generator=torch.Generator().manual_seed(seed))
    return (centres[labels] + 0.3 * noise).clamp(0, 1).unflatten(-1, (1, 4, 4))


def blob_network(*, trained: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    labels = torch.arange(500) % CLASSES
    images = blobs(1, labels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150 if trained else 0):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def blob_victims(model: nn.Module, count: int) -> tuple[Victim, Any, Tensor, Auxiliary]:
    victim = Victim(model, image_shape=(1, 4, 4), num_images=count)
    labels = torch.randint(CLASSES, (100, count), generator=torch.Generator().manual_seed(2))
    known = torch.arange(300) % CLASSES
    return victim, victim.share(blobs(3, labels), labels), labels, Auxiliary(blobs(4, known), known)


def test_with_auxiliary_images_it_takes_what_finds_most() -> None:
    chosen = []
    for trained in (False, True):
        victim, shared, labels, auxiliary = blob_victims(blob_network(trained=trained), 12)
        auto = infer_labels(shared, victim, auxiliary=auxiliary)
        recalls = {
            rule: recall(infer_labels(shared, victim, rule=rule, auxiliary=auxiliary).counts, labels)
            for rule in RULES.keys() - {"idlg", "row_minimum", "rlg"}
        }
        assert recall(auto.counts, labels) == recalls[auto.rule]
        assert recalls[auto.rule] >= max(recalls.values()) - 0.03
        chosen.append(auto.rule)
        if trained:
            assert recalls[auto.rule] > recalls["mean_feature"] + 0.05
        else:
            assert recalls[auto.rule] > recalls["llg"] + 0.05
    assert chosen[0] != chosen[1]


def test_the_victims_gradients_have_no_say_in_the_choice() -> None:
    victim, shared, _, auxiliary = blob_victims(blob_network(trained=True), 6)
    expected = infer_labels(shared, victim, auxiliary=auxiliary).rule
    generator = torch.Generator().manual_seed(0)
    for gradient in shared.gradients.values():
        gradient.copy_(torch.randn(gradient.shape, generator=generator))
    assert infer_labels(shared, victim, auxiliary=auxiliary).rule == expected
    assert infer_labels(shared.select(torch.tensor([5])), victim, auxiliary=auxiliary).rule == expected


def only_rules(monkeypatch: pytest.MonkeyPatch, **some: Rule) -> None:
    for module in (inference, rules):
        monkeypatch.setattr(module, "RULES", some)


def test_rules_are_tried_on_images_that_they_did_not_learn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {"learnt": [], "tried": []}

    def learn(layer: LastLayer, known: Knowledge) -> Any:
        seen["learnt"].append(known.features.features[0])
        return geng.find(layer, known)

    def simulate(layer: LastLayer, known: KnownFeatures, drawn: Tensor) -> LastLayer:
        seen["tried"].append(known.features[0])
        return real(layer, known, drawn)

    real, geng = inference.simulate, RULES["geng"]
    monkeypatch.setattr(inference, "_GOOD_ENOUGH", 2.0)
    monkeypatch.setattr(inference, "simulate", simulate)
    only_rules(monkeypatch, geng=geng, posterior=Rule(learn))
    victim = victim_of(linear(CLASSES, 12), 4)
    images, labels = images_and_labels(0, 3, 4, CLASSES)
    auxiliary = auxiliary_images(1, CLASSES, each=8)
    infer_labels(victim.share(images, labels), victim, auxiliary=auxiliary)
    sides = [{tuple(row) for row in seen[side][0].tolist()} for side in ("learnt", "tried")]
    assert [len(side) for side in sides] == [30, 10]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {tuple(row) for row in auxiliary.images.flatten(1).tolist()}


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_rules_are_tried_on_what_victims_share(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(layer: LastLayer, known: Knowledge) -> Any:
        assert getattr(layer, f"{missing}_gradient") is None
        return geng.find(layer, known)

    geng = RULES["geng"]
    only_rules(monkeypatch, geng=Rule(look), posterior=Rule(look))
    monkeypatch.setattr(inference, "_GOOD_ENOUGH", 2.0)
    victim = victim_of(frozen(missing), 4)
    images, labels = images_and_labels(0, 3, 4, CLASSES)
    infer_labels(victim.share(images, labels), victim, auxiliary=auxiliary_images(1, CLASSES))


def test_two_auxiliary_images_of_a_class_are_enough() -> None:
    victim, shared, labels, auxiliary = blob_victims(blob_network(trained=False), 4)
    few = Auxiliary(auxiliary.images[: 2 * CLASSES], auxiliary.labels[: 2 * CLASSES])
    inferred = infer_labels(shared, victim, auxiliary=few)
    assert recall(inferred.counts, labels) > 0.6
