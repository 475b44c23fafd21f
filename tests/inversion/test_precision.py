"""Whatever an attack computes is in full precision, also where the user's settings ask for less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn

from leakage import Victim
from leakage.attacks import GradientInversion
from leakage.closed_form import invert_layers, separate_features
from leakage.datamodules import SharedGradients
from leakage.defenses import Clip
from leakage.dummies import LatentCode, Pixels
from leakage.labels import infer_labels
from leakage.metrics import score
from leakage.solvers import LBFGS, GaussNewton, SignedAdam, Solver
from tests.test_precision import assert_full, settings

# Where something looked at the settings since this was last emptied; each look asserts.
seen: list[str] = []


def look(place: str) -> None:
    seen.append(place)
    assert_full()


class Looks(nn.Module):
    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def forward(self, images: Tensor) -> Tensor:
        if running:
            look(self.place)
        return images


# Setting up runs the network and the generator on zeros; that is not looked at.
running: list[bool] = []


class WhileItRuns(Callback):
    def on_train_start(self, *_: Any) -> None:
        running.append(True)


@pytest.fixture(autouse=True)
def _less_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # convolutions have TF32 from the start
    seen.clear()
    yield
    running.clear()
    torch.set_float32_matmul_precision(before)


def looking(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*arguments: Any) -> Tensor:
        look("solver")
        return move(*arguments)

    return wrapped


def victim_of(*, looks: bool = False, **options: Any) -> Victim:
    first = [Looks("network")] if looks else []
    return Victim(nn.Sequential(*first, nn.Flatten(), nn.Linear(16, 5)), image_shape=(1, 4, 4), **options)


def victims(victim: Victim) -> SharedGradients:
    shared = victim.share(torch.rand(3, 1, 1, 4, 4), torch.tensor([[0], [1], [4]]))
    return SharedGradients(shared, victim, lanes=2)


@pytest.mark.parametrize("solver", [LBFGS(max_evaluations=5), GaussNewton(max_evaluations=5), SignedAdam(steps=5)])
def test_a_fit(kit: Any, solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(solver), "move", looking(type(solver).move))
    before = settings()
    attack = GradientInversion(images=Pixels(), solver=solver)
    kit.fit(attack, victims(victim_of(looks=True)), callbacks=[WhileItRuns()])
    assert {*seen} == {"network", "solver"}
    assert settings() == before


def test_images_that_a_generator_writes_for_whoever_asks(kit: Any) -> None:
    generator = nn.Sequential(nn.Linear(3, 16), Looks("generator"), nn.Unflatten(1, (1, 4, 4)))
    attack = GradientInversion(images=LatentCode(generator, [3]), solver=SignedAdam(steps=4))
    before = settings()

    class Asks(WhileItRuns):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.clear()
            assert len(attack.current()) + len(attack.finished) > 0
            assert "generator" in seen or not len(attack.lanes)
            assert settings() == before

    kit.fit(attack, victims(victim_of()), callbacks=[Asks()])
    assert attack.iteration >= 8
    assert settings() == before


def test_a_fit_that_breaks_off(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> Tensor:
        look("solver")
        raise ZeroDivisionError

    monkeypatch.setattr(SignedAdam, "move", breaks)
    before = settings()
    with pytest.raises(ZeroDivisionError):
        kit.fit(GradientInversion(solver=SignedAdam()), victims(victim_of()))
    assert seen == ["solver"]
    assert settings() == before


def closed_form(target: str) -> Callable[[], Any]:
    victim = victim_of(defenses=[Clip(1.0)])
    images, labels = torch.rand(3, 1, 1, 4, 4), torch.tensor([[0], [1], [4]])
    shared = victim.share(images, labels)
    separated = separate_features(shared, victim, labels)
    return {
        "clients.capture.vmap": lambda: victim.share(images, labels),
        "clients.victim.defend": lambda: victim.share(images, labels),
        "labels.inference.last_layer": lambda: infer_labels(shared, victim),
        "closed_form.features.feature_equations": lambda: separate_features(shared, victim, labels),
        "closed_form.layer_by_layer.find_chain": lambda: invert_layers(shared, victim, separated),
        "metrics.scores._ssim": lambda: score(images, labels, images, labels),
    }[target]


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize(
    "target",
    [
        "clients.capture.vmap",
        "clients.victim.defend",
        "labels.inference.last_layer",
        "closed_form.features.feature_equations",
        "closed_form.layer_by_layer.find_chain",
        "metrics.scores._ssim",
    ],
)
def test_without_an_attack(target: str, breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    call = closed_form(target)
    module, _, name = f"leakage.{target}".rpartition(".")
    inner = getattr(import_module(module), name)

    def looks(*arguments: Any, **options: Any) -> Any:
        look(target)
        if breaks:
            raise ZeroDivisionError
        return inner(*arguments, **options)

    monkeypatch.setattr(f"leakage.{target}", looks)
    before = settings()
    if breaks:
        with pytest.raises(ZeroDivisionError):
            call()
    else:
        call()
    assert seen == [target]
    assert settings() == before
