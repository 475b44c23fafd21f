"""What a reader keeps from victim to victim, and in a checkpoint."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.labels import Auxiliary, LabelReader, infer_labels, inference
from leakage.labels.posterior import LabelPosterior
from tests.labels.by_hand import auxiliary_images, images_and_labels, network, victim_of
from tests.labels.test_victims import global_random_state

CLASSES = 6

pytestmark = pytest.mark.usefixtures("hasty_posterior")


def victims(seed: int = 1, count: int = 4, **options: Any) -> tuple[Victim, SharedGradient]:
    victim = victim_of(network(seed, classes=CLASSES, scale=2.0), count, **options)
    return victim, victim.share(*images_and_labels(2, 6, count, CLASSES))


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was learnt or tried, in order."""
    calls: list[str] = []

    def watch(name: str, place: Any, attribute: str) -> None:
        real = getattr(place, attribute)
        monkeypatch.setattr(place, attribute, lambda *given: [calls.append(name), real(*given)][1])

    watch("choice", inference, "_choose")
    watch("posterior", LabelPosterior, "learn")
    return calls


def saved(reader: LabelReader) -> dict[str, Any]:
    """Through a checkpoint that may hold nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(reader.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


AUXILIARY = auxiliary_images(3, CLASSES)


@pytest.mark.parametrize("auxiliary", [None, AUXILIARY], ids=["noise", "images"])
@pytest.mark.parametrize("rule", ["posterior", "auto", "mean_feature", "llg_star"])
def test_victims_read_before_make_no_difference(
    rule: str, auxiliary: Auxiliary | None, learnt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_GOOD_ENOUGH", 2.0)
    victim, shared = victims()
    expected = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary, seed=3)
    once = list(learnt)
    learnt.clear()
    reader = LabelReader(rule, auxiliary=auxiliary, seed=3)
    for group in ([5], [0, 2, 1], [5, 3], [4]):
        counts = reader(shared.select(torch.tensor(group)), victim)
        assert counts.rule == expected.rule
        assert torch.equal(counts.counts, expected.counts[group])
        torch.testing.assert_close(counts.scores, expected.scores[group], rtol=1e-3, atol=1e-4)
    assert learnt == once
    again = reader(shared, victim)
    assert torch.equal(again.scores, expected.scores)


@pytest.mark.parametrize("rule", ["posterior", "auto"])
def test_a_checkpoint_keeps_what_was_learnt(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_GOOD_ENOUGH", 2.0)
    victim, shared = victims()
    reader = LabelReader(rule, auxiliary=AUXILIARY)
    with torch.inference_mode():
        expected = reader(shared, victim)
    state = saved(reader)
    for place, attribute in ((inference, "_choose"), (LabelPosterior, "learn")):
        monkeypatch.setattr(place, attribute, lambda *given: pytest.fail("It has learnt anew."))
    resumed = LabelReader(rule, auxiliary=AUXILIARY)
    before = global_random_state()
    resumed.load_state_dict(state)
    found = resumed(shared, victim)
    assert global_random_state() == before
    assert found.rule == expected.rule
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.counts, expected.counts)


def test_the_state_of_a_reader_that_has_not_read() -> None:
    victim, shared = victims()
    reader = LabelReader("posterior")
    reader.load_state_dict(saved(LabelReader("posterior")))
    assert torch.equal(reader(shared, victim).scores, infer_labels(shared, victim, rule="posterior").scores)


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"count": 5}, {"reduction": "sum"}, {"local_steps": 2, "learning_rate": 0.5}],
    ids=["weights", "images", "reduction", "steps"],
)
def test_another_network_is_learnt_about_anew(other: dict[str, Any], learnt: list[str]) -> None:
    reader = LabelReader("posterior", auxiliary=AUXILIARY)
    reader(victims()[1], victims()[0])
    victim, shared = victims(**other)
    found = reader(shared, victim)
    assert learnt == ["posterior"] * 2
    expected = infer_labels(shared, victim, rule="posterior", auxiliary=AUXILIARY)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("other", [{"seed": 1}, {"auxiliary": auxiliary_images(4, CLASSES)}, {"auxiliary": None}])
def test_what_another_reader_learnt_does_not_serve(other: dict[str, Any]) -> None:
    victim, shared = victims()
    reader = LabelReader("posterior", auxiliary=AUXILIARY)
    reader(shared, victim)
    options = {"auxiliary": AUXILIARY} | other
    another = LabelReader("posterior", **options)
    another.load_state_dict(saved(reader))
    expected = infer_labels(shared, victim, rule="posterior", **options)
    assert torch.equal(another(shared, victim).scores, expected.scores)


def test_nothing_is_learnt_where_nothing_need_be(learnt: list[str]) -> None:
    own = victim_of(network(1, classes=CLASSES), 4)
    images, labels = images_and_labels(2, 6, 4, CLASSES)
    LabelReader()(own.share(images, labels, states=own.fresh_states([*range(6)])), own)
    victim, shared = victims(count=1)
    LabelReader()(shared, victim)
    assert learnt == []
