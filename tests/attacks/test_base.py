"""What an attack refuses, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from leakage.attacks import PROTOCOLS, IDLGAttack
from leakage.datamodules import SharedGradients, Victims
from leakage.defenses import Sign
from leakage.models import LeNet

BAD: list[tuple[dict[str, Any], str]] = [
    ({"success_threshold": 0.0}, "Expected `success_threshold` to be positive and finite, but got 0.0"),
    ({"restart_above": -1e-5}, "Expected `restart_above` to be positive and finite, but got -1e-05"),
    ({"start_std": 0.0}, "Expected `start_std` to be positive and finite, but got 0.0"),
    ({"tolerance": -1.0}, "Expected `tolerance` .*, but got -1.0"),
    ({"tolerance": float("nan")}, "Expected `tolerance` .*, but got nan"),
    ({"max_evaluations": 0}, "Expected `max_evaluations` to be a whole number of at least 1, but got 0"),
    ({"restarts": -1}, "Expected `restarts` to be a whole number of at least 0, but got -1"),
    ({"restarts": True}, "Expected `restarts` to be a whole number of at least 0, but got True"),
    ({"seed": -1}, "Expected `seed` to be a whole number of at least 0, but got -1"),
    ({"seed": 0.5}, "Expected `seed` to be a whole number of at least 0, but got 0.5"),
]
BAD_SEARCHES: list[tuple[dict[str, Any], str]] = [
    ({"protocol": "robuts"}, r"Expected `protocol` to be one of \['published', 'robust'\], but got 'robuts'"),
    ({"history_size": 0}, "Expected `history_size` to be a whole number of at least 1, but got 0"),
    ({"history_size": 10.0}, "Expected `history_size` to be a whole number of at least 1, but got 10.0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_names_a_bad_option_at_construction(case: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.attack(**options)


@pytest.mark.parametrize(("options", "message"), BAD_SEARCHES)
def test_names_a_bad_option_of_the_search(lbfgs_case: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lbfgs_case.attack(**options)


def test_options_are_keywords(case: Any) -> None:
    with pytest.raises(TypeError):
        case.attack("robust")


@pytest.mark.parametrize("protocol", ["robust", "published"])
def test_a_protocol_is_a_set_of_defaults(lbfgs_case: Any, protocol: str) -> None:
    assert lbfgs_case.attack(protocol=protocol).search == PROTOCOLS[protocol]
    search = lbfgs_case.attack(protocol=protocol, history_size=7, restarts=0).search
    assert (search.history_size, search.restarts) == (7, 0)
    assert search.line_search == PROTOCOLS[protocol].line_search


def test_the_published_protocol_is_that_of_the_papers() -> None:
    published = PROTOCOLS["published"]
    assert (published.start_std, published.history_size, published.tolerance) == (1.0, 100, 1e-6)
    assert (published.max_evaluations, published.restarts) == (300 * 20, 0)
    assert not published.relative
    assert not published.line_search
    assert not published.spectrum


def test_the_spectrum_is_an_option_of_the_line_search(lbfgs_case: Any) -> None:
    assert lbfgs_case.attack().search.spectrum
    assert not lbfgs_case.attack(spectrum=False).search.spectrum
    with pytest.raises(ValueError, match=r"Expected no `spectrum` with protocol='published', whose L-BFGS is torch's"):
        lbfgs_case.attack(protocol="published", spectrum=True)
    with pytest.raises(ValueError, match="Expected `spectrum` to be True or False, but got 'yes'"):
        lbfgs_case.attack(spectrum="yes")


def test_the_spectrum_of_images_saves_evaluations(kit: Any) -> None:
    evaluations = {}
    for spectrum in (True, False):
        attack = IDLGAttack(spectrum=spectrum)
        kit.fit(attack, Victims("sample", victims=8))
        assert max(score.mse for score in attack.scores.values()) < 1e-3
        evaluations[spectrum] = attack.finished.evaluations.double().mean()
    assert evaluations[True] < evaluations[False]


def test_a_box_helps_behind_signs(kit: Any) -> None:
    means = {}
    for box in (None, (0, 1)):
        attack = IDLGAttack(box=box, max_evaluations=40, restarts=0)
        kit.fit(attack, Victims("sample", victims=4, defenses=[Sign()]))
        means[box] = sum(score.psnr for score in attack.scores.values()) / 4
        inside = (attack.finished.images >= 0) & (attack.finished.images <= 1)
        assert bool(inside.all()) == (box is not None)
    assert means[0, 1] > means[None] + 1
    with pytest.raises(ValueError, match=r"Expected no `box` with protocol='published'.* but got \(0, 1\)"):
        IDLGAttack(box=(0, 1), protocol="published")


def test_each_restart_starts_from_a_wider_distribution(case: Any) -> None:
    attack = case.attack(start_std=0.5)
    noise = torch.randn(3, 1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    spread = attack.images.starts(noise, torch.tensor([0, 1, 2])).flatten(1).std(1)
    torch.testing.assert_close(spread, torch.tensor([0.5, 1.5, 4.5]), rtol=0.1, atol=0)


def test_wants_a_datamodule_of_victims(case: Any) -> None:
    class Other(LightningDataModule):
        """Images and labels, as for training."""

        def train_dataloader(self) -> Any:
            return [torch.zeros(1)]

    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    with pytest.raises(ValueError, match=r"DataModule of `leakage\.datamodules` .*SharedGradients.*but got Other"):
        Trainer(**options).fit(case.attack(), datamodule=Other())
    with pytest.raises(ValueError, match=r"Trainer\.fit\(attack, datamodule=\.\.\.\).*but got NoneType"):
        Trainer(**options).fit(case.attack(), [torch.zeros(1)])


def test_has_no_victim_before_fit(case: Any) -> None:
    attack = case.attack()
    with pytest.raises(RuntimeError, match=r"Expected the attack to be inside `Trainer\.fit`"):
        _ = attack.victim
    assert attack.num_done == attack.num_running == attack.iteration == 0
    assert len(attack.finished) == len(attack.current()) == 0


def conv_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 10, 10), nn.Flatten())


def frozen_last() -> nn.Module:
    model = LeNet(1, 12)
    model.classifier.requires_grad_(False)
    return model


REFUSED = [
    pytest.param({"loss": "mean_squared_error"}, "needs_cross_entropy", "but got loss 'mean_squared_error'", id="loss"),
    pytest.param({"model": conv_last()}, "needs_linear_last_layer", "but got logits from Conv2d '2' and", id="conv"),
    pytest.param(
        {"model": frozen_last()},
        "needs_linear_last_layer",
        "Expected the last layer 'classifier' to share its gradient, but got frozen weights",
        id="frozen",
    ),
]


@pytest.mark.parametrize(("options", "need", "message"), REFUSED)
def test_refuses_victims_it_can_not_attack_and_says_what_can(
    case: Any, kit: Any, options: dict[str, Any], need: str, message: str
) -> None:
    attack = case.attack(max_evaluations=3, restarts=0)
    victims = kit.victims(victims=2, **options)
    if getattr(case, need):
        with pytest.raises(ValueError, match=message) as caught:
            kit.fit(attack, victims)
        assert "Use DLGAttack" in str(caught.value)
        assert "reveal_labels=True" in str(caught.value)
    else:
        assert len(kit.fit(attack, victims).finished) == 2
    # Told the labels, every attack goes on.
    told = kit.victims(victims=2, reveal_labels=True, **options)
    assert len(kit.fit(case.attack(max_evaluations=3, restarts=0), told).finished) == 2


def test_names_a_gradient_that_is_not_finite(case: Any, kit: Any, tmp_path: Path) -> None:
    class Broken(kit.victims):  # type: ignore[misc, name-defined]
        """One of the gradients has been overrun."""

        def share(self, victims: Any) -> Any:
            shared = super().share(victims)
            shared.gradients["features.0.weight"][1, 2] = torch.nan
            return shared

    with pytest.raises(ValueError, match=r"features\.0\.weight"):
        kit.fit(case.attack(), Broken(victims=3))


def test_names_a_gradient_that_does_not_fit_the_network(case: Any, kit: Any, tmp_path: Path) -> None:
    victims = kit.victims(victims=2)
    victims.setup("fit")
    victims.share(range(2)).save(tmp_path / "client.safetensors")
    files = SharedGradients(tmp_path / "client.safetensors", LeNet(1, 12, width=7))
    with pytest.raises(
        ValueError,
        match=r"client\.safetensors' to fit .*but got: Expected the gradient of .classifier\.weight. to have",
    ):
        kit.fit(case.attack(), files)


def test_wants_a_strategy_that_does_not_average(case: Any, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"or strategy=.victim_parallel., .* but got 2 processes and Single"):
        kit.fit(case.attack(), kit.victims(victims=2))


def test_refuses_what_is_no_fit_and_keeps_what_it_has(kit: Any) -> None:
    victims = kit.victims(victims=2)
    attack = kit.fit(IDLGAttack(), victims)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"Expected `Trainer.fit`, .* but got `Trainer.validate`"):
        trainer.validate(attack, datamodule=victims)
    kit.assert_successful(attack, 2)


def test_refuses_half_precision(kit: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected `precision` to be one of \['32-true', '64-true'\], but got 'bf16-"):
        kit.fit(IDLGAttack(), kit.victims(victims=1), precision="bf16-true")


def test_refuses_a_checkpoint_of_another_precision(kit: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="early", every_n_train_steps=3)
    kit.fit(IDLGAttack(), kit.victims(victims=1), callbacks=[saver], enable_checkpointing=True, max_steps=3)
    with pytest.raises(ValueError, match=r"Expected the checkpoint's precision '32-true', but got '64-true'"):
        kit.fit(IDLGAttack(), kit.victims(victims=1), precision="64-true", ckpt_path=str(tmp_path / "early.ckpt"))
