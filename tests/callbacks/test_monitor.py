from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from leakage import LeNet
from leakage.attacks import GaussNewtonAttack, InvertingGradientsAttack
from leakage.callbacks import LeakageMonitor
from leakage.callbacks.undisturbed import undisturbed
from tests.kit import small_images

QUICK = InvertingGradientsAttack(steps=3)


class Classifier(LightningModule):
    """Somebody's own: BatchNorm, dropout, momentum, and random numbers of three libraries in its training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(100, 10),
        )
        self.drawn: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        assert self.training
        images, labels = batch
        self.drawn += [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
        loss = F.cross_entropy(self(images + 0.01 * torch.randn_like(images)), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Smooth(Classifier):
    """One that a second-order attack finds images of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LeNet(image_size=12)


def fit(
    *callbacks: Callback, kind: type[Classifier] = Classifier, steps: int = 6, scale: bool = False, **options: Any
) -> tuple[Classifier, Trainer]:
    seed_everything(1, verbose=False)
    module = kind()
    images, labels = small_images().tensors
    images = (images - 0.3) / 0.4 if scale else images
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **{"logger": False, **options},
    )
    trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True))
    return module, trainer


def test_training_is_the_same_bit_for_bit() -> None:
    without, trainer = fit()
    state, after = trainer.optimizers[0].state_dict()["state"], torch.rand(3)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monitor = LeakageMonitor(every_n_steps=2, victims=2, attack=QUICK)
    watched, trainer = fit(monitor)
    assert [look["step"] for look in monitor.history] == [0, 2, 4]
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    for place, buffers in trainer.optimizers[0].state_dict()["state"].items():
        assert torch.equal(buffers["momentum_buffer"], state[place]["momentum_buffer"])
    assert without.drawn == watched.drawn
    assert torch.equal(after, torch.rand(3))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in watched.modules())


