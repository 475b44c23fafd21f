"""Labels of clients that shorten their gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from leakage import LeNet, Victim
from leakage.clients.shared_gradient import SharedGradient
from leakage.defenses import DPSGD, Clip, Defense, GaussianNoise
from leakage.dummies import InferredLabels, Pixels
from leakage.inversion.evaluator import Evaluator
from leakage.labels import LabelReader, infer_labels
from leakage.labels.auxiliary import known_features
from leakage.labels.last_layer import last_layer
from leakage.labels.length import noise_of_shortened, restore_length
from leakage.objectives import SquaredDistance

CLASSES, VICTIMS = 10, 12
RULE = "mean_feature"


def clients(
    images: int, *defenses: Defense, bias: bool = True, skewed: bool = False
) -> tuple[Victim, SharedGradient, Tensor]:
    """Of one network, what they share, and how many images of each class they hold."""
    generator = torch.Generator().manual_seed(images)
    model = network()
    if not bias:
        model.classifier.bias.requires_grad_(False)
    victim = Victim(model, image_shape=(1, 28, 28), num_images=images, defenses=list(defenses))
    labels = torch.randint(2 if skewed else CLASSES, (VICTIMS, images), generator=generator)
    pictures = torch.rand(VICTIMS, images, 1, 28, 28, generator=generator)
    counts = torch.nn.functional.one_hot(labels, CLASSES).sum(1)
    return victim, victim.share(pictures, labels, seed=5), counts


def network() -> LeNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LeNet()


def undefended(victim: Victim, shared: SharedGradient) -> tuple[Victim, SharedGradient]:
    """As an attacker sees them who knows of no defense."""
    protocol = dataclasses.replace(victim.protocol, defenses=())
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in victim.trainable)
    return Victim.of(model, protocol), dataclasses.replace(shared, protocol=protocol)


def told(shared: SharedGradient) -> Tensor:
    noise = noise_of_shortened(shared)
    assert noise is not None
    return noise


def recall(found: Tensor, truth: Tensor) -> float:
    return float(torch.minimum(found, truth).sum() / truth.sum())


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("images", [2, 8, 40])
def test_clipping_hides_no_labels(images: int, skewed: bool) -> None:
    victim, shared, truth = clients(images, Clip(0.1), skewed=skewed)
    plain, as_it_came = undefended(victim, shared)
    adaptive = recall(infer_labels(shared, victim, rule=RULE).counts, truth)
    naive = recall(infer_labels(as_it_came, plain, rule=RULE).counts, truth)
    assert adaptive > 0.9 > 0.7 > naive


@pytest.mark.usefixtures("hasty_posterior")
def test_rules_that_try_and_learn_see_it_as_long_as_it_was() -> None:
    victim, shared, truth = clients(8, Clip(0.1))
    assert recall(infer_labels(shared, victim).counts, truth) > 0.9


@pytest.mark.parametrize("images", [2, 8, 40])
def test_the_length_is_what_it_was(images: int) -> None:
    victim, shared, _ = clients(images, Clip(0.1))
    plain, whole, _ = clients(images)
    layer = last_layer(shared, victim)
    found, truth = restore_length(layer, known_features(layer, None, 0), told(shared)), last_layer(whole, plain)
    ratios = found.push.norm(dim=1) / truth.push.norm(dim=1)
    assert (ratios - 1).abs().median() < 0.02
    torch.testing.assert_close(found.rows / found.push[..., None], layer.rows / layer.push[..., None])


def test_gradients_that_were_short_enough_stay_as_they_are() -> None:
    victim, shared, truth = clients(8, Clip(1e6))
    layer = last_layer(shared, victim)
    found = restore_length(layer, known_features(layer, None, 0), told(shared))
    ratios = found.push.norm(dim=1) / layer.push.norm(dim=1)
    assert (ratios >= 1).all()
    assert (ratios - 1).abs().median() < 0.02
    assert recall(infer_labels(shared, victim, rule=RULE).counts, truth) > 0.95


def test_noise_that_is_told_is_reckoned_with() -> None:
    victim, shared, truth = clients(8, DPSGD(0.003, norm=1.0))
    plain, as_it_came = undefended(victim, shared)
    assert recall(infer_labels(shared, victim, rule=RULE).counts, truth) > 0.8
    assert recall(infer_labels(as_it_came, plain, rule=RULE).counts, truth) < 0.6


def test_noise_alone_is_not_taken_for_labels() -> None:
    victim, shared, _ = clients(8, DPSGD(100.0, norm=1.0))
    layer = last_layer(shared, victim)
    found = restore_length(layer, known_features(layer, None, 0), told(shared))
    torch.testing.assert_close(found.push, layer.push)


def test_each_victim_is_looked_at_by_itself() -> None:
    victim, shared, _ = clients(8, Clip(0.1))
    together = infer_labels(shared, victim, rule=RULE).scores
    for one in range(VICTIMS):
        alone = infer_labels(shared.select(torch.tensor([one])), victim, rule=RULE).scores
        torch.testing.assert_close(alone[0], together[one])


def test_networks_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    victim = Victim(network(), image_shape=(1, 28, 28), num_images=4, defenses=[Clip(0.1)])
    labels = torch.randint(CLASSES, (70, 4), generator=generator)  # more than are looked at together
    shared = victim.share(
        torch.rand(70, 4, 1, 28, 28, generator=generator), labels, states=victim.fresh_states([*range(70)])
    )
    truth = torch.nn.functional.one_hot(labels, CLASSES).sum(1)
    assert recall(infer_labels(shared, victim, rule=RULE).counts, truth) > 0.9


def test_without_both_gradients_it_is_taken_as_it_came() -> None:
    victim, shared, _ = clients(8, Clip(0.1), bias=False)
    plain, as_it_came = undefended(victim, shared)
    found, other = infer_labels(shared, victim, rule="llg_star"), infer_labels(as_it_came, plain, rule="llg_star")
    torch.testing.assert_close(found.scores, other.scores)


def test_defenses_of_others_are_passed_over() -> None:
    victim, shared, truth = clients(8, Clip(0.1))
    told = (*victim.protocol.defenses, {"name": "OfSomebodyElse", "strength": 3})
    protocol = dataclasses.replace(victim.protocol, defenses=told)
    victim, shared = Victim.of(network(), protocol), dataclasses.replace(shared, protocol=protocol)
    assert recall(LabelReader(RULE)(shared, victim).counts, truth) > 0.9


@pytest.mark.parametrize("knows", [False, True])
def test_a_naive_attacker_reads_labels_as_if_nothing_was_done(knows: bool) -> None:
    victim, shared, truth = clients(8, Clip(0.1), GaussianNoise(1e-7))
    known = victim.defenses if knows else ()
    evaluator = Evaluator(victim.without_secrets(), SquaredDistance(), Pixels(), InferredLabels(RULE), defenses=known)
    found = evaluator.begin(shared)["labels/probabilities"].sum(1)
    assert (recall(found, truth) > 0.9) == knows


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_noise_is_in_the_unit_of_the_gradients(reduction: str) -> None:
    victim = Victim(
        network(), image_shape=(1, 28, 28), num_images=4, reduction=reduction, defenses=[DPSGD(0.5, norm=2.0)]
    )
    labels = torch.randint(CLASSES, (2, 4), generator=torch.Generator().manual_seed(0))
    images = torch.rand(2, 4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    shared = victim.share(images, labels)
    quiet = Victim(
        network(), image_shape=(1, 28, 28), num_images=4, reduction=reduction, defenses=[DPSGD(0.0, norm=2.0)]
    )
    noisy, still = last_layer(shared, victim), last_layer(quiet.share(images, labels), quiet)
    found = (noisy.rows - still.rows).square().mean((1, 2))
    torch.testing.assert_close(told(shared).to(found), found, rtol=0.1, atol=0)


def test_nothing_is_restored_where_nothing_is_shortened() -> None:
    _, shared, _ = clients(4, GaussianNoise(1e-3))
    assert noise_of_shortened(shared) is None
