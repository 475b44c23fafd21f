"""Modules and data as users write them, each with one thing of its own."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import Normalize

from leakage.datamodules import Source


class Small(LightningModule):
    """A network of two linear layers, 12x12 pixels, four classes."""

    def __init__(self, *layers: nn.Module, learning_rate: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            between = layers or (nn.Sigmoid(),)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), *between, nn.Linear(16, 10))
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Scaled(Small):
    """Twice the loss."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 2 * F.cross_entropy(self(batch[0]), batch[1])


class OtherLoss(Small):
    """Cross-entropy with other options."""

    def __init__(self, *layers: nn.Module, **options: Any) -> None:
        super().__init__(*layers)
        self.loss = nn.CrossEntropyLoss(**options)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


class OfLogProbabilities(Small):
    """Cross-entropy in two functions, the first in the network or not."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.function = function
        if function is None:
            self.net.append(nn.LogSoftmax(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        given = self(batch[0])
        return F.nll_loss(given if self.function is None else self.function(given, 1), batch[1])


def dropping() -> Small:
    """A network with dropout before its last layer."""
    return Small(nn.Sigmoid(), nn.Dropout(0.3))


# The losses of torch that clients can declare.
LOSSES = [
    OtherLoss(label_smoothing=0.2),
    OtherLoss(weight=torch.linspace(0.5, 5, 10)),
    OfLogProbabilities(),
    OfLogProbabilities(F.log_softmax),
    OfLogProbabilities(Tensor.log_softmax),
]


class Penalised(Small):
    """Weight decay as a part of the loss."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * sum(one.square().sum() for one in self.parameters())


class Binary(Small):
    """A binary problem for each class, of classes or of several labels."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        labels = batch[1] if batch[1].ndim == 2 else F.one_hot(batch[1], 10)
        return F.binary_cross_entropy_with_logits(self(batch[0]), labels.float())


class Focal(Small):
    """A loss of its own, with metrics and records."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.recorded, self.total = MulticlassAccuracy(10), list[float](), 0.0
        self.metrics = MetricCollection([MulticlassAccuracy(10)])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        each = F.cross_entropy(logits, batch[1], reduction="none")
        loss = ((1 - (-each).exp()) ** 2 * each).mean()
        self.log("accuracy", self.accuracy(logits, batch[1]))
        self.log("other", self.metrics(logits, batch[1])["MulticlassAccuracy"])
        self.recorded.append(loss.item())
        self.total += float(loss.detach())
        return loss


class Regression(Small):
    """One number for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = nn.Linear(16, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]).squeeze(1), batch[1].float())


class Autoencoder(Small):
    """Batches of images alone, or with labels that are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = nn.Linear(16, 144)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch if isinstance(batch, Tensor) else batch[0]
        return F.mse_loss(self(images), images.flatten(1))


class Selecting(Small):
    """Labels select: a vector, and probabilities in two ways. It needs a Trainer, and collects what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.found = nn.Embedding(10, 10), {"losses": list[Tensor]()}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        apart = (logits - self.centres(labels)).square().mean()
        one, other = (
            logits.softmax(1).gather(1, labels[:, None]),
            logits.log_softmax(1)[torch.arange(len(images)), labels],
        )
        self.found["losses"].append(apart)
        return apart - one.log().mean() - other.mean() / self.trainer.world_size


class Parity(Small):
    """The loss has no derivative by the classes."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], (batch[1] % 2).float())


class Bytes(Small):
    """Whole-number images, which the step scales."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 2 * F.cross_entropy(self(batch[0].float() / 255), batch[1])


class OneClass(Small):
    """Is it a bag? One logit, and labels as floats, some of them in a column."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        labels = batch[1].view(-1).float()
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (labels - 4) ** 2 / 25)


class Hooked(Small):
    """A loss that says nothing of what becomes of its gradient."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        logits.register_hook(lambda gradient: 3 * gradient)
        return F.cross_entropy(logits, batch[1])


class Inside(Small):
    """Images are changed within the step, so that no layer takes them as they are."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(0.5 * batch[0] - 0.1), batch[1])}


class OfDicts(Small):
    """Batches are dicts with more than images and labels."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert len(batch["path"])
        assert len(batch["weight"]) == len(batch["image"])
        return F.cross_entropy(self(batch["image"]).squeeze(1), batch["label"].squeeze(1))


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Images(Dataset[Any]):
    """The sample at 12x12 pixels."""

    def __init__(self, number: int = 200, transform: Any = None, *, kind: str = "tuple") -> None:
        source = Source("sample").open()
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:number]
        self.items = [source[int(place)] for place in order]
        self.transform, self.kind = transform, kind

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        image, label = self.items[index]
        image = F.interpolate(image[None], (12, 12), mode="area")[0]
        if self.kind == "uint8":
            image = (image * 255).byte()
        image = image if self.transform is None else self.transform(image)
        if self.kind == "dict":
            return {"path": str(index), "weight": torch.tensor(1.0), "label": torch.tensor([label]), "image": image}
        if self.kind == "weights":
            return {"weight": image.mean(), "label": torch.tensor([label]), "image": image}
        if self.kind == "column":
            return image, torch.tensor([float(label)])
        if self.kind == "scaled":
            image = 4 * image - 2
        if self.kind == "alone":
            return image
        if self.kind in ("soft", "several", "truths", "numbers"):
            one, other = F.one_hot(torch.tensor([label, (label + index) % 10]), 10)
            several = one | other
            kinds = {
                "soft": 0.7 * one + 0.3 * other,
                "several": several,
                "truths": several > 0,
                "numbers": image.mean(),
            }
            return image, kinds[self.kind]
        return image, label


class Data(LightningDataModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.images = Images(**options)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, batch_size=16, shuffle=True)


def normalised() -> Data:
    return Data(transform=Normalize(0.3, 0.4))
