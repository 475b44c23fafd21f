from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import nn

from leakage import Victim
from leakage.audit import Client
from leakage.audit.preflight import preflight
from leakage.audit.report import Check
from leakage.audit.self_check import difference, self_check, with_module_rate
from leakage.audit.subject import Subject
from leakage.defenses import DPSGD, Clip, Defense, GaussianNoise, MixUp, Sign, TopK
from tests.audit.modules import LOSSES, Data, Hooked, Inside, Small, dropping


def made(module: LightningModule, client: Client) -> tuple[Subject, Client]:
    subject, problems = preflight(module, Data(number=60), [client], victims=2, public=20, seed=0)
    assert subject is not None, problems
    return subject, with_module_rate(client, subject)[0]


def checks_of(module: LightningModule, client: Client) -> list[Check]:
    subject, client = made(module, client)
    subject = subject.with_dropout() if client.dropout else subject
    return self_check(subject, client, victim_of(subject, client), seed=0)


def victim_of(subject: Subject, client: Client) -> Victim:
    options = {"image_shape": (1, 12, 12), "num_images": client.images, **subject.loss, **client.training}
    return Victim(subject.network, **options)


@pytest.mark.parametrize("module", [Small(), Inside(), Small(nn.BatchNorm1d(16), nn.ReLU()), *LOSSES])
def test_a_client_does_what_the_module_does(module: LightningModule) -> None:
    checks = checks_of(module, Client(images=4))
    assert [check.name for check in checks] == ["gradient of training_step", "distance at the truth"]
    for check in checks:
        assert check.passed
        assert check.residual is not None
        assert check.residual < 1e-9


def test_local_steps_are_those_of_the_module_s_optimizer() -> None:
    for module in (Small(learning_rate=0.3), *LOSSES[:2]):
        checks = checks_of(module, Client(images=4, local_steps=4, local_batch_size=2))
        assert [check.name for check in checks][1] == "local steps of configure_optimizers"
        assert all(check.passed for check in checks)
    _, client = made(Small(learning_rate=0.3), Client(images=4, local_steps=4))
    assert client.learning_rate == 0.3


def test_clients_with_dropout_take_the_masks_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(images=4, local_steps=4, local_batch_size=2, dropout=True)
    checks = checks_of(dropping(), client)
    assert len(checks) == 3
    assert all(check.passed for check in checks)
    monkeypatch.setattr("leakage.audit.self_check._mask", lambda *given: None)
    assert [check.passed for check in checks_of(dropping(), client)] == [False], "the module draws its own masks"
    with pytest.raises(ValueError, match=r"Expected a module with torch.nn.Dropout in training mode .* but got none"):
        made(Small(), client)[0].with_dropout()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 0.01}, "learning_rate=0.01 is declared, but `configure_optimizers` has 0.1"),
        ({"learning_rate": 0.1, "momentum": 0.9}, "momentum=0.9 is declared, but `configure_optimizers` has 0"),
    ],
)
def test_another_rate_than_the_module_s_is_caught(options: dict[str, Any], said: str) -> None:
    checks = checks_of(Small(), Client(images=2, local_steps=3, **options))
    assert [check.passed for check in checks] == [True, False]
    assert said in checks[-1].finding


def test_a_loss_that_is_another_is_caught_and_its_factor_named() -> None:
    (check,) = checks_of(Hooked(), Client(images=2))
    assert not check.passed
    assert "is 3 times that of the simulated client" in check.finding


class Frozen(Small):
    """A step that keeps the gradient from half of a layer."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if loss.requires_grad and torch.is_grad_enabled():
            mask = torch.arange(16)[:, None] < 8
            self.net[1].weight.register_hook(lambda gradient: gradient * mask)
        return loss


def test_a_gradient_that_differs_names_the_layer() -> None:
    (check,) = checks_of(Frozen(), Client(images=2))
    assert not check.passed
    assert "most of all for '1.weight'" in check.finding


@pytest.mark.parametrize("defense", [Clip(0.1), TopK(0.2), Sign()], ids=str)
def test_what_a_defense_does_is_simulated_at_the_truth(defense: Defense) -> None:
    check = checks_of(Small(), Client(images=2, defenses=[defense]))[-1]
    assert check.passed
    assert check.residual is not None
    assert check.residual < 1e-9


@pytest.mark.parametrize("defense", [GaussianNoise(1e-2), DPSGD(1.0, norm=1.0)], ids=str)
def test_noise_is_no_more_than_was_declared(defense: Defense) -> None:
    check = checks_of(Small(), Client(images=2, defenses=[defense]))[-1]
    assert check.passed
    assert check.residual is not None
    assert check.residual > 1e-6
    assert "no more than the declared noise" in check.finding


class Louder(GaussianNoise):
    """Adds more than it tells."""

    def __call__(self, gradients: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {name: tensor + 1.0 for name, tensor in gradients.items()}


def test_noise_that_was_not_declared_is_caught() -> None:
    check = checks_of(Small(), Client(images=2, defenses=[Louder(1e-4)]))[-1]
    assert not check.passed
    assert "do not reproduce the update" in check.finding


class Adaptive(Small):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def test_other_optimizers_than_sgd_need_a_declared_rate() -> None:
    with pytest.raises(
        ValueError,
        match=r"Expected a `learning_rate` for the 3 local steps of the client '2 images, 3 local steps'.* AdamW",
    ):
        made(Adaptive(), Client(images=2, local_steps=3))
    subject, _ = made(Adaptive(), Client(images=2))
    client, problems = with_module_rate(Client(images=2, local_steps=3, learning_rate=0.1), subject)
    assert client.learning_rate == 0.1
    assert "AdamW" in problems[0].problem


def test_difference_is_relative_and_counts_what_one_side_lacks() -> None:
    one, two = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    assert difference(one, two) == 0
    assert difference({"a": torch.zeros(2)}, one) == pytest.approx(1.0)
    assert difference(one, {"a": torch.zeros(2)}) == float("inf")


def test_clients_who_mix_their_images_have_no_distance_at_the_truth() -> None:
    *_, check = checks_of(Small(), Client(images=4, defenses=[MixUp()]))
    assert (check.name, check.passed, check.residual) == ("distance at the truth", True, None)
    assert "encoded images" in check.finding