def test_what_it_logs_and_says(tmp_path: Path) -> None:
    monitor = LeakageMonitor(every_n_steps=4, victims=3, attack=QUICK)
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    fit(monitor, steps=4, logger=loggers)
    (look,) = monitor.history
    shares = {"label_accuracy", "success_rate", "identified"}
    names = shares | {"psnr", "mse", "ssim"}
    assert {*look} == names | {f"{name}_{end}" for name in names for end in ("low", "high")} | {
        *("step", "victims", "iterations", "seconds", "psnr_grey", "psnr_nearest")
    }
    assert look["victims"] == 3
    assert look["label_accuracy"] == 1.0  # single images: exact
    assert 0 < look["label_accuracy_low"] < 1
    (file,) = tmp_path.glob("csv/*/metrics.csv")
    assert "leakage/identified_low" in file.read_text()
    assert monitor.notes == [
        "dropout is off in the attacked copy",
        "in the attacked copy, BatchNorm uses its running statistics instead of the client's batch",
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = tmp_path.glob("tb/*")
    assert EventAccumulator(str(folder)).Reload().Tags()["images"] == ["leakage/gallery"]


@pytest.mark.parametrize("told", [{}, {"mean": [0.3], "std": [0.4]}])
def test_it_finds_what_leaks_also_of_normalised_images(told: dict[str, Any]) -> None:
    attack = GaussNewtonAttack(restarts=1)
    monitor = LeakageMonitor(every_n_steps=10, victims=2, network="net", attack=attack, budget=60.0, **told)
    fit(monitor, kind=Smooth, steps=1, scale=True)
    (look,) = monitor.history
    assert (look["success_rate"], look["identified"], look["label_accuracy"]) == (1.0, 1.0, 1.0)
    assert look["psnr"] > 60 > look["psnr_nearest"]
    assert bool(monitor.notes) != bool(told)


def test_images_set_aside_are_attacked_in_place_of_the_batch() -> None:
    images, labels = small_images().tensors
    figures = []
    for data in ((images[:3], labels[:3]), TensorDataset(images[:3], labels[:3])):
        monitor = LeakageMonitor(every_n_steps=10, victims=1, images=2, attack=QUICK, data=data, loss="cross_entropy")
        fit(monitor, steps=1)
        figures.append({name: value for name, value in monitor.history[0].items() if name != "seconds"})
    assert figures[0] == pytest.approx(figures[1], nan_ok=True)


@pytest.mark.slow
def test_budget_is_kept() -> None:
    monitor = LeakageMonitor(every_n_steps=1, victims=2, budget=2.0)
    start = time.perf_counter()
    fit(monitor, steps=2)
    assert len(monitor.history) == 2
    assert time.perf_counter() - start < 12  # twice 2 s, and a machine that does other things
    endless = LeakageMonitor(every_n_steps=9, victims=2, budget=1.5, attack=InvertingGradientsAttack(steps=10**6))
    fit(endless, steps=1)
    assert endless.history[0]["iterations"] < 10**5
    assert endless.history[0]["seconds"] < 8


class Broken(Classifier):
    """Takes something else than its batches."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("no evaluation here")
        return super().forward(images)


def test_a_failure_is_a_warning_and_training_goes_on() -> None:
    without, _ = fit(kind=Broken, steps=2)
    monitor = LeakageMonitor(every_n_steps=1, attack=QUICK)
    with pytest.warns(UserWarning, match="no figures at step 0; the training continues: ValueError: .*no evaluation"):
        module, trainer = fit(monitor, kind=Broken, steps=2)
    assert not monitor.history
    assert trainer.global_step == 2
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), module.parameters(), strict=True))


class NoForward(LightningModule):
    """Calls a part of itself, as many modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_forward_is_told_to_name_its_network() -> None:
    with pytest.warns(UserWarning, match=r"or its part that has one as `network` \(one of \['net'\]\), but got NoForw"):
        fit(LeakageMonitor(every_n_steps=1, attack=QUICK), kind=NoForward, steps=1)
    named = LeakageMonitor(every_n_steps=1, attack=QUICK, network="net")
    fit(named, kind=NoForward, steps=1)
    assert named.history


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ("text", "Expected a batch of images and labels, but got str"),
        ((torch.zeros(3, 4), torch.zeros(3)), r"Expected images \(B, C, H, W\) and whole labels .* but got \[\(3, 4\)"),
        ((torch.zeros(1, 1, 12, 12), torch.zeros(1).long()), "at least `images` = 2 images, but got a batch of 1"),
    ],
)
def test_batches_it_can_not_use(batch: Any, match: str) -> None:
    monitor = LeakageMonitor(images=2, attack=QUICK)
    with pytest.raises(ValueError, match=match):
        monitor._look(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), Classifier(), batch)


def test_resuming_looks_when_it_is_due() -> None:
    monitor = LeakageMonitor(every_n_steps=4, attack=QUICK)
    monitor.load_state_dict({"next": 4})
    fit(monitor, steps=6)
    assert [look["step"] for look in monitor.history] == [4]
    assert monitor.state_dict() == {"next": 8}


def test_bad_settings() -> None:
    for options, match in (
        ({"every_n_steps": 0}, "Expected `every_n_steps` to be a whole number of at least 1, but got 0"),
        ({"budget": 0}, "Expected `budget` to be positive and finite, but got 0"),
        ({"attack": "idlg"}, "Expected `attack` to be a leakage.attacks.GradientInversion, but got 'idlg'"),
        ({"mean": [0.5]}, r"Expected `mean` and `std` together, but got mean=\[0.5\] and std=None"),
        ({"los": "mse"}, "Expected settings of a leakage.Victim, but got: .*'los'"),
        ({"local_steps": 3}, "Expected a `learning_rate` for 3 local steps"),
    ):
        with pytest.raises(ValueError, match=match):
            LeakageMonitor(**options)  # type: ignore[arg-type]


def disturb() -> None:
    with undisturbed():
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("medium")
        seed_everything(5, verbose=False)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RuntimeError("inside")


def test_undisturbed_restores_after_an_error() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = torch.get_rng_state(), random.getstate(), torch.get_float32_matmul_precision()
        with pytest.raises(RuntimeError, match="inside"):
            disturb()
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), torch.get_float32_matmul_precision())
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    finally:
        torch.use_deterministic_algorithms(False)
