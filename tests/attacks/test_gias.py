from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from leakage.attacks import GIASAttack
from leakage.dummies.training import trained_generator
from leakage.models import Generator, LeNet
from tests.dummies.test_training import Small
from tests.kit import mean_error


def test_the_published_protocol_has_the_papers_values() -> None:
    attack = GIASAttack(Generator(), [64])
    assert repr(attack.objective) == "CosineDistance() + 1e-06 * TotalVariation(kind='anisotropic')"
    solver: Any = attack.solver
    images: Any = attack.images
    assert (solver.lr, solver.steps, solver.schedule, attack.hparams["restarts"]) == (3e-2, 5500, "steps", 2)
    assert images.tuning * solver.lr == pytest.approx(1e-3)


@pytest.mark.slow
def test_finds_more_than_the_generator_knew(kit: Any, tmp_path: Path) -> None:
    generator = trained_generator(
        Small(), epochs=30, code_size=8, width=4, learning_rate=3e-3, accelerator="cpu", root=tmp_path, progress=False
    ).model
    victims: dict[str, Any] = {"victims": 3, "model": LeNet(1, 12)}

    def error(steps: int, tuning: float) -> float:
        attack = GIASAttack(generator, [8], steps=steps, tuning=tuning, restarts=0)
        return mean_error(kit.fit(attack, kit.victims(**victims)))

    start, codes, both = error(1, 0.0), error(150, 0.0), error(150, 1.0)
    assert codes < 0.7 * start
    assert both < 0.5 * codes


def test_searches_for_codes_and_weights(kit: Any) -> None:
    options: dict[str, Any] = {"code_shape": [5], "restarts": 0}
    generator = Generator(1, 12, code_size=5, width=2)
    attacks = [kit.fit(GIASAttack(generator, steps=steps, **options), kit.victims(victims=2)) for steps in (1, 40)]
    first, last = map(kit.by_id, attacks)
    assert bool((last.loss < first.loss).all())
    assert 0 <= last.images.min() < last.images.max() <= 1
    assert attacks[1].unknowns["images"].shape[1:] == (5 + sum(p.numel() for p in generator.parameters()),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "robust"}, r"Expected `protocol` to be one of \['published'\], but got 'robust'"),
        ({"total_variation": -1.0}, "Expected `total_variation` of at least 0, but got -1.0"),
        ({"tuning": -1.0}, "Expected `tuning` of at least 0, but got -1.0"),
        ({"lr": 0.0}, "Expected `lr` to be positive and finite, but got 0.0"),
        ({"restarts": -1}, "Expected `restarts` to be a whole number of at least 0, but got -1"),
        ({"generator": 64}, r"Expected `generator` to be a torch\.nn\.Module or a path, but got int"),
        ({"generator": nn.Linear(4, 4), "code_shape": None}, r"Expected `code_shape` as a list of sizes .* got None"),
    ],
    ids=" ".join,
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GIASAttack(**({"generator": Generator(), "code_shape": [64]} | options))


@pytest.mark.parametrize("tuning", [0.0, 0.1])
def test_names_a_generator_of_other_images(kit: Any, tuning: float) -> None:
    message = r"Expected `generator` to make images of the victims' shape \(1, 1, 12, 12\), but got \(1, 1, 28, 28\)"
    with pytest.raises(ValueError, match=message):
        kit.fit(GIASAttack(Generator(), [64], tuning=tuning, steps=2), kit.victims(victims=1))
    with pytest.raises(ValueError, match=r"Expected `generator` to accept codes of shape \(1, 32\)"):
        kit.fit(GIASAttack(Generator(1, 12), [32], tuning=tuning, steps=2), kit.victims(victims=1))
    flat = nn.Sequential(nn.Linear(4, 144), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"shape \(1, 1, 12, 12\), but got \(1, 144\)"):
        kit.fit(GIASAttack(flat, [4], tuning=tuning, steps=2), kit.victims(victims=1))
