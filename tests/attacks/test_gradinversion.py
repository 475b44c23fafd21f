from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leakage.attacks import GradInversionAttack
from leakage.models import LeNet
from tests.kit import mean_error


def network(training: bool = False) -> nn.Module:
    """With the statistics of the small images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 144, 10)
        )
    return model.train(training)


def test_the_published_protocol_has_the_papers_values() -> None:
    attack = GradInversionAttack()
    assert repr(attack.objective) == (
        "SquaredDistance(relative=False) + 0.0001 * TotalVariation(kind='anisotropic') + 1e-06 * L2() + "
        "0.1 * BatchNormStatistics()"
    )
    images: Any = attack.images
    assert (images.images.std, images.images.box, images.weight) == (1.0, (0, 1), 0.01)
    solver: Any = attack.solver
    assert (solver.lr, solver.steps, solver.schedule, solver.noise) == (0.1, 20_000, "cosine", 0.2)
    assert repr(attack.labels) == "InferredLabels(rule='row_minimum', auxiliary=None, seed=0, correct=False)"


def test_values_are_replaced_one_by_one() -> None:
    attack = GradInversionAttack(total_variation=0.0, l2=0.0, batch_norm=0.0, seeds=1, start_std=0.2, noise=0.0)
    assert repr(attack.objective) == "SquaredDistance(relative=False)"
    assert repr(attack.images) == "Pixels(start='noise', std=0.2, box=(0, 1))"
    images: Any = GradInversionAttack(seeds=3, consistency=0.5).images
    assert (images.seeds, images.weight) == (3, 0.5)


def test_finds_two_images_of_a_victim(kit: Any) -> None:
    victims: dict[str, Any] = {"victims": 3, "images": 2, "labels": "uniform", "model": network(), "seed": 1}
    few, many = (kit.fit(GradInversionAttack(seeds=2, steps=steps), kit.victims(**victims)) for steps in (1, 150))
    assert mean_error(many) < 0.5 * mean_error(few)
    found = kit.by_id(many)
    assert found.images.shape == (3, 2, 1, 12, 12)
    assert 0 <= found.images.min() < found.images.max() <= 1
    assert found.evaluations.tolist() == [150] * 3


def test_a_single_seed_needs_no_group(kit: Any) -> None:
    attack = kit.fit(GradInversionAttack(seeds=1, steps=3), kit.victims(victims=2, model=network()))
    assert attack.finished.evaluations.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "robust"}, r"Expected `protocol` to be one of \['published'\], but got 'robust'"),
        ({"total_variation": -1.0}, "Expected `total_variation` of at least 0, but got -1.0"),
        ({"l2": -1.0}, "Expected `l2` of at least 0, but got -1.0"),
        ({"batch_norm": -1.0}, "Expected `batch_norm` of at least 0, but got -1.0"),
        ({"consistency": -1.0}, "Expected `consistency` of at least 0, but got -1.0"),
        ({"seeds": 0}, "Expected `seeds` to be a whole number of at least 1, but got 0"),
        ({"noise": -1.0}, "Expected `noise` of at least 0, but got -1.0"),
        ({"start_std": 0.0}, "Expected `start_std` to be positive and finite, but got 0.0"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradInversionAttack(**options)


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (LeNet(1, 12), 1, r"a network with BatchNorm in evaluation mode .* but got LeNet without any"),
        (network(training=True), 1, r"a network with BatchNorm in evaluation mode .* Call `model\.eval\(\)`"),
        (network(), 11, r"at most as many images as classes for rule='row_minimum', but got 11 images and 10"),
    ],
    ids=["no BatchNorm", "training mode", "more images than classes"],
)
def test_names_victims_that_it_is_not_for(kit: Any, model: nn.Module, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {message}"):
        kit.fit(GradInversionAttack(steps=2, seeds=2), kit.victims(victims=1, images=images, model=model))


def test_batch_norm_in_training_mode_with_one_value_is_refused(kit: Any) -> None:
    pooled = nn.Sequential(nn.Conv2d(1, 2, 12), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 10))
    with pytest.raises(ValueError, match=r"Expected several values per channel for BatchNorm .* but got one"):
        kit.fit(GradInversionAttack(steps=2), kit.victims(victims=1, model=pooled))


def test_no_memory_for_local_steps_is_told(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakage.inversion.memory.free_memory", lambda device: 10_000)
    victims = kit.victims(victims=2, model=network(), local_steps=8, learning_rate=0.1)
    with pytest.raises(MemoryError, match=r"Expected [\d,]+ bytes of memory for one victim, but got 10,000 bytes"):
        kit.fit(GradInversionAttack(steps=2), victims)
