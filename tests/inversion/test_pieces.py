"""Attacks made of pieces: each with a result that an attack that does nothing fails."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

import leakage.attacks
from leakage.attacks import GradientInversion, IDLGAttack, InvertingGradientsAttack
from leakage.clients.victim import Victim
from leakage.datamodules import SharedGradients
from leakage.defenses import Clip, GaussianNoise
from leakage.dummies import Images, InferredLabels, JointLabels, LatentCode, Pixels, RevealedLabels
from leakage.models import LeNet
from leakage.objectives import (
    L2,
    ActivationPrior,
    BatchNormStatistics,
    CosineDistance,
    Distance,
    Prior,
    SquaredDistance,
    TotalVariation,
)
from leakage.solvers import LBFGS, STATUS, Adam, Continuation, GaussNewton, SignedAdam, Solver, settle
from tests.kit import mean_error

EXHAUSTED = STATUS.index("exhausted")


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LeNet(1, 12)


# A prior, a distance, a solver and a way to write images of one's own: an object with a method or two each.


class Smooth(Prior):
    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    def __call__(self, images: Tensor) -> Tensor:
        return (images[..., 1:] - images[..., :-1]).abs().pow(self.power).mean()


class Manhattan(Distance):
    def __call__(self, gradients: Any, shared: Any) -> Tensor:
        return torch.stack([(gradients[name] - shared[name]).abs().sum() for name in shared]).sum()


class Momentum(Solver):
    def __init__(self, lr: float, steps: int) -> None:
        self.lr, self.steps = lr, steps

    def fresh(self, like: Tensor) -> dict[str, Tensor]:
        return {"velocity": torch.zeros_like(like)}

    def move(self, lanes: Any, at: Any) -> Tensor:
        lanes["iterations"] += 1
        settle(lanes, lanes["evaluations"] >= self.steps, EXHAUSTED)
        lanes["velocity"] = 0.9 * lanes["velocity"] + at.gradient / at.gradient.norm(dim=1, keepdim=True)
        return at.point - self.lr * lanes["velocity"]


class Halves(Images):
    """Images whose two halves are the same."""

    def shape(self, protocol: Any) -> tuple[int, ...]:
        channels, height, width = protocol.image_shape
        return (protocol.num_images, channels, height, width // 2)

    def write(self, unknown: Any, kept: Any) -> Tensor:
        return torch.cat([unknown, unknown], dim=-1)


class Nowhere(ActivationPrior):
    """On a module that is not there."""

    def watched(self, victim: Any) -> list[str]:
        return ["nowhere"]

    def __call__(self, activations: Any, state: Any) -> Tensor:
        return activations["nowhere"].outputs.square().mean()


def test_a_prior_of_ones_own_has_ten_lines_at_most() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in classes}
    for name, most in (("Smooth", 10), ("Manhattan", 10), ("Momentum", 20)):
        assert lengths[name] <= most, name


def test_a_prior_of_ones_own_makes_images_smooth(kit: Any) -> None:
    def roughness(objective: Any) -> float:
        solver = LBFGS(max_evaluations=60)
        attack = kit.fit(GradientInversion(objective=objective, solver=solver), kit.victims(victims=4))
        return float(attack.finished.images.diff(dim=-1).square().mean())

    assert roughness(SquaredDistance() + 10.0 * Smooth()) < 0.2 * roughness(SquaredDistance())


def test_a_distance_a_solver_and_images_of_ones_own(kit: Any) -> None:
    solver = Momentum(lr=0.02, steps=150)
    start = kit.fit(GradientInversion(objective=Manhattan(), solver=Momentum(0.02, 1)), kit.victims(victims=3))
    found = kit.fit(GradientInversion(objective=Manhattan(), solver=solver), kit.victims(victims=3))
    assert found.finished.evaluations.tolist() == [150] * 3
    assert bool((found.finished.loss < 0.3 * start.finished.loss).all())
    attacks = [GradientInversion(images=Halves(), solver=LBFGS(max_evaluations=count)) for count in (1, 8)]
    first, halves = (kit.by_id(kit.fit(attack, kit.victims(victims=2))) for attack in attacks)
    assert torch.equal(halves.images[..., :6], halves.images[..., 6:])
    # Strictly: few garments have two halves that are the same, so that it is not by much.
    assert bool((halves.loss < first.loss).all())


@pytest.mark.slow
def test_inverting_gradients_finds_images_in_their_box(kit: Any) -> None:
    nothing = kit.fit(InvertingGradientsAttack(steps=1), kit.victims(victims=4))
    attack = kit.fit(InvertingGradientsAttack(steps=250), kit.victims(victims=4))
    assert mean_error(attack) < 0.1 * mean_error(nothing)
    images = attack.finished.images
    assert 0 <= images.min() < images.max() <= 1
    assert all(score.label_accuracy == 1 for score in attack.scores.values())
    assert {STATUS[status] for status in attack.finished.status.tolist()} == {"exhausted"}


def test_presets_are_one_short_file_each_and_have_no_loop() -> None:
    folder = Path(leakage.attacks.__file__).parent
    longer = {"gauss_newton", "gradinversion", "gias", "inverting_gradients"}  # which have more options
    for name in ("dlg", "idlg", "rgap", *longer):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert not any(isinstance(node, ast.For | ast.While) for node in ast.walk(tree)), name
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        words = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)]
        code = len(text.splitlines()) - sum(len(doc.splitlines()) for doc in words if doc)
        assert code < (100 if name in longer else 60), (name, code)


def batch_norm_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 144, 10)
        )
        model.train()
        return model


@pytest.mark.slow
def test_batch_norm_statistics_come_nearer_to_those_of_the_training_set(kit: Any) -> None:
    model = batch_norm_network()
    images = torch.stack([kit.images()[index][0] for index in range(0, 1000, 3)])
    for _ in range(30):
        model(images)
    model.eval()

    def statistics(weight: float) -> float:
        objective = SquaredDistance() + weight * BatchNormStatistics() if weight else SquaredDistance()
        attack = GradientInversion(objective=objective, solver=LBFGS(max_evaluations=25))
        found = kit.fit(attack, kit.victims(victims=2, model=model)).finished.images
        with torch.no_grad():
            maps = model[0](found[:, 0])
        return float((maps.mean((2, 3)) - model[1].running_mean).square().sum(1).mean())

    assert statistics(1.0) < 0.3 * statistics(0.0)


def test_an_attack_from_memory_finds_what_one_on_images_finds(kit: Any) -> None:
    victims = kit.victims(victims=4, model=small_network())
    victims.setup("fit")
    shared = victims.share(range(4))
    attack = kit.fit(IDLGAttack(), SharedGradients(shared, victims.victim))
    assert attack.scores == {}, "no ground truth"
    truth = next(iter(victims.val_dataloader()))
    assert bool(((attack.finished.images - truth.images).square().flatten(1).mean(1) < 1e-3).all())
    assert torch.equal(attack.finished.labels, truth.labels)


@pytest.mark.filterwarnings("ignore:The clients defend")
def test_noise_on_the_gradient_shows_in_the_images(kit: Any) -> None:
    def run(*defenses: Any) -> GradientInversion:
        victims = kit.victims(victims=4, model=small_network(), defenses=defenses)
        found: GradientInversion = kit.fit(IDLGAttack(restarts=0, max_evaluations=300), victims)
        return found

    assert mean_error(run(GaussianNoise(0.5, relative=True))) > 10 * mean_error(run())


@pytest.mark.parametrize("labels", [RevealedLabels(), InferredLabels(), JointLabels()], ids=repr)
@pytest.mark.parametrize(
    "solver", [LBFGS(), GaussNewton(max_step=1.0, solver="cholesky")], ids=["LBFGS", "GaussNewton"]
)
def test_labels_and_solvers_go_together(kit: Any, labels: Any, solver: Any) -> None:
    attack = GradientInversion(labels=labels, solver=solver, restarts=2, restart_above=1e-6)
    kit.assert_successful(kit.fit(attack, kit.victims(victims=3, reveal_labels=True)), 3)


def test_restarts_of_searches_without_an_end_keep_the_best(kit: Any) -> None:
    runs = [
        kit.fit(InvertingGradientsAttack(steps=20, restarts=restarts), kit.victims(victims=3)).finished
        for restarts in (0, 2)
    ]
    assert runs[1].restarts.tolist() == [2] * 3
    assert runs[1].evaluations.tolist() == [60] * 3
    assert bool((runs[1].loss <= runs[0].loss).all())


class Steered(Momentum):
    """Tells the objective how sharp and how strong its priors are."""

    def __init__(self, sharpness: float, fading: float) -> None:
        super().__init__(0.05, 10)
        self.sharpness, self.fading = sharpness, fading

    def fresh(self, like: Tensor) -> dict[str, Tensor]:
        steering = {"sharpness": self.sharpness, "fading": self.fading}
        return super().fresh(like) | {
            f"steering/{name}": torch.full_like(like[:, 0], value) for name, value in steering.items()
        }


def test_a_solver_steers_the_network_and_the_priors(kit: Any) -> None:
    kinked = nn.Sequential(nn.Flatten(), nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 10))

    def images(solver: Any, weight: float) -> Tensor:
        attack = GradientInversion(objective=SquaredDistance() + weight * L2(), labels=RevealedLabels(), solver=solver)
        victims = kit.victims(victims=3, model=kinked, reveal_labels=True)
        found: Tensor = kit.by_id(kit.fit(attack, victims, precision="64-true")).images
        return found

    plain = images(Momentum(0.05, 10), 0.3)
    torch.testing.assert_close(images(Steered(1e12, 1.0), 0.3), plain)
    torch.testing.assert_close(images(Steered(1e12, 0.5), 0.6), plain)
    assert float((images(Steered(1e12, 0.5), 0.3) - plain).abs().max()) > 1e-4
    assert float((images(Steered(1.0, 1.0), 0.3) - plain).abs().max()) > 1e-4


@pytest.mark.parametrize(
    "attack",
    [
        lambda: InvertingGradientsAttack(steps=15, restarts=1),
        lambda: GradientInversion(
            objective=CosineDistance() + 0.2 * TotalVariation("smooth"),
            solver=Continuation(solver=GaussNewton(max_evaluations=7, solver="cg", max_products=5), levels=3),
        ),
        lambda: GradientInversion(
            objective=SquaredDistance() + 1e-3 * TotalVariation() + 1e-3 * L2(),
            labels=JointLabels(),
            solver=LBFGS(max_evaluations=15),
        ),
        lambda: GradientInversion(objective=Manhattan() + 0.1 * Smooth(1.5), solver=Momentum(0.05, 20)),
        lambda: GradientInversion(solver=Adam(steps=8, noise=0.3), restarts=1, combine="mean"),
        lambda: GradientInversion(
            images=LatentCode(nn.Sequential(nn.Linear(5, 144), nn.Unflatten(1, (1, 12, 12))), [5]),
            solver=SignedAdam(steps=15),
        ),
    ],
    ids=["InvertingGradients", "levels", "sum", "own", "noise", "latent"],
)
def test_a_run_of_pieces_goes_on_bit_for_bit(kit: Any, attack: Any, tmp_path: Path) -> None:
    def seeded() -> GradientInversion:
        torch.manual_seed(5)
        made: GradientInversion = attack()
        return made

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    whole = kit.fit(seeded(), kit.victims(victims=4, lanes=3), callbacks=[saver], enable_checkpointing=True)
    assert json.loads(json.dumps(dict(whole.hparams))) == dict(whole.hparams)
    resumed = kit.fit(seeded(), kit.victims(victims=4, lanes=3), ckpt_path=str(tmp_path / "step=12.ckpt"))
    kit.assert_same(whole, resumed)
    torch.load(tmp_path / "step=12.ckpt", weights_only=True)


def test_noise_is_of_a_victim_and_a_restart_whatever_the_lanes(kit: Any) -> None:
    """But for rounding, within a few steps; the noise is a thousand times that."""

    def images(seed: int, lanes: int, noise: float = 0.3) -> Tensor:
        attack = GradientInversion(solver=Adam(steps=8, noise=noise), restarts=1, seed=seed, combine="mean")
        return kit.by_id(kit.fit(attack, kit.victims(victims=5, lanes=lanes), precision="64-true")).images

    one = images(0, 1)
    for lanes in (2, 5):
        torch.testing.assert_close(images(0, lanes), one, rtol=0, atol=1e-4)
    assert bool(((images(0, 5, 0.0) - one).abs().amax((1, 2, 3, 4)) > 1e-2).all())
    assert bool(((images(1, 5) - one).abs().amax((1, 2, 3, 4)) > 1e-2).all())


def test_a_checkpoint_of_other_pieces_is_refused(kit: Any, tmp_path: Path) -> None:
    def run(weight: float, checkpoint: str | None = None) -> Any:
        attack = GradientInversion(objective=CosineDistance() + weight * TotalVariation(), solver=SignedAdam(steps=20))
        saver = ModelCheckpoint(tmp_path, filename="early", every_n_train_steps=5)
        return kit.fit(
            attack, kit.victims(victims=2), ckpt_path=checkpoint, callbacks=[saver], enable_checkpointing=True
        )

    run(0.1)
    with pytest.raises(
        ValueError, match=r"the configuration of the checkpoint.* objective=.*0\.1 \* Total.*0\.2 \* Tot"
    ):
        run(0.2, str(tmp_path / "early.ckpt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "squared"}, "Expected `objective` to be a leakage.objectives.Term, but got 'squared'"),
        ({"images": JointLabels()}, "Expected `images` to be a leakage.dummies.Images, but got JointLabels"),
        ({"solver": torch.optim.Adam}, "Expected `solver` to be a leakage.solvers.Solver, but got"),
        ({"objective": 0 * SquaredDistance()}, "Expected `objective` to have a term with a nonzero weight"),
        ({"restart_above": -1.0}, "Expected `restart_above` of at least 0, but got -1.0"),
    ],
)
def test_names_a_piece_of_another_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientInversion(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": CosineDistance() + TotalVariation(), "solver": GaussNewton()},
            "an objective that is a sum of squ",
        ),
        ({"labels": RevealedLabels()}, r"reveal their labels \(reveal_labels=True\) for RevealedLabels"),
        ({"objective": SquaredDistance() + BatchNormStatistics()}, "a network with BatchNorm in evaluation mode"),
        ({"images": LatentCode(nn.Linear(3, 4), [3])}, r"of the victims' shape \(1, 1, 12, 12\), but got \(1, 4\)"),
        ({"objective": SquaredDistance() + Nowhere()}, r"`modules` to name modules .* such as \[.*but got 'nowhere'"),
        ({"images": LatentCode(nn.Linear(9, 4), [3])}, r"accept codes of shape \(1, 3\)"),
        (
            {"images": Pixels(start="rgap"), "labels": JointLabels()},
            "start='auto', 'noise' or 'grey' with labels that are searched",
        ),
    ],
)
def test_names_pieces_that_do_not_fit_the_victims(kit: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kit.fit(GradientInversion(**options), kit.victims(victims=2))


def test_labels_that_are_searched_for_need_a_loss_without_class_weights(kit: Any) -> None:
    with pytest.raises(ValueError, match="Expected a loss without `class_weights` for JointLabels"):
        kit.fit(GradientInversion(labels=JointLabels()), kit.victims(victims=2, class_weights=(1.0,) * 10))


def test_second_order_takes_priors_that_are_sums_of_squares(kit: Any) -> None:
    objective = SquaredDistance() + 1e-9 * L2() + 1e-9 * TotalVariation("squared")
    solver = GaussNewton(max_step=1.0, tolerance=1e-8)
    attack = GradientInversion(objective=objective, images=Pixels(start="noise"), solver=solver)
    kit.assert_successful(kit.fit(attack, kit.victims(victims=3)), 3)


# Pieces of one's own, and what they may do.


class Recalls(Prior):
    """Keeps something of each victim, and has a value of its own."""

    def __init__(self, tells: bool = True) -> None:
        self.tells = tells

    def __call__(self, images: Tensor) -> Tensor:
        return 0 * images.sum()

    def state(self, victim: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"unit": torch.empty(0, *victim.protocol.image_shape, dtype=dtype)} if self.tells else {}

    def begin(self, shared: Any, victim: Any) -> dict[str, Tensor]:
        like = next(iter(shared.gradients.values()))
        return {"unit": like.new_ones(len(shared), *shared.protocol.image_shape)}

    def value(self, point: Any, kept: Any) -> Tensor:
        return kept["unit"].mean()


class Watches(ActivationPrior):
    def watched(self, victim: Any) -> list[str]:
        return ["0"]

    def __call__(self, activations: Any, state: Any) -> Tensor:
        assert list(activations) == ["0"]
        return activations["0"].outputs.square().mean()


def test_what_a_term_keeps_is_its_own(kit: Any, tmp_path: Path) -> None:
    def run(distance: Distance, prior: Prior, **options: Any) -> GradientInversion:
        attack = GradientInversion(objective=1e-9 * distance + 5 * prior, solver=LBFGS(max_evaluations=4))
        found: GradientInversion = kit.fit(attack, kit.victims(victims=2), **options)
        return found

    for distance in (SquaredDistance(), CosineDistance()):
        assert run(distance, Recalls()).finished.loss.tolist() == pytest.approx([5.0, 5.0], abs=1e-3)
    saver = ModelCheckpoint(tmp_path, filename="early", every_n_train_steps=2)
    run(SquaredDistance(), Recalls(), callbacks=[saver], enable_checkpointing=True)
    resumed = run(SquaredDistance(), Recalls(), ckpt_path=str(tmp_path / "early.ckpt"))
    assert resumed.finished.loss.tolist() == pytest.approx([5.0, 5.0], abs=1e-3)
    with pytest.raises(
        ValueError, match="Expected `begin` of each piece to return the entries that its `state` declares"
    ):
        run(SquaredDistance(), Recalls(tells=False))


def test_a_term_sees_the_modules_that_it_watches(kit: Any) -> None:
    def losses(objective: Any) -> Tensor:
        attack = GradientInversion(objective=objective, solver=LBFGS(max_evaluations=1))
        found = kit.by_id(kit.fit(attack, kit.victims(victims=2, model=batch_norm_network().eval())))
        return found.loss

    parts = SquaredDistance(), Watches(), 1e-3 * BatchNormStatistics()
    alone = [losses(1e-9 * parts[0] + part) for part in parts]
    assert bool((torch.stack(alone) > 1e-3).all())
    torch.testing.assert_close(losses(sum(parts)), torch.stack(alone).sum(0))


class Forgets(Prior):
    def __init__(self, power: float) -> None:
        self._power = power

    def __call__(self, images: Tensor) -> Tensor:
        return images.abs().pow(self._power).mean()


def test_a_piece_that_forgets_its_arguments_is_refused() -> None:
    """A checkpoint could not tell it from another."""
    with pytest.raises(ValueError, match=r"Expected Forgets to keep the arguments .* no attribute for \['power'\]"):
        GradientInversion(objective=SquaredDistance() + Forgets(2.0))


def test_options_are_those_of_the_attack_alone() -> None:
    class Study(nn.Module):
        def __init__(self, root: str) -> None:
            super().__init__()
            self.attack = InvertingGradientsAttack(steps=7)

    options = Study("/here").attack.hparams
    assert options["steps"] == 7
    assert "root" not in options


def test_iterations_are_those_while_it_was_searched_for(kit: Any) -> None:
    # Momentum counts the step before which it ends.
    for solver, iterations in ((SignedAdam(steps=9), 8), (Momentum(0.02, 9), 9)):
        runs = [
            kit.by_id(kit.fit(GradientInversion(solver=solver), kit.victims(victims=5, lanes=lanes))).iterations
            for lanes in (1, 3, 5)
        ]
        assert [run.tolist() for run in runs] == [[iterations] * 5] * 3


def test_defended_gradients_are_said_to_be_matched_as_if_they_were_not(kit: Any) -> None:
    naive = GradientInversion(solver=LBFGS(max_evaluations=2), adaptive=False)
    with pytest.warns(
        UserWarning, match=r"defend their gradients with \['Clip'\].*takes the defense into account may recover more"
    ):
        kit.fit(naive, kit.victims(victims=1, defenses=[Clip(0.1)]))


# A gradient that says nothing.


def faint(kit: Any, factor: float, **options: Any) -> Any:
    victims = kit.victims(victims=3, model=small_network(), **options)
    victims.setup("fit")
    shared = victims.share(range(3))
    for tensor in shared.gradients.values():
        tensor[1] *= factor
    return SharedGradients(shared, Victim(small_network(), image_shape=(1, 12, 12)))


@pytest.mark.parametrize("factor", [0.0, 1e-26])
def test_a_gradient_that_says_nothing_does_not_pass_for_converged(kit: Any, factor: float) -> None:
    attack = kit.fit(IDLGAttack(), faint(kit, factor))
    found = kit.by_id(attack)
    assert [STATUS[status] for status in found.status.tolist()] == ["converged", "uninformative", "converged"]
    assert found.evaluations[1] == found.restarts[1] == 0
    assert found.loss[1] == torch.inf
    assert bool((found.loss[[0, 2]] < 1e-7).all())


def test_all_victims_may_be_uninformative(kit: Any) -> None:
    victims = kit.victims(victims=5, lanes=2, model=small_network())
    victims.setup("fit")
    shared = victims.share(range(5))
    for tensor in shared.gradients.values():
        tensor.zero_()
    attack = kit.fit(IDLGAttack(), SharedGradients(shared, victims.victim, lanes=2))
    assert {STATUS[status] for status in kit.by_id(attack).status.tolist()} == {"uninformative"}


def test_the_cosine_distance_goes_on_where_squares_vanish(kit: Any) -> None:
    attack = IDLGAttack(distance="cosine", restarts=0, max_evaluations=150)
    found = kit.by_id(kit.fit(attack, faint(kit, 1e-26)))
    assert STATUS[int(found.status[1])] != "uninformative"
    assert found.loss[1] < 1e-4


# Searches that diverge.


class Cliff(Prior):
    """No number where the first pixel is above a height."""

    def __init__(self, height: float) -> None:
        self.height = height

    def __call__(self, images: Tensor) -> Tensor:
        return torch.where(images[0, 0, 0, 0] > self.height, torch.nan, 0.0)


def test_a_victim_that_diverges_starts_again_within_its_restarts(kit: Any) -> None:
    """Those whose start lies behind the cliff; the others go on beside them."""

    def found(restarts: int, height: float) -> Any:
        attack = GradientInversion(
            objective=SquaredDistance() + Cliff(height),
            images=Pixels(std=0.1),
            solver=SignedAdam(lr=1e-4, steps=5),
            restarts=restarts,
            restart_above=10.0,  # only what has no objective at all starts again
        )
        return kit.by_id(kit.fit(attack, kit.victims(victims=8, lanes=4)))

    once, often = found(0, 0.0), found(20, 0.0)
    lost = once.status == STATUS.index("diverged")
    assert 0 < int(lost.sum()) < 8
    assert torch.equal(once.loss == torch.inf, lost)
    assert bool((often.status == EXHAUSTED).all())
    assert bool(often.loss.isfinite().all())
    assert torch.equal(often.restarts > 0, lost)
    assert torch.equal(often.evaluations, 5 + often.restarts)
    torch.testing.assert_close(often.images[~lost], once.images[~lost], rtol=0, atol=1e-5)
    # One that finds no way is reported, with all its starts and with images that are numbers.
    hopeless = found(2, -9.0)
    assert {STATUS[status] for status in hopeless.status.tolist()} == {"diverged"}
    assert hopeless.restarts.tolist() == [2] * 8
    assert hopeless.evaluations.tolist() == [3] * 8
    assert bool(hopeless.images.isfinite().all())


# Devices.


def test_an_mps_device_is_refused(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda *_: None)
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("mps"))
    with pytest.raises(ValueError, match=r"but got 'mps', .* Pass accelerator='cpu' to the Trainer"):
        kit.fit(IDLGAttack(), kit.victims(victims=1))
