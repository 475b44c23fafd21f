"""The result of a victim with several starts: the best of them, or their mean."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.attacks import GradientInversion
from leakage.dummies import JointLabels, Pixels, RevealedLabels
from leakage.inversion.lanes import accumulate
from leakage.solvers import STATUS, Solver, settle
from leakage.solvers.solver import Evaluated

DIVERGED, EXHAUSTED, STARTS = STATUS.index("diverged"), STATUS.index("exhausted"), 3


class Stay(Solver):
    """Ends where it starts, and remembers the points and losses."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def move(self, lanes: dict[str, Tensor], at: Evaluated) -> Tensor:
        self.seen.append((at.point.clone(), at.losses.clone()))
        settle(lanes, torch.ones_like(at.losses, dtype=torch.bool), EXHAUSTED)
        return at.point


def run(
    kit: Any, combine: str, images: int = 1, labels: Any = None, drawn: str | None = None
) -> tuple[Any, Tensor, Tensor]:
    """Return what was found, and the points and losses of all starts: ``(starts, victims, ...)``."""
    torch.manual_seed(0)
    solver = Stay()
    attack = GradientInversion(
        images=Pixels(std=0.3),
        labels=labels or RevealedLabels(),
        solver=solver,
        restarts=STARTS - 1,
        combine=combine,
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    kit.fit(attack, kit.victims(victims=4, images=images, labels=drawn, model=model, reveal_labels=True))
    points, losses = (torch.stack(part) for part in zip(*solver.seen, strict=True))
    return attack.finished, points, losses


def test_the_mean_weighs_each_start_by_its_objective(kit: Any) -> None:
    found, points, losses = run(kit, "mean")
    weights = losses**-2 / (losses**-2).sum(0)
    expected = (weights[:, :, None] * points).sum(0)
    torch.testing.assert_close(found.images.flatten(1), expected)
    torch.testing.assert_close(found.loss, losses.min(0).values)
    assert len(weights) == STARTS
    assert float(weights[1].min()) > 0.01, "the second start counts"
    best = run(kit, "best")[0].images.flatten(1)
    assert torch.equal(best, points[losses.argmin(0), torch.arange(4)])
    assert float((best - expected).abs().max()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_add_up_to_weights_by_inverse_squares_in_any_order(dtype: torch.dtype) -> None:
    given = {3.0: 0, 0.5: 1, 1.0: 2, torch.inf: 3}
    for order in itertools.permutations(given):
        mean, best, weight = torch.zeros(4, dtype=dtype), torch.tensor([torch.inf], dtype=dtype), torch.zeros(1)
        weight = weight.to(dtype)
        for loss in order:
            share, weight = accumulate(torch.tensor([loss], dtype=dtype), best, weight, torch.tensor([True]))
            mean = mean + share * (torch.eye(4, dtype=dtype)[given[loss]] - mean)
            best = best.clamp(max=loss)
        weights = torch.tensor([1 / 9, 4.0, 1.0, 0.0], dtype=dtype)
        torch.testing.assert_close(mean, weights / weights.sum())
        torch.testing.assert_close(weight[0], weights.sum() / 4)


@pytest.mark.parametrize(
    ("loss", "before", "alike", "share"),
    [
        (2.0, 1.0, False, 0.0),
        (1.0, 2.0, False, 1.0),
        (0.0, 1.0, True, 1.0),
        (0.0, 0.0, True, 0.0),
        (-2.0, -1.0, True, 1.0),
        (-1.0, -2.0, True, 0.0),
        (torch.inf, torch.inf, True, 0.0),
    ],
)
def test_the_best_is_kept_where_there_is_no_mean(loss: float, before: float, alike: bool, share: float) -> None:
    found, weight = accumulate(torch.tensor([loss]), torch.tensor([before]), torch.ones(1), torch.tensor([alike]))
    assert found.tolist() == [share]
    assert weight.tolist() == [1.0]


@pytest.mark.parametrize("drawn", ["single-class", "distinct"])
def test_images_of_one_class_are_matched_before_they_are_averaged(kit: Any, drawn: str) -> None:
    """Starts may have these in another order, but not those of different classes."""
    found, points, losses = run(kit, "mean", images=2, drawn=drawn)
    swapped = False
    for victim in range(4):
        images, weight = points[0, victim].view(2, -1), losses[0, victim] ** -2
        for point, loss in zip(points[1:, victim], losses[1:, victim], strict=True):
            orders = [point.view(2, -1)[[*order]] for order in itertools.permutations(range(2))]
            nearest = min(orders, key=lambda other: float((other - images).square().sum()))
            swapped |= nearest is not orders[0]
            chosen = nearest if drawn == "single-class" else orders[0]
            share = loss**-2 / (weight + loss**-2)
            images, weight = images + share * (chosen - images), weight + loss**-2
        torch.testing.assert_close(found.images[victim].flatten(1), images)
    assert swapped, "the order matters"


def test_starts_with_other_labels_are_left_out(kit: Any) -> None:
    found, points, losses = run(kit, "mean", labels=JointLabels())
    pixels = found.images[0].numel()
    classes = points[..., pixels:].argmax(-1)
    for victim in range(4):
        best = int(losses[:, victim].argmin())
        assert int(found.labels[victim]) == int(classes[best, victim])
        alone = (classes[:, victim] == classes[best, victim]).sum() == 1
        same = torch.equal(found.images[victim].flatten(), points[best, victim, :pixels])
        assert same or not alone
    assert len(set(classes.flatten().tolist())) > 1


class Steered(Stay):
    """Steers the objective. Its first start stops at once, its next ones search on."""

    def fresh(self, like: Tensor) -> dict[str, Tensor]:
        return {"steering/fading": torch.zeros(len(like)), "restart": torch.zeros(len(like), dtype=torch.long)}

    def move(self, lanes: dict[str, Tensor], at: Evaluated) -> Tensor:
        settle(lanes, lanes["restart"] == 0, EXHAUSTED)
        return at.point - 0.1 * at.gradient


def test_a_start_that_still_smooths_does_not_count(kit: Any) -> None:
    """Its objective is not yet that of the ended ones."""
    found = []
    for restarts, combine in ((0, "best"), (1, "best"), (1, "mean")):
        torch.manual_seed(0)
        attack = GradientInversion(
            images=Pixels(std=0.3), labels=RevealedLabels(), solver=Steered(), restarts=restarts, combine=combine
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
        kit.fit(attack, kit.victims(victims=2, model=model, reveal_labels=True), max_steps=-1 if not restarts else 60)
        found.append(attack.finished if not restarts else attack.current())
    for stopped in found[1:]:
        assert stopped.restarts.tolist() == [1, 1]
        assert torch.equal(stopped.images, found[0].images)
        assert torch.equal(stopped.loss, found[0].loss)


class Lost(Steered):
    """Steers the objective. Its first start diverges at once, its next ones end at once."""

    def move(self, lanes: dict[str, Tensor], at: Evaluated) -> Tensor:
        settle(lanes, lanes["restart"] == 0, DIVERGED)
        return super(Steered, self).move(lanes, at)


@pytest.mark.parametrize("combine", ["best", "mean"])
def test_a_start_that_diverged_while_it_smooths_gives_way_to_any_other(kit: Any, combine: str) -> None:
    """Its objective is lower here, but is that of an easier problem."""
    torch.manual_seed(0)
    solver = Lost()
    attack = GradientInversion(
        images=Pixels(std=0.3), labels=RevealedLabels(), solver=solver, restarts=1, combine=combine
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    found = kit.fit(attack, kit.victims(victims=2, model=model, reveal_labels=True)).finished
    (_, lost), (points, losses) = solver.seen
    assert bool((lost < losses).all())
    assert torch.equal(found.images.flatten(1), points)
    assert torch.equal(found.loss, losses)


def test_a_bad_choice_is_named() -> None:
    with pytest.raises(ValueError, match=r"Expected `combine` to be one of \[.best., .mean.\], but got .median."):
        GradientInversion(combine="median")
