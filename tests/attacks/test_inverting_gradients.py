from __future__ import annotations

from typing import Any

import pytest
import torch

from leakage.attacks import ContinuationAttack, InvertingGradientsAttack
from leakage.clients.victim import Victim
from leakage.datamodules import SharedGradients
from leakage.models import ConvNet


def test_the_published_protocol_has_the_papers_values() -> None:
    for attack in (InvertingGradientsAttack(), InvertingGradientsAttack(protocol="published")):
        assert repr(attack.objective) == "CosineDistance() + 0.01 * TotalVariation(kind='anisotropic')"
        assert repr(attack.images) == "Pixels(start='noise', std=1.0, box=(0, 1))"
        solver: Any = attack.solver
        assert (solver.lr, solver.steps, solver.schedule, solver.noise) == (0.1, 4800, "steps", 0.0)


def test_values_are_replaced_one_by_one() -> None:
    attack = InvertingGradientsAttack(total_variation=0.0, lr=0.05, steps=7, start_std=0.5)
    solver: Any = attack.solver
    assert (repr(attack.objective), solver.lr, solver.steps) == ("CosineDistance()", 0.05, 7)
    with_features = InvertingGradientsAttack(total_variation=0.0, features=1.0)
    assert repr(with_features.objective) == "CosineDistance() + FeatureDistance(required=False)"
    assert repr(attack.images) == "Pixels(start='noise', std=0.5, box=(0, 1))"


def test_continuation_finds_more_for_less_work(kit: Any) -> None:
    """On a small network with ReLU and max pooling, whose kinks the published search is caught in."""
    torch.manual_seed(0)
    model = ConvNet(1, 12, 10, width=8, depth=2, norm="none", pooling="max").eval()
    victim = Victim(model, image_shape=(1, 12, 12))
    side = torch.linspace(0, 3, 12)
    images = torch.stack(
        [(side[:, None] * a + side * b).sin() / 2 + 0.5 for a, b in ((1.0, 2.0), (2.0, -1.0), (0.5, 1.5), (3.0, 0.0))]
    )
    shared = victim.share(images[:, None, None], torch.tensor([[3], [7], [0], [1]]))
    mse = {}
    continued: Any = ContinuationAttack(max_evaluations=21, start_steps=60, restarts=0)
    continued.solver.finish.max_evaluations = 2
    attacks: dict[str, Any] = {"published": InvertingGradientsAttack(steps=200), "continuation": continued}
    for name, attack in attacks.items():
        kit.fit(attack, SharedGradients(shared, victim))
        found = attack.finished.images[attack.finished.ids.argsort()][:, 0]
        mse[name] = (found[:, 0] - images).square().mean()
        assert bool(((found >= 0) & (found <= 1)).all())
    assert mse["continuation"] < mse["published"] / 2, mse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "robust"}, r"Expected `protocol` to be one of \['published'\], but got 'robust'"),
        ({"total_variation": -1.0}, "Expected `total_variation` of at least 0, but got -1.0"),
        ({"features": -1.0}, "Expected `features` of at least 0, but got -1.0"),
        ({"start_std": 0.0}, "Expected `start_std` to be positive and finite, but got 0.0"),
        ({"steps": 0}, "Expected `steps` to be a whole number of at least 1, but got 0"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InvertingGradientsAttack(**options)
