"""A small labelled data set that tests can write down, and a run on it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from leakage.condensation import Condensation, GradientMatchingCondensation
from leakage.datamodules import LabelledImages, LabelledTensors
from leakage.models import ConvNet

COUNTS = (9, 5, 7)


class Stripes(LabelledImages):
    """Noisy stripes of three widths; the classes have 9, 5 and 7 training images."""

    def __init__(self, *, channels: int = 1, side: int = 8, **options: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        labels = torch.cat([torch.full((count,), label) for label, count in enumerate(COUNTS)])
        # Not in the order of the classes.
        labels = labels[torch.randperm(len(labels), generator=generator)]
        stripes = torch.arange(side)[None, None, None, :] // (labels + 1)[:, None, None, None] % 2
        noise = torch.randint(100, (len(labels), channels, side, side), generator=generator)
        images = (stripes * 120 + noise + 20 * torch.arange(channels)[None, :, None, None]).byte()
        names = ("narrow", "middle", "wide")
        super().__init__((LabelledTensors(images, labels, names), LabelledTensors(images[:6], labels[:6])), **options)
        self.name = "stripes"


def small(**options: Any) -> ConvNet:
    """A network for stripes, with two blocks."""
    return ConvNet(**{"image_size": 8, "num_classes": 3, "width": 4, "depth": 2} | options)


def trainer(**options: Any) -> Trainer:
    """A plain Trainer."""
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**defaults | options)


def condense(
    images_per_class: int = 1,
    *,
    kind: Callable[..., Condensation] = GradientMatchingCondensation,
    data: LabelledImages | None = None,
    data_batch_size: int = 6,
    network: nn.Module | None = None,
    ckpt_path: Any = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A run on stripes."""
    condensation = kind(images_per_class, network=small() if network is None else network, **options)
    kit_trainer(**trainer or {}).fit(
        condensation, datamodule=Stripes(batch_size=data_batch_size) if data is None else data, ckpt_path=ckpt_path
    )
    return condensation


kit_trainer = trainer


def images_of(condensation: Condensation) -> Tensor:
    """The synthetic images as they are, a copy."""
    return condensation.synthetic_images.detach().clone()


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What the tests of condensation share."""
    return SimpleNamespace(
        data=Stripes, network=small, trainer=trainer, condense=condense, images=images_of, counts=COUNTS
    )
