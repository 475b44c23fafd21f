"""Attacks on networks with many classes: the gradient of the last layer in few numbers, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from leakage import LeNet
from leakage.attacks import DLGAttack, GaussNewtonAttack, GradientInversion, IDLGAttack
from leakage.clients import low_rank
from leakage.datamodules import SharedGradients
from leakage.dummies import Pixels
from leakage.inversion.lanes import Lanes
from leakage.objectives import CosineDistance, Distance, TotalVariation
from leakage.solvers import LBFGS, SignedAdam

CLASSES = 300
WEIGHT = "classifier.weight"


def victims(kit: Any, **options: Any) -> Any:
    return kit.victims(**{"victims": 3, "model": LeNet(1, 12, CLASSES)} | options)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the last layer's gradient at each evaluation."""
    shapes: list[torch.Size] = []
    evaluate = Lanes.evaluate

    def noted(lanes: Lanes) -> torch.Tensor:
        assert lanes.shared is not None
        shapes.append(lanes.shared.gradients[WEIGHT].shape)
        return evaluate(lanes)

    monkeypatch.setattr(Lanes, "evaluate", noted)
    return shapes


@pytest.mark.parametrize(
    "attack",
    [
        lambda: DLGAttack(),
        lambda: GaussNewtonAttack(start="noise", solver="cg"),
        lambda: GaussNewtonAttack(start="noise", solver="cholesky"),
        lambda: GradientInversion(objective=CosineDistance(), solver=LBFGS(max_evaluations=400, tolerance=1e-8)),
    ],
    ids=["DLG", "GN-cg", "GN-cholesky", "cosine"],
)
def test_finds_what_the_whole_gradient_tells(
    kit: Any, attack: Any, evaluated: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_LARGE", 10_000)
    few = kit.fit(attack(), victims(kit))
    assert {shape[1] for shape in evaluated} == {1}
    evaluated.clear()
    monkeypatch.setattr(low_rank, "_LARGE", 10**9)
    whole = kit.fit(attack(), victims(kit))
    assert {shape[1] for shape in evaluated} == {CLASSES}
    for run in (few, whole):
        kit.assert_successful(run, 3)


def test_finds_batches(kit: Any, evaluated: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_LARGE", 10_000)
    run = kit.fit(IDLGAttack(), victims(kit, images=2, reveal_labels=True))
    assert {shape[1] for shape in evaluated} == {2}
    assert sum(score.success == 1 for score in run.scores.values()) >= 2


def test_a_run_goes_on_bit_for_bit(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_LARGE", 10_000)
    every = ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1, filename="{step}")
    options: dict[str, Any] = {"victims": 4, "lanes": 2, "model": LeNet(1, 12, CLASSES)}

    def attack() -> GradientInversion:
        return IDLGAttack(max_evaluations=50, restarts=1)

    whole = kit.fit(attack(), victims(kit, **options), enable_checkpointing=True, callbacks=[every])
    for step in (20, 60):
        path = tmp_path / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)["leakage"]["lanes"]["shared"]
        assert saved["gradients"][WEIGHT].shape[1] == 1
        resumed = kit.fit(attack(), victims(kit, **options), ckpt_path=str(path))
        kit.assert_same(whole, resumed)


class Largest(Distance):
    """One that is another in other coordinates."""

    def __call__(self, gradients: Any, shared: Any) -> torch.Tensor:
        return torch.stack([(gradients[name] - shared[name]).square().max() for name in shared]).max()


def test_a_distance_that_knows_coordinates_has_the_whole_gradient(
    kit: Any, evaluated: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_LARGE", 10_000)
    solver = SignedAdam(lr=0.1, steps=3)
    kit.fit(GradientInversion(objective=Largest() + TotalVariation(), solver=solver), victims(kit))
    assert {shape[1] for shape in evaluated} == {CLASSES}
    evaluated.clear()
    kit.fit(GradientInversion(objective=CosineDistance() + TotalVariation(), solver=solver), victims(kit))
    assert {shape[1] for shape in evaluated} == {1}


def test_gradients_that_are_not_what_the_protocol_says_are_taken_whole(
    kit: Any, evaluated: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_LARGE", 10_000)
    data = victims(kit)
    data.setup("fit")
    shared = data.share(range(3))
    for noise, rank in ((0.0, 1), (1e-3, CLASSES)):
        gradient = shared.gradients[WEIGHT]
        shared.gradients[WEIGHT] = gradient + noise * gradient.norm() * torch.randn(gradient.shape) / 100
        evaluated.clear()
        kit.fit(IDLGAttack(max_evaluations=2, restarts=0), SharedGradients(shared, data.victim))
        assert {shape[1] for shape in evaluated} == {rank}


def test_a_network_that_is_no_chain(kit: Any, evaluated: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd differentiates twice, through what the last layer takes and what it is told."""
    monkeypatch.setattr(low_rank, "_LARGE", 10_000)

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 12, 5, 2, 2), nn.Conv2d(1, 12, 5, 2, 2)
            self.classifier = nn.Linear(12 * 36, CLASSES)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.classifier((self.one(images).sigmoid() + self.two(images).tanh()).flatten(1))

    attack = GradientInversion(images=Pixels(), solver=LBFGS(max_evaluations=300))
    run = kit.fit(attack, victims(kit, model=Branched()))
    assert {shape[1] for shape in evaluated} == {1}
    kit.assert_successful(run, 3)
