"""A tiny condensation, and callbacks that look at it, for the tests of its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from leakage.callbacks import CondensationProgressBar, SyntheticEvaluation
from leakage.condensation import GradientMatchingCondensation
from leakage.datamodules import LabelledImages, LabelledTensors
from leakage.models import ConvNet


class Stripes(LabelledImages):
    """Noisy stripes of three widths."""

    def __init__(self, channels: int = 1) -> None:
        generator = torch.Generator().manual_seed(5)
        labels = torch.arange(3).repeat_interleave(10)
        stripes = torch.arange(8)[None, None, None, :] // (labels + 1)[:, None, None, None] % 2
        noise = torch.randint(100, (len(labels), channels, 8, 8), generator=generator)
        images = LabelledTensors((stripes * 120 + noise).byte(), labels, ("narrow", "middle", "wide"))
        super().__init__((images, images), batch_size=4)
        self.name = "stripes"


def network(channels: int = 1) -> ConvNet:
    return ConvNet(channels, 8, 3, width=4, depth=1)


def module(iterations: int = 4, images_per_class: int = 1, channels: int = 1, **options: Any):
    return GradientMatchingCondensation(
        images_per_class, network=network(channels), iterations=iterations, **{"loops": (1, 1)} | options
    )


def fit(condensation: LightningModule, *callbacks: Callback, channels: int = 1, resume=None, **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, CondensationProgressBar) for callback in callbacks),
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(callbacks=list(callbacks), **defaults | options)
    trainer.fit(condensation, datamodule=Stripes(channels), ckpt_path=resume)
    return trainer


def quick(folder: Path, at=(0, 2), **options: Any) -> SyntheticEvaluation:
    return SyntheticEvaluation(at, output=folder, **{"networks": 3, "epochs": 4} | options)


class At(Callback):
    """Calls a function after a training step."""

    def __init__(self, step: int, function: Callable[..., Any]) -> None:
        self.step, self.function = step, function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.step == self.step:
            self.function(trainer, pl_module)


def fail(*args: object) -> None:
    raise RuntimeError("out of memory")


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


class Copies(Callback):
    """What the images were after each iteration, in the data's scale."""

    def __init__(self) -> None:
        self.of: dict[int, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        self.of[pl_module.step] = pl_module.synthetic_set().images

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.of[pl_module.step] = pl_module.synthetic_set().images
