"""Several sets of images for one victim: registration, and their objective, against plain computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.attacks import GradientInversion
from leakage.dummies import Group, JointLabels, LatentCode, Pixels
from leakage.dummies.group import registered
from leakage.objectives import BatchNormStatistics, SquaredDistance, TotalVariation
from leakage.solvers import LBFGS, Adam, GaussNewton


def smooth(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.avg_pool2d(noise.flatten(0, -4), 3, stride=1, padding=1).view(shape)


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_registers_by_the_shift_that_brings_each_nearest_to_the_mean(size: tuple[int, int]) -> None:
    """Against all shifts, one after the other."""
    images = smooth(4, 3, 2, *size) + torch.linspace(0, 1, size[1])
    images[1] = images[1].roll((2, -1), (-2, -1))
    mean, found = images.mean(0), registered(images)
    moved = 0
    for version in range(4):
        for place in range(3):
            shifts = [(down, right) for down in range(size[0]) for right in range(size[1])]
            tried = [images[version, place].roll(shift, (-2, -1)) for shift in shifts]
            errors = torch.stack([(image - mean[place]).square().sum() for image in tried])
            assert torch.equal(found[version, place], tried[int(errors.argmin())])
            moved += int(errors.argmin()) != 0
    assert moved > 2, "else nothing was tried"


def test_images_that_have_nothing_in_common_stay_where_they_are() -> None:
    images = torch.randn(5, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(registered(images), images)


def batch_norm_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 144, 10)
        ).eval()


def plain_objective(model: nn.Module, images: Tensor, label: Tensor, shared: dict[str, Tensor], wanted: bool) -> Tensor:
    """Of one set: squared distance, batch-norm statistics and total variation by plain autograd."""
    maps = model[0](images)
    loss = F.cross_entropy(model(images), label)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=wanted)
    names = [name for name, _ in model.named_parameters()]
    distance = sum((g - shared[name]).square().sum() for name, g in zip(names, gradients, strict=True))
    norm = model[1]
    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=0)
    statistics = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()
    variation = images.diff(dim=-2).abs().mean() + images.diff(dim=-1).abs().mean()
    total: Tensor = distance + 0.1 * statistics + 0.01 * variation
    return total


def test_the_objective_is_the_mean_of_all_sets_and_their_distance_to_the_registered_mean(kit: Any) -> None:
    """And the images are those of the set with the lowest objective of its own."""
    model = batch_norm_network()
    objective = SquaredDistance(relative=False) + 0.1 * BatchNormStatistics() + 0.01 * TotalVariation()
    attack = GradientInversion(
        objective=objective, images=Group(Pixels(std=0.3, box=(0, 1)), seeds=4, weight=0.5), solver=Adam(steps=6)
    )
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    evaluate = GradientInversion._step

    def step(self: Any) -> None:
        before = self.unknowns["images"].detach().clone()
        evaluate(self)
        seen.append((before, self.unknowns["images"].grad.clone(), self.lanes.optimizer.best_loss.clone()))

    victims = kit.victims(victims=3, model=model, weights="shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientInversion, "_step", step)
        kit.fit(attack, victims, precision="64-true")
    victims.setup("fit")
    found = kit.by_id(attack)
    model = model.double()
    for victim in range(3):
        shared = {name: tensor.double() for name, tensor in kit.share_one(victims, victim)[0].items()}
        label, losses = found.labels[victim], []
        for before, gradient, _ in seen:
            sets = before[victim].double().requires_grad_()
            each = torch.stack([plain_objective(model, images, label, shared, True) for images in sets])
            common = registered(sets.detach()).mean(0)
            total = each.mean() + 0.5 * (sets - common).square().mean()
            losses.append(float(total.detach()))
            expected = torch.autograd.grad(total, sets)[0]
            torch.testing.assert_close(gradient[victim].double(), expected, rtol=1e-4, atol=1e-6)
        assert float(seen[-1][2][victim]) == pytest.approx(min(losses), rel=1e-5)
        best = seen[losses.index(min(losses))][0][victim].double()
        own = torch.stack([plain_objective(model, images, label, shared, False).detach() for images in best])
        torch.testing.assert_close(found.images[victim].double(), best[own.argmin()], rtol=0, atol=1e-6)


def test_sets_that_know_one_another_end_nearer_together(kit: Any) -> None:
    def spread(weight: float) -> Tensor:
        images = Group(Pixels(std=0.3), seeds=3, weight=weight)
        attack = GradientInversion(images=images, solver=Adam(steps=60))
        ends: list[Tensor] = []
        evaluate = GradientInversion._step

        def step(self: Any) -> None:
            evaluate(self)
            ends.append(self.unknowns["images"].detach().clone())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GradientInversion, "_step", step)
            kit.fit(attack, kit.victims(victims=2))
        return ends[-1].std(dim=1).mean((1, 2, 3, 4))

    assert bool((spread(1e3) < 0.3 * spread(0.0)).all())


def test_goes_on_bit_for_bit_and_together_with_labels(kit: Any, tmp_path: Path) -> None:
    def attack() -> GradientInversion:
        return GradientInversion(
            images=Group(Pixels(std=0.3, box=(0, 1)), seeds=2),
            labels=JointLabels(),
            solver=Adam(steps=16, noise=0.1),
            restarts=1,
        )

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    victims: dict[str, Any] = {"victims": 3, "lanes": 2}
    whole = kit.fit(attack(), kit.victims(**victims), callbacks=[saver], enable_checkpointing=True)
    assert whole.finished.images.shape == (3, 1, 1, 12, 12)
    for step in (10, 20):
        resumed = kit.fit(attack(), kit.victims(**victims), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        kit.assert_same(whole, resumed)


def test_the_first_set_starts_where_the_layers_lead(kit: Any) -> None:
    attack = GradientInversion(images=Group(Pixels(start="auto"), seeds=2), solver=LBFGS(max_evaluations=1))
    kit.assert_successful(kit.fit(attack, kit.victims(victims=2)), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"images": LatentCode(nn.Linear(3, 4), [3])},
            r"Expected `images` to be leakage\.dummies\.Pixels, but got Lat",
        ),
        ({"seeds": 1}, "Expected `seeds` to be a whole number of at least 2, but got 1"),
        ({"weight": -1.0}, "Expected `weight` of at least 0, but got -1.0"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Group(**({"images": Pixels(), "seeds": 3} | options))


def test_second_order_takes_no_group(kit: Any) -> None:
    attack = GradientInversion(images=Group(Pixels(), seeds=2), solver=GaussNewton())
    with pytest.raises(ValueError, match="an objective that is a sum of squ"):
        kit.fit(attack, kit.victims(victims=1))
