"""Labels that the last layer's gradient verifies, and wrong ones that it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.dummies import InferredLabels
from leakage.dummies.dummy import Target
from leakage.labels import LabelReader, correct_labels, correction
from leakage.labels.counts import LabelCounts
from tests.labels.by_hand import images_and_labels, network

CLASSES, COUNT, VICTIMS = 6, 3, 2


def setting(count: int = COUNT, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Victim, SharedGradient]:
    victim = Victim(network(1, classes=CLASSES, scale=2).to(dtype), image_shape=(3, 2, 2), num_images=count, **options)
    images, labels = images_and_labels(2, VICTIMS, count, CLASSES)
    return victim, victim.share(images.to(dtype), labels)


def truth(count: int = COUNT) -> Tensor:
    return images_and_labels(2, VICTIMS, count, CLASSES)[1]


def wrong(labels: Tensor, places: int) -> Tensor:
    labels = labels.clone()
    for victim in range(len(labels)):
        for place in range(places):
            image = (victim + place) % labels.shape[1]
            labels[victim, image] = (labels[victim, image] + 1 + victim) % CLASSES
    return labels


def test_a_wrong_label_is_found_and_replaced() -> None:
    victim, shared = setting(dtype=torch.float32)
    given = wrong(truth(), 1)
    given[0] = truth()[0]
    found = correct_labels(shared, victim, given)
    assert torch.equal(found.labels.sort(1).values, truth().sort(1).values)
    assert found.verified.tolist() == [True] * VICTIMS
    assert found.changed.tolist() == [0, 1]
    assert torch.equal(found.labels[0], given[0])
    assert ((found.labels != given).sum(1) <= 1).all()


def test_one_image() -> None:
    victim, shared = setting(1)
    found = correct_labels(shared.select(torch.tensor([0])), victim, (truth(1)[:1] + 2) % CLASSES)
    assert torch.equal(found.labels, truth(1)[:1])


@pytest.mark.slow
def test_two_wrong_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "_ROUNDS", (1,))
    victim, shared = setting()
    found = correct_labels(shared.select(torch.tensor([0])), victim, wrong(truth(), 2)[:1], most=2)
    assert torch.equal(found.labels.sort(1).values, truth()[:1].sort(1).values)
    assert (found.verified.tolist(), found.changed.tolist()) == ([True], [2])


def test_what_the_gradient_does_not_verify_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "_ROUNDS", (1,))
    victim, shared = setting(2)
    shared = shared.select(torch.tensor([0]))
    shared.gradients = {name: gradient + 1e-3 * gradient.abs().sqrt() for name, gradient in shared.gradients.items()}
    found = correct_labels(shared, victim, truth(2)[:1])
    assert torch.equal(found.labels, truth(2)[:1])
    assert not found.verified.any()
    untouched = correct_labels(setting(2)[1], victim, wrong(truth(2), 1), most=0)
    assert torch.equal(untouched.labels, wrong(truth(2), 1))
    assert not untouched.verified.any()


def test_inferred_labels_are_corrected_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    victim, shared = setting()

    def misread(reader: LabelReader, shared: SharedGradient, victim: Victim) -> LabelCounts:
        counts = torch.nn.functional.one_hot(wrong(truth(), 1)[:1], CLASSES).sum(1)
        return LabelCounts(counts, counts.double(), counts > 0, "auto")

    monkeypatch.setattr(LabelReader, "__call__", misread)
    shared = shared.select(torch.tensor([0]))
    for correct in (False, True):
        kept = InferredLabels(correct=correct).begin(shared, victim)["probabilities"]
        right = torch.nn.functional.one_hot(truth()[:1], CLASSES).sum(1)
        assert torch.equal(kept.sum(1).long(), right) == correct


def test_bad_input() -> None:
    victim, shared = setting()
    with pytest.raises(ValueError, match="Expected `most` to be a whole number of at least 0, but got -1"):
        correct_labels(shared, victim, truth(), most=-1)
    with pytest.raises(ValueError, match=r"Expected `labels` of shape \(2, 3\), but got \(2, 2\)"):
        correct_labels(shared, victim, truth()[:, :2])
    squares, gradient = setting(loss="mean_squared_error")
    with pytest.raises(ValueError, match=r"Expected a victim with loss 'cross_entropy', .* got loss 'mean_squared_err"):
        correct_labels(gradient, squares, truth())
    many, gradient = setting(CLASSES)
    with pytest.raises(ValueError, match=r"Expected at most 5 images, .* but got 6. Without features, use labels as"):
        correct_labels(gradient, many, truth(CLASSES))
    target = Target(many, labels_revealed=False, labels_known=True, own_weights=False)
    with pytest.raises(ValueError, match="Expected at most 5 images"):
        InferredLabels(correct=True).check(target)
    InferredLabels().check(target)
    tanh = Victim(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh()), image_shape=(3, 2, 2))
    with pytest.raises(ValueError, match=r"Expected logits that are the output of an nn.Linear layer, .* Without feat"):
        correct_labels(tanh.share(*images_and_labels(0, 1, 1, 4)), tanh, torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="Expected `correct` to be True or False, but got 1"):
        InferredLabels(correct=1)  # type: ignore[arg-type]
