"""Victims are independent, seeds decide everything, and nobody looks at the truth."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.labels import RULES, Auxiliary, LabelCounts, infer_labels, inference
from tests.labels.by_hand import auxiliary_images, images_and_labels, network, victim_of

CLASSES, VICTIMS = 6, 5
LEARNS_ABOUT_ONE_NETWORK = ("rlu", "posterior")
CASES = [
    pytest.param(rule, own, steps, id=f"{rule}-{'own' if own else 'shared'}{'-steps' if steps else ''}")
    for rule in (*RULES, "auto")
    for own in (False, True)
    for steps in (False, True)
    if not (own and rule in LEARNS_ABOUT_ONE_NETWORK)
]

pytestmark = pytest.mark.usefixtures("hasty_posterior")


def setting(rule: str, own: bool, steps: bool) -> tuple[Victim, SharedGradient, Auxiliary | None]:
    count = 1 if rule == "idlg" else 4
    options: dict[str, Any] = {"local_steps": 4, "learning_rate": 0.5, "local_batch_size": count // 2 or None}
    victim = victim_of(network(1, classes=CLASSES, scale=2.0), count, **(options if steps else {}))
    images, labels = images_and_labels(2, VICTIMS, count, CLASSES)
    states = victim.fresh_states([*range(VICTIMS)]) if own else None
    shared = victim.share(images, labels, states=states)
    auxiliary = auxiliary_images(3, CLASSES) if "auxiliary" in getattr(RULES.get(rule), "needs", ()) else None
    return victim, shared, auxiliary


def assert_same(inferred: LabelCounts, expected: LabelCounts) -> None:
    assert torch.equal(inferred.counts, expected.counts)
    assert torch.equal(inferred.present, expected.present)
    torch.testing.assert_close(inferred.scores, expected.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rule", "own", "steps"), CASES)
def test_a_victim_does_not_depend_on_the_others(rule: str, own: bool, steps: bool, monkeypatch: Any) -> None:
    victim, shared, auxiliary = setting(rule, own, steps)
    together = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary)
    monkeypatch.setattr(inference, "_NETWORKS_AT_ONCE", 2)
    learns = rule in ("posterior", "auto")  # which takes its time
    for group in ([3], [4, 0]) if learns else ([0], [1], [2], [3], [4], [4, 0], [1, 3, 2]):
        some = torch.tensor(group)
        alone = infer_labels(shared.select(some), victim, rule=rule, auxiliary=auxiliary)
        expected = LabelCounts(together.counts[some], together.scores[some], together.present[some], rule)
        assert_same(alone, expected)
        assert alone.rule == together.rule


@pytest.mark.parametrize(("rule", "own", "steps"), CASES)
def test_what_is_returned(rule: str, own: bool, steps: bool) -> None:
    victim, shared, auxiliary = setting(rule, own, steps)
    inferred = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary)
    count = victim.protocol.num_images
    assert len(inferred) == VICTIMS
    assert inferred.counts.dtype == inferred.labels.dtype == torch.int64
    assert inferred.present.dtype == torch.bool
    assert inferred.scores.is_floating_point()
    for tensor in (inferred.counts, inferred.scores, inferred.present):
        assert tensor.shape == (VICTIMS, CLASSES)
    assert inferred.labels.shape == (VICTIMS, count)
    assert (inferred.counts >= 0).all()
    assert (inferred.counts.sum(1) == count).all()
    assert torch.isfinite(inferred.scores).all()
    for row, counts in zip(inferred.labels.tolist(), inferred.counts.tolist(), strict=True):
        assert row == [label for label, times in enumerate(counts) for _ in range(times)]


def global_random_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002 - to watch it


@pytest.mark.parametrize("rule", [*RULES, "auto"])
def test_seeds_decide_and_the_global_random_state_stays(rule: str) -> None:
    victim, shared, auxiliary = setting(rule, False, True)
    before = global_random_state()
    first = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary, seed=1)
    assert global_random_state() == before
    torch.manual_seed(5)
    again = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary, seed=1)
    assert torch.equal(first.scores, again.scores)
    other = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary, seed=2)
    draws = rule in ("llg_star", "geng", "mean_feature", "rlu", "posterior", "auto")
    assert torch.equal(first.scores, other.scores) != draws


@pytest.mark.parametrize("rule", [*RULES, "auto"])
def test_labels_that_are_told_are_not_looked_at(rule: str) -> None:
    victim, shared, auxiliary = setting(rule, False, False)
    expected = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary)
    shared.labels = torch.zeros(VICTIMS, victim.protocol.num_images, dtype=torch.long)
    assert_same(infer_labels(shared, victim, rule=rule, auxiliary=auxiliary), expected)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "idlg"])
def test_the_order_of_the_images_does_not_matter(rule: str) -> None:
    victim, shared, auxiliary = setting(rule, False, False)
    images, labels = images_and_labels(2, VICTIMS, 4, CLASSES)
    order = torch.tensor([2, 0, 3, 1])
    permuted = victim.share(images[:, order], labels[:, order])
    expected = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary)
    assert_same(infer_labels(permuted, victim, rule=rule, auxiliary=auxiliary), expected)


def test_nothing_stays_behind_on_the_model() -> None:
    model = network(1, classes=CLASSES).train()
    victim = victim_of(model, 4)
    modes = [module.training for module in victim.model.modules()]
    images, labels = images_and_labels(2, VICTIMS, 4, CLASSES)
    shared = victim.share(images, labels)
    before = {name: tensor.clone() for name, tensor in {**shared.gradients, **shared.state}.items()}
    for rule in ("llg", "rlg", "ilrg", "geng", "mean_feature", "posterior"):
        infer_labels(shared, victim, rule=rule, auxiliary=auxiliary_images(3, CLASSES))
    assert modes == [module.training for module in victim.model.modules()]
    assert str(victim.model) == str(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in {**shared.gradients, **shared.state}.items())


def dead() -> nn.Module:
    model = network(0, classes=CLASSES, activation=nn.ReLU())
    model[1].bias.data.fill_(-100)
    return model


@pytest.mark.parametrize("rule", [*RULES, "auto"])
@pytest.mark.parametrize("known", ["noise", "images", "labelled images"])
@pytest.mark.parametrize(
    "model",
    [dead(), network(0, classes=CLASSES, activation=nn.ReLU(), scale=1000.0)],
    ids=["features of zero", "predictions of zero and one"],
)
def test_extreme_networks(model: nn.Module, rule: str, known: str) -> None:
    needs = getattr(RULES.get(rule), "needs", ())
    if known == "noise" and "auxiliary" in needs:
        pytest.skip("needs images")
    count = 1 if "one image" in needs else 4
    victim = victim_of(model, count)
    images, labels = images_and_labels(0, VICTIMS, count, CLASSES)
    auxiliary = auxiliary_images(3, CLASSES)
    if known != "labelled images":
        auxiliary.labels = None
    shared = victim.share(images, labels)
    inferred = infer_labels(shared, victim, rule=rule, auxiliary=None if known == "noise" else auxiliary)
    assert (inferred.counts.sum(1) == count).all()
    assert (inferred.counts >= 0).all()
    assert torch.isfinite(inferred.scores).all()


@pytest.mark.parametrize("rule", [*RULES, "auto"])
def test_double_precision(rule: str) -> None:
    victim, _, auxiliary = setting(rule, False, True)
    images, labels = images_and_labels(2, VICTIMS, victim.protocol.num_images, CLASSES)
    expected = infer_labels(victim.share(images, labels), victim, rule=rule, auxiliary=auxiliary)
    double = victim.share(images, labels).to(torch.float64)
    inferred = infer_labels(double, victim, rule=rule, auxiliary=auxiliary)
    assert inferred.scores.dtype == torch.float64
    if rule not in ("posterior", "auto"):  # which learns, and so is another one
        assert torch.equal(inferred.counts, expected.counts)


@pytest.mark.parametrize("rule", ["llg_plus", "rlu", "posterior", "mean_feature", "auto"])
def test_auxiliary_images_without_labels(rule: str) -> None:
    victim, shared, _ = setting(rule, False, False)
    auxiliary = Auxiliary(auxiliary_images(3, CLASSES).images)
    together = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary)
    some = torch.tensor([3, 1])
    alone = infer_labels(shared.select(some), victim, rule=rule, auxiliary=auxiliary)
    assert_same(alone, LabelCounts(together.counts[some], together.scores[some], together.present[some], rule))


@pytest.mark.parametrize("rule", ["ilrg", "mean_feature", "posterior"])
def test_half_precision_is_computed_in_single(rule: str) -> None:
    victim, shared, auxiliary = setting(rule, own=False, steps=False)
    found = infer_labels(shared.to(torch.float16), victim, rule=rule, auxiliary=auxiliary)
    expected = infer_labels(shared.to(torch.float16).to(torch.float32), victim, rule=rule, auxiliary=auxiliary)
    assert torch.equal(found.counts, expected.counts)


def test_learning_works_where_no_gradients_are_recorded() -> None:
    victim, shared, auxiliary = setting("posterior", own=False, steps=False)
    expected = infer_labels(shared, victim, rule="posterior", auxiliary=auxiliary)
    with torch.inference_mode():
        found = infer_labels(shared, victim, rule="posterior", auxiliary=auxiliary)
    assert torch.equal(found.counts, expected.counts)
