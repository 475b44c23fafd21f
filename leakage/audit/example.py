"""The module and data that ``leakage audit --example`` audits: a LeNet on the bundled sample."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from leakage.datamodules.sources import Source
from leakage.models import LeNet


class ExampleModule(LightningModule):
    """An untrained LeNet, as in the papers, that classifies images of 28x28 pixels with cross-entropy and SGD.

    Args:
        learning_rate: the learning rate of SGD.

    Example:
        >>> ExampleModule()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.network = LeNet()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, 10)``."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD over all parameters."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class ExampleData(LightningDataModule):
    """The bundled sample: 1,000 test images of FashionMNIST."""

    def setup(self, stage: str | None = None) -> None:
        """Read the images."""
        self.images = Source("sample").open()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader that shuffles the images in each epoch."""
        return DataLoader(self.images, batch_size=32, shuffle=True)
