"""What only the second-order attack and R-GAP do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from leakage import Victim
from leakage.attacks import GaussNewtonAttack, RGAPAttack
from leakage.models import ConvNet, LeNet


def test_is_exact_to_rounding_from_noise(kit: Any) -> None:
    attack = kit.fit(GaussNewtonAttack(start="noise"), kit.victims(victims=4))
    kit.assert_successful(attack, 4)
    assert max(score.mse for score in attack.scores.values()) < 1e-7
    assert float(kit.by_id(attack).evaluations.double().mean()) < 15


@pytest.mark.parametrize("weights", ["own", "shared"])
def test_layer_by_layer_is_exact_without_a_search(kit: Any, weights: str) -> None:
    attack = kit.fit(RGAPAttack(), kit.victims(victims=8, weights=weights))
    found = kit.by_id(attack)
    assert found.evaluations.tolist() == [1] * 8
    assert all(score.mse < 1e-7 and score.label_accuracy == 1 for score in attack.scores.values())
    assert bool(((found.images >= 0) & (found.images <= 1)).all())


def test_begins_with_the_layers_where_it_can(kit: Any) -> None:
    auto = kit.by_id(kit.fit(GaussNewtonAttack(), kit.victims(victims=4)))
    layers = kit.by_id(kit.fit(RGAPAttack(), kit.victims(victims=4)))
    assert bool((auto.evaluations <= 3).all())
    torch.testing.assert_close(auto.images, layers.images, rtol=0, atol=1e-3)
    # No other start is known for a network whose activation can't be undone.
    silu = kit.victims(victims=2, model=LeNet(1, 12, activation="silu"))
    options: dict[str, Any] = {"max_evaluations": 1, "restarts": 0}
    one, two = (kit.by_id(kit.fit(GaussNewtonAttack(start=start, **options), silu)) for start in ("auto", "noise"))
    assert torch.equal(one.images, two.images)


@pytest.mark.slow
def test_searches_for_labels_together_with_the_images(kit: Any) -> None:
    attack = kit.fit(GaussNewtonAttack(joint_labels=True), kit.victims(victims=4))
    assert sum(score.success == 1 and score.label_accuracy == 1 for score in attack.scores.values()) >= 3
    labels = GaussNewtonAttack(joint_labels=True, max_evaluations=1, restarts=0)
    kit.fit(labels, kit.victims(victims=4))
    assert sum(score.label_accuracy for score in labels.scores.values()) < 4, "labels were known from the start"


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_either_solver_finds_the_images(kit: Any, solver: str) -> None:
    attack = kit.fit(GaussNewtonAttack(start="noise", solver=solver), kit.victims(victims=4))
    kit.assert_successful(attack, 4)


def test_two_images_of_one_label_come_out_exactly(kit: Any) -> None:
    victims = kit.victims(victims=4, images=2, reveal_labels=True)
    victims.setup("fit")
    attack = kit.fit(GaussNewtonAttack(), victims)
    assert sum(score.mse < 1e-6 for score in attack.scores.values()) >= 3


def test_says_so_where_the_jacobian_has_no_room(kit: Any) -> None:
    with pytest.warns(UserWarning, match=r"need [\d,]+ bytes, but `memory` is 1,000.*solver='cg'"):
        attack = kit.fit(GaussNewtonAttack(start="noise", memory=1000, solver="cholesky"), kit.victims(victims=2))
    kit.assert_successful(attack, 2)


def few_equations() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(9, 10))


def test_refuses_more_unknowns_than_equations_unless_asked(kit: Any) -> None:
    victims = kit.victims(victims=2, model=few_equations())
    with pytest.raises(ValueError, match=r"but got 144 unknowns \(an image of \(1, 12, 12\)\) and 100 equations"):
        kit.fit(GaussNewtonAttack(), victims)
    with pytest.raises(ValueError, match=r"but got 308 unknowns \(2 images of \(1, 12, 12\) and their labels\)"):
        kit.fit(GaussNewtonAttack(joint_labels=True), kit.victims(victims=2, images=2, model=few_equations()))
    found = kit.by_id(
        kit.fit(GaussNewtonAttack(underdetermined=True, restarts=0), kit.victims(victims=2, model=few_equations()))
    )
    assert bool((found.loss < 1e-6).all())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"start": "zeros"}, r"Expected `start` to be one of \['auto', 'grey', 'noise', 'rgap'\], but got 'zeros'"),
    ({"solver": "qr"}, r"Expected `solver` to be one of \['auto', 'cg', 'cholesky'\], but got 'qr'"),
    ({"joint_labels": True, "rule": "idlg"}, "Expected no `rule` and no `auxiliary` with `joint_labels`"),
    ({"damping": 0.0}, r"Expected `damping` to be positive and finite, but got 0.0"),
    ({"max_products": 0}, r"Expected `max_products` to be a whole number of at least 1, but got 0"),
    ({"memory": -1}, r"Expected `memory` to be a whole number of at least 1, but got -1"),
    ({"joint_labels": "yes"}, r"Expected `joint_labels` to be True or False, but got 'yes'"),
    ({"joint_labels": True, "start": "rgap"}, r"Expected start='auto' or 'noise' with `joint_labels`, but got 'rgap'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_names_a_bad_option_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussNewtonAttack(**options)


@pytest.mark.parametrize("attack", [RGAPAttack(), GaussNewtonAttack(start="rgap")], ids=["RGAP", "GaussNewton"])
def test_names_the_module_that_is_no_plain_chain(kit: Any, attack: Any) -> None:
    with pytest.raises(ValueError, match=r"SiLU"):
        kit.fit(attack, kit.victims(victims=2, model=LeNet(1, 12, activation="silu")))
    with pytest.raises(ValueError, match=r"Expected at most 9 images"):
        kit.fit(attack, kit.victims(victims=2, images=12, reveal_labels=True, model=ConvNet(1, 12)))


@pytest.mark.parametrize("attack", [RGAPAttack(), GaussNewtonAttack(start="rgap")], ids=["RGAP", "GaussNewton"])
def test_names_a_loss_that_hides_features(kit: Any, attack: Any) -> None:
    options: dict[str, Any] = {"victims": 3, "images": 3, "loss": "mean_squared_error", "reveal_labels": True}
    with pytest.raises(ValueError, match=r"Expected one image with loss 'mean_squared_error'.*but got 3"):
        kit.fit(attack, kit.victims(**options))
    # Else it starts from noise.
    assert len(kit.fit(GaussNewtonAttack(max_evaluations=2, restarts=0), kit.victims(**options)).finished) == 3


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_the_same_seed_gives_the_same_bits_also_after_a_resume(kit: Any, tmp_path: Path, solver: str) -> None:
    def attack() -> GaussNewtonAttack:
        return GaussNewtonAttack(start="noise", solver=solver, max_evaluations=3, restarts=1)

    every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    victims: dict[str, Any] = {"victims": 4, "lanes": 3}
    whole = kit.fit(attack(), kit.victims(**victims), enable_checkpointing=True, callbacks=[every])
    for step in range(1, whole.iteration, 3):
        resumed = kit.fit(attack(), kit.victims(**victims), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        kit.assert_same(whole, resumed)
        assert resumed.scores == whole.scores


@pytest.mark.slow
def test_double_precision_goes_further(kit: Any) -> None:
    options: dict[str, Any] = {"start": "noise", "solver": "cholesky", "tolerance": 1e-20}
    single = kit.by_id(kit.fit(GaussNewtonAttack(**options), kit.victims(victims=1)))
    double = kit.by_id(kit.fit(GaussNewtonAttack(**options), kit.victims(victims=1), precision="64-true"))
    assert double.images.dtype == torch.float64
    assert bool((double.loss < single.loss).all())  # down to the rounding of the shared gradients


@pytest.mark.slow
def test_batches_start_with_their_layers_in_any_cohort(kit: Any) -> None:
    """Labels come unsorted, and one cohort after another."""
    options: dict[str, Any] = {"victims": 4, "images": 2, "lanes": 3, "reveal_labels": True}
    attack = kit.fit(GaussNewtonAttack(max_evaluations=30, restarts=0), kit.victims(**options))
    assert sum(score.success == 1 and score.label_accuracy == 1 for score in attack.scores.values()) >= 3
    alone = kit.fit(GaussNewtonAttack(max_evaluations=1, restarts=0), kit.victims(**(options | {"lanes": 1})))
    assert torch.equal(kit.by_id(alone).labels, kit.by_id(attack).labels)


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_many_local_steps(kit: Any, monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    """Differentiated in little memory, but for the equations, which need derivatives forwards too."""
    asked, evaluate = [], Victim.evaluate

    def noted(self: Victim, *args: Any, **options: Any) -> Any:
        asked.append(options.get("sparing"))
        return evaluate(self, *args, **options)

    monkeypatch.setattr(Victim, "evaluate", noted)
    victims = kit.victims(victims=1, local_steps=8, learning_rate=0.1)
    attack = kit.fit(GaussNewtonAttack(start="noise", solver=solver, max_evaluations=3, restarts=0), victims)
    assert {True, False} <= set(asked)
    start = kit.fit(GaussNewtonAttack(start="noise", solver=solver, max_evaluations=1, restarts=0), victims)
    before, after = kit.by_id(start).loss, kit.by_id(attack).loss
    assert bool((after < before).all())
