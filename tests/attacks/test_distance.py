"""The distance that an attack lowers is a choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leakage.attacks import DLGAttack, IDLGAttack
from leakage.defenses import Clip
from leakage.objectives import DISTANCES


def test_the_distance_of_the_papers_is_the_default(lbfgs_case: Any, kit: Any) -> None:
    default, named = (
        kit.fit(lbfgs_case.attack(max_evaluations=20, restarts=0, **options), kit.victims(victims=2))
        for options in ({}, {"distance": "squared"})
    )
    kit.assert_same(default, named)
    assert default.hparams["distance"] == "squared"


@pytest.mark.parametrize("attack", [DLGAttack, IDLGAttack])
def test_the_papers_have_no_other_distance(attack: Any) -> None:
    message = "Expected distance='squared' with protocol='published', as in the papers, but got 'cosine'. Use protocol="
    with pytest.raises(ValueError, match=message):
        attack(protocol="published", distance="cosine")


@pytest.mark.parametrize(
    ("protocol", "distance"), [("published", "squared"), *(("robust", distance) for distance in DISTANCES)]
)
def test_an_attack_lowers_the_distance_it_is_given(kit: Any, distance: str, protocol: str) -> None:
    def attack(evaluations: int) -> IDLGAttack:
        options: dict[str, Any] = {"protocol": protocol, "distance": distance, "restarts": 0}
        found: IDLGAttack = kit.fit(IDLGAttack(max_evaluations=evaluations, **options), kit.victims(victims=3))
        return found

    found = [kit.by_id(attack(evaluations)) for evaluations in (1, 60)]
    # The papers' search has no safeguard: a victim may diverge.
    assert (found[1].loss < 0.3 * found[0].loss).sum() >= (3 if protocol == "robust" else 2)
    # What is reported is the distance between gradients; only the squared one is relative, and only if robust.
    victims = kit.victims(victims=3)
    victims.setup("fit")
    for victim in range(3):
        shared, state = kit.share_one(victims, victim)
        images, labels = found[1].images[victim], found[1].labels[victim]
        targets = torch.nn.functional.one_hot(labels, victims.victim.protocol.num_classes).float()
        loss = DISTANCES[distance]()(victims.victim.gradients(state, images, targets), shared)
        if distance == "squared" and protocol == "robust":
            loss = loss / sum(tensor.square().sum() for tensor in shared.values())
        torch.testing.assert_close(found[1].loss[victim], loss.detach(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("distance", ["cosine", "row_cosine"])
def test_images_come_nearer_by_the_angle_alone(kit: Any, distance: str) -> None:
    errors = []
    for evaluations in (1, 200):
        attack = kit.fit(IDLGAttack(max_evaluations=evaluations, restarts=0, distance=distance), kit.victims(victims=3))
        errors.append(sum(score.mse for score in attack.scores.values()))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.filterwarnings("ignore:The clients defend")
@pytest.mark.parametrize("norm", [0.1, 1.0])
def test_clipping_hides_nothing_from_the_angle_and_all_from_the_naive_difference(kit: Any, norm: float) -> None:
    found = {}
    for distance, adaptive in (("squared", False), ("squared", True), ("cosine", False)):
        attack = IDLGAttack(max_evaluations=600, restarts=0, distance=distance, adaptive=adaptive)
        kit.fit(attack, kit.victims(victims=3, defenses=[Clip(norm)]))
        found[distance, adaptive] = [score.success for score in attack.scores.values()]
    assert found == {("squared", False): [0.0] * 3, ("squared", True): [1.0] * 3, ("cosine", False): [1.0] * 3}


def test_names_an_unknown_distance(lbfgs_case: Any) -> None:
    message = r"Expected `distance` to be one of \['cosine', 'row_cosine', 'squared'\], but got 'l1'"
    with pytest.raises(ValueError, match=message):
        lbfgs_case.attack(distance="l1")
