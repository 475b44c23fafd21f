"""Whole runs on a device that is none, which refuses what a GPU refuses: tensors of it and of the CPU together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from leakage.attacks import (
    DLGAttack,
    GaussNewtonAttack,
    GradientInversion,
    IDLGAttack,
    InvertingGradientsAttack,
    RGAPAttack,
)
from leakage.clients.victim import Victim
from leakage.condensation import Condensation, DistributionMatchingCondensation, GradientMatchingCondensation
from leakage.datamodules import LabelledImages
from leakage.labels import infer_labels
from leakage.models import MLP, ConvNet, LeNet
from tests.kit import SmallVictims

from .fake_device import ELSEWHERE, DeviceError, Elsewhere, FakeDevice, fake_strategy
from .pieces import RUNS, make, share_defended

QUICK: dict[str, Any] = {"restarts": 0}


def fit(  # in double precision, where rounding decides nothing within so few evaluations
    attack: Any, *, elsewhere: bool, data: Any = None, ckpt_path: str | None = None, **options: Any
) -> Any:
    place: dict[str, Any] = {"strategy": fake_strategy()} if elsewhere else {"accelerator": "cpu"}
    defaults: dict[str, Any] = {
        "precision": "64-true",
        "logger": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    trainer = Trainer(
        max_epochs=1, enable_progress_bar=False, enable_model_summary=False, **place, **defaults | options
    )
    data = SmallVictims(victims=3, lanes=2) if data is None else data
    with FakeDevice() if elsewhere else nullcontext():
        trainer.fit(attack, datamodule=data, ckpt_path=ckpt_path)
    return attack


def test_it_refuses_two_devices() -> None:
    with FakeDevice():
        there = torch.ones(3, device=ELSEWHERE)
        assert isinstance(there, Elsewhere)
        assert (there + there).tolist() == [2, 2, 2]
        with pytest.raises(DeviceError, match="Expected all tensors on one device"):
            _ = there + torch.ones(3)


@pytest.mark.parametrize(
    "attack",
    [
        lambda: IDLGAttack(max_evaluations=8, **QUICK),
        lambda: IDLGAttack(max_evaluations=4, restarts=1),
        lambda: DLGAttack(protocol="published", history_size=3, max_evaluations=1),
        lambda: IDLGAttack(distance="cosine", max_evaluations=3, **QUICK),
        lambda: GaussNewtonAttack(),
        lambda: GaussNewtonAttack(start="noise", max_evaluations=3, solver="cg", max_products=5, **QUICK),
        lambda: RGAPAttack(),
        lambda: InvertingGradientsAttack(steps=3),
    ],
    ids=["iDLG", "restarts", "published", "cosine", "Gauss-Newton", "cg", "R-GAP", "IG"],
)
def test_finds_there_what_it_finds_on_the_cpu(attack: Any) -> None:
    there, here = fit(attack(), elsewhere=True), fit(attack(), elsewhere=False)
    assert there.finished.ids.tolist() == here.finished.ids.tolist() == list(range(3))
    torch.testing.assert_close(there.finished.images, here.finished.images, rtol=1e-3, atol=1e-3)
    assert there.finished.labels.tolist() == here.finished.labels.tolist()
    assert there.scores.keys() == here.scores.keys() == set(range(3))


@pytest.mark.parametrize("name", RUNS)
def test_pieces_find_there_what_they_find_on_the_cpu(name: str) -> None:
    (attack, data), (again, same) = make(name), make(name)
    there, here = fit(attack, data=data, elsewhere=True), fit(again, data=same, elsewhere=False)
    assert here.finished.evaluations.tolist() == [4] * 3
    for part in ("images", "loss"):
        torch.testing.assert_close(getattr(there.finished, part), getattr(here.finished, part), rtol=1e-6, atol=1e-9)
    assert there.finished.labels.tolist() == here.finished.labels.tolist()


def test_defenses_act_there() -> None:
    here = share_defended("cpu").gradients
    with FakeDevice():
        there = share_defended(ELSEWHERE).gradients
    for name, tensor in here.items():
        assert isinstance(there[name], Elsewhere)
        torch.testing.assert_close(there[name].inner, tensor, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:for .* from a non-meta parameter")  # it is copied all the same
@pytest.mark.parametrize("kind", [GradientMatchingCondensation, DistributionMatchingCondensation])
@pytest.mark.parametrize("real_images", ["random", "kmeans"])
def test_condenses_there(kind: Callable[..., Condensation], real_images: str) -> None:
    def condensed(elsewhere: bool, **options: Any) -> torch.Tensor:
        network = ConvNet(width=2, depth=1)
        condensation = kind(network=network, iterations=1, real_images=real_images, **options)
        data = LabelledImages("sample", batch_size=4)
        return fit(condensation, elsewhere=elsewhere, data=data).synthetic_set().images

    found = condensed(True)
    torch.testing.assert_close(found, condensed(False))
    assert float((found - condensed(False, learning_rate=1e-12)).abs().max()) > 1e-4


def test_a_resumed_run_is_where_the_trainer_computes(tmp_path: Path) -> None:
    def attack() -> GradientInversion:
        return IDLGAttack(max_evaluations=9, **QUICK)

    saver = ModelCheckpoint(tmp_path, filename="early", every_n_train_steps=5)
    fit(attack(), elsewhere=False, callbacks=[saver], enable_checkpointing=True, max_steps=5)
    resumed = fit(attack(), elsewhere=True, ckpt_path=str(tmp_path / "early.ckpt"))
    whole = fit(attack(), elsewhere=False)
    torch.testing.assert_close(resumed.finished.images, whole.finished.images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", ["idlg", "row_minimum", "llg", "llg_star", "ilrg", "geng", "mean_feature"])
def test_labels_are_read_there(rule: str) -> None:
    count = 1 if rule == "idlg" else 4
    model = MLP(1, 12) if rule != "idlg" else LeNet(1, 12)
    victim = Victim(model, image_shape=(1, 12, 12), num_images=count)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, count, 1, 12, 12, generator=generator)
    labels = torch.randint(10, (6, count), generator=generator)
    shared = victim.share(images, labels)
    expected = infer_labels(shared, victim, rule=rule).labels
    with FakeDevice():
        victim.model.to(ELSEWHERE)
        found = infer_labels(shared.to(device=ELSEWHERE), victim, rule=rule).labels
        assert isinstance(found, Elsewhere)
    assert found.tolist() == expected.tolist()
