"""The table of attacks that drives their tests, and small victims: the bundled sample at 12x12 pixels."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from leakage.attacks import DLGAttack, GaussNewtonAttack, GradientInversion, IDLGAttack
from leakage.datamodules import Source, Victims
from leakage.inversion.reconstruction import Reconstruction


@dataclass(frozen=True)
class Case:
    """An attack, and what it can do.

    Attributes:
        kind: the class.
        infers_labels: whether labels are exact from the start, not found by the search.
        needs_linear_last_layer: whether it refuses networks whose logits no linear layer gives.
        needs_cross_entropy: whether it refuses other losses.
        few: evaluations that are too few to end.
        defaults: options of every test.
    """

    kind: type[GradientInversion]
    infers_labels: bool
    needs_linear_last_layer: bool
    needs_cross_entropy: bool
    few: int = 8
    defaults: dict[str, Any] = field(default_factory=dict)

    def attack(self, *arguments: Any, **options: Any) -> GradientInversion:
        """One, with these options."""
        return self.kind(*arguments, **{**self.defaults, **options})

    def __str__(self) -> str:
        return self.kind.__name__


SEARCHES = [
    Case(DLGAttack, infers_labels=False, needs_linear_last_layer=False, needs_cross_entropy=False),
    Case(IDLGAttack, infers_labels=True, needs_linear_last_layer=True, needs_cross_entropy=True),
]
ATTACKS = [
    *SEARCHES,
    Case(
        GaussNewtonAttack,
        infers_labels=True,
        needs_linear_last_layer=True,
        needs_cross_entropy=True,
        few=2,
        # R-GAP leaves nothing to search for. Jacobians of so few unknowns cost less than products with them.
        defaults={"start": "noise", "solver": "cholesky"},
    ),
]


# Attack and protocol are independent of one another.
IN_PAIRS = pytest.mark.parametrize(
    ("lbfgs_case", "protocol"), [(SEARCHES[0], "published"), (SEARCHES[1], "robust")], ids=str
)


@pytest.fixture(params=SEARCHES, ids=str)
def lbfgs_case(request: pytest.FixtureRequest) -> Case:
    """An attack that searches by L-BFGS, in a published protocol and in a robust one."""
    chosen: Case = request.param
    return chosen


@pytest.fixture(params=ATTACKS, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@functools.cache
def small_images() -> TensorDataset:
    """The bundled sample, four ninths of the pixels on each side, so that an attack takes a second."""
    images, labels = zip(*Source("sample").open(), strict=True)
    return TensorDataset(F.interpolate(torch.stack(images), size=(12, 12), mode="area"), torch.tensor(labels))


class SmallVictims(Victims):
    """Victims of the small images."""

    def __init__(self, **options: Any) -> None:
        super().__init__(small_images(), **options)


def fit(
    attack: GradientInversion,
    victims: Any,
    *,
    ckpt_path: str | None = None,
    **options: Any,
) -> GradientInversion:
    """Run an attack with a plain Trainer."""
    options = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    } | options
    Trainer(**options).fit(attack, datamodule=victims, ckpt_path=ckpt_path)
    return attack


def by_id(attack: GradientInversion) -> Reconstruction:
    """All victims in the order of their numbers, each exactly once."""
    finished = attack.finished
    assert sorted(finished.ids.tolist()) == list(range(attack.expected_victims))
    return finished.select(finished.ids.argsort())


def assert_same(one: GradientInversion, other: GradientInversion) -> None:
    """The same results bit for bit."""
    first, second = by_id(one), by_id(other)
    for name, tensor in vars(first).items():
        other_tensor = getattr(second, name)
        assert other_tensor is None if tensor is None else torch.equal(tensor, other_tensor), name


def assert_successful(attack: GradientInversion, victims: int) -> None:
    """Every image found, with its label: what an attack that does nothing can't show."""
    assert sorted(attack.scores) == list(range(victims))
    for score in attack.scores.values():
        assert score.final
        assert score.success == 1.0
        assert score.mse < 2e-4
        assert score.psnr > 35
        assert score.ssim > 0.95
        assert score.label_accuracy == 1.0


def mean_error(attack: GradientInversion) -> float:
    """The mean over victims of the MSE to the truth."""
    return sum(score.mse for score in attack.scores.values()) / len(attack.scores)


def share_one(victims: SmallVictims, victim: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and weights of one victim, captured together with all others as in a run (rounding differs)."""
    victims.setup("fit")
    shared = victims.share(range(victims.victims)).select(torch.tensor([victim]))
    state = {name: tensor[0] if shared.own_weights else tensor for name, tensor in shared.state.items()}
    return {name: tensor[0] for name, tensor in shared.gradients.items()}, state


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What the tests of attacks share."""
    return SimpleNamespace(
        victims=SmallVictims,
        images=small_images,
        fit=fit,
        by_id=by_id,
        assert_same=assert_same,
        assert_successful=assert_successful,
        share_one=share_one,
    )
