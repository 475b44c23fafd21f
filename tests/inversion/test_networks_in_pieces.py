"""Pieces that are networks or hold one: they go where the search takes place, and a checkpoint knows them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from leakage.attacks import GradientInversion
from leakage.dummies import LatentCode, Pixels, Start
from leakage.objectives import Distance, Prior, SquaredDistance
from leakage.pieces import stable_repr
from leakage.solvers import LBFGS, GaussNewton, SignedAdam, Solver
from leakage.solvers.solver import EXHAUSTED, settle


class Learnt(nn.Module, Prior):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).square().mean()


class Holds(Prior):
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, images: Tensor) -> Tensor:
        return self.layer(images).square().mean()


class Begins(Start):
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, shared: Any, victim: Any, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        return self.layer(noise).detach()


class Moves(Solver):
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def move(self, lanes: Any, at: Any) -> Tensor:
        settle(lanes, lanes["evaluations"] >= 3, EXHAUSTED)
        return at.point - self.layer(at.gradient).detach()


class Weighted(nn.Module, Distance):
    """The whole objective, with a weight and a buffer of its own."""

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.power, self.weight = power, nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, gradients: Any, shared: Any) -> Tensor:
        parts = [(gradients[name] - shared[name]).abs().pow(self.power).sum() for name in shared]
        return (self.weight * self.scale * torch.stack(parts).sum()).sum()


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 144), nn.Sigmoid(), nn.Unflatten(1, (1, 12, 12)))


@pytest.mark.parametrize(
    ("solver", "precision"),
    [
        (LBFGS(max_evaluations=3), "32-true"),
        (GaussNewton(max_evaluations=2), "64-true"),
        (SignedAdam(steps=3), "64-true"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        lambda: {"objective": SquaredDistance() + 1e-3 * Learnt()},
        lambda: {"objective": SquaredDistance() + 1e-3 * Holds(nn.Linear(12, 1))},
        lambda: {"objective": Weighted()},
        lambda: {"images": LatentCode(generator().double(), [16])},
        lambda: {"images": Pixels(start=Begins(nn.Linear(12, 12)))},
    ],
    ids=["a prior is one", "a prior holds one", "the objective is one", "images", "start"],
)
def test_fits_in_each_precision_and_once_more(kit: Any, options: Any, solver: Any, precision: str) -> None:
    given = options()
    if isinstance(solver, GaussNewton) and "objective" in given:
        pytest.skip("these are no sums of squares")
    check_fits(kit, GradientInversion(solver=solver, **given), precision)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_solver_that_holds_one(kit: Any, precision: str) -> None:
    check_fits(kit, GradientInversion(solver=Moves(nn.Linear(144, 144))), precision)


def check_fits(kit: Any, attack: GradientInversion, precision: str) -> None:
    for _ in range(2):
        found = kit.fit(attack, kit.victims(victims=2), precision=precision)
        assert found.finished.images.dtype == (torch.float64 if precision == "64-true" else torch.float32)
        assert bool(torch.isfinite(found.finished.loss).all())


@pytest.mark.parametrize("prior", [Learnt, lambda: Holds(nn.Linear(12, 1))], ids=["is one", "holds one"])
def test_a_prior_that_is_one_counts(kit: Any, prior: Any) -> None:
    def loss(objective: Any) -> float:
        attack = GradientInversion(objective=objective, solver=LBFGS(max_evaluations=1))
        return float(kit.fit(attack, kit.victims(victims=1)).finished.loss)

    own = prior()
    alone, distance, both = loss(1e-9 * SquaredDistance() + own), loss(SquaredDistance()), loss(SquaredDistance() + own)
    assert alone > 1e-4
    assert both == pytest.approx(distance + alone, rel=1e-4)


def test_an_objective_that_is_one_goes_on_after_a_break(kit: Any, tmp_path: Path) -> None:
    def attack(power: float = 2.0) -> GradientInversion:
        return GradientInversion(objective=Weighted(power), solver=LBFGS(max_evaluations=8))

    saver = ModelCheckpoint(tmp_path, filename="early", every_n_train_steps=4)
    whole = kit.fit(attack(), kit.victims(victims=2), callbacks=[saver], enable_checkpointing=True)
    path = tmp_path / "early.ckpt"
    kit.assert_same(whole, kit.fit(attack(), kit.victims(victims=2), ckpt_path=str(path)))
    with pytest.raises(ValueError, match=r"power=2\.0.*power=4\.0"):
        kit.fit(attack(4.0), kit.victims(victims=2), ckpt_path=str(path))
    # With another number of processes all victims begin anew, under the same objective.
    saved = torch.load(path, weights_only=True)
    saved["leakage"]["processes"] = 2
    for part in (path, path.with_name("early.ckpt.1")):
        torch.save(saved, part)
    anew = kit.fit(attack(), kit.victims(victims=2), ckpt_path=str(path))
    assert anew.objective.weight.tolist() == [2.0]
    kit.assert_same(whole, anew)


def test_is_told_by_its_arguments_and_by_its_weights() -> None:
    one = Weighted()
    assert stable_repr(one) == stable_repr(Weighted())
    assert stable_repr(one) != stable_repr(Weighted(power=3.0))
    assert "power=3.0" in stable_repr(Weighted(power=3.0))
    with torch.no_grad():
        one.weight += 1
    assert stable_repr(one) != stable_repr(Weighted())

    class Plain(Prior, nn.Module):
        """Without a constructor of its own."""

        def __call__(self, images: Tensor) -> Tensor:
            return images.square().mean()

    assert repr(Plain()) == "Plain()"
