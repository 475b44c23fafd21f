"""Networks after some epochs of training, as clients have them later in federated learning."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import Normalize

from leakage.clients.inspection import inspect_model
from leakage.clients.protocol import Protocol
from leakage.datamodules import LabelledImages, in_unit_range
from leakage.errors import check_choice, check_count, check_positive
from leakage.files.checkpoints import WholeCheckpointIO
from leakage.files.text import write_json
from leakage.models import draw_state
from leakage.pieces import digest
from leakage.seeds import derive_seed

_MOMENTUM, _WEIGHT_DECAY = 0.9, 5e-4
_PRECISIONS = ("32-true", "bf16-mixed")
# Number of test images at once; many more are slower on the CPU, as they don't fit its caches.
_TESTED_AT_ONCE = 16


@dataclass
class TrainedNetwork:
    """A network after some epochs of training.

    Attributes:
        model: maps images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``; in evaluation mode, on the CPU, in float32.
            Its first module normalises the images.
        epochs: number of passes over its training images.
        seen: ``(M,)`` int64, ascending, indices in ``data.train`` of the images that it was trained on (with 0 epochs,
            would have been trained on).
        accuracy: share of the test images that it classifies correctly, 0 to 1.
        train_accuracy: share of the training images that it classified correctly in the last epoch, 0 to 1; NaN for 0
            epochs.
    """

    model: nn.Module
    epochs: int
    seen: Tensor
    accuracy: float
    train_accuracy: float


@torch.inference_mode(False)
@torch.enable_grad()
def trained_network(
    model: nn.Module,
    data: LabelledImages,
    *,
    epochs: int,
    num_images: int | None = None,
    learning_rate: float = 0.01,
    batch_size: int = 64,
    seed: int = 0,
    precision: str = "32-true",
    root: str | os.PathLike[str] | None = None,
    accelerator: str = "auto",
    progress: bool = True,
) -> TrainedNetwork:
    """Train a network, or read it from the cache: SGD on the cross-entropy, without augmentation.

    Training uses momentum 0.9, weight decay 5e-4 and a constant learning rate. The initial weights are those that
    :func:`~leakage.models.draw_state` draws from ``seed``; the images of epoch e are shuffled by ``seed`` and e. The
    network therefore depends on the arguments alone (on the CPU; up to rounding on other devices), and the global
    random state does not change.

    Each training has a folder under ``root``. Its name is a hash of everything that determines the result except
    ``epochs``: the network's layers and initial weights, the data, ``num_images``, ``learning_rate``, ``batch_size``,
    ``seed`` and ``precision``. The folder holds a checkpoint for each number of epochs that was requested. Training
    continues from the latest one that is not beyond ``epochs``, and gives the same weights as without the
    interruption. Networks whose layers print alike but compute differently each need a separate ``root``.

    Args:
        model: an architecture, such as those in :data:`leakage.models.NETWORKS`; takes normalised images. It is not
            changed.
        data: the data set; ``prepare_data`` and ``setup`` are called if needed.
        epochs: number of passes over the images; 0 returns the initial weights.
        num_images: number of training images to use, drawn by ``seed``; by default all.
        learning_rate: learning rate of SGD. The default works for MLP, LeNet, ConvNet, and for VGG11 and ResNet18 with
            ``norm="batch"``. LeNet with ``"relu"`` or ``"silu"``, whose initial weights are large, needs a tenth of it;
            VGG11 with ``norm="none"`` stays at chance for epochs.
        batch_size: largest number of images in a batch; the batches of an epoch differ in size by at most one image.
        seed: seed of the weights, the choice of images and their order.
        precision: ``"32-true"`` or ``"bf16-mixed"``, the precision of the training; weights and tests are in float32.
        root: the folder of the cache, by default ``~/.cache/leakage/networks``.
        accelerator: as for Lightning's Trainer.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the network does not fit the data or can't be drawn anew, an option is out of its range,
            ``num_images`` is larger than the data set, or a checkpoint in the cache is broken (delete it to train
            anew).
        FloatingPointError: weights are no longer finite; the message names the epoch and the learning rate.
        OSError: the cache can't be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from leakage.datamodules import LabelledImages
        >>> from leakage.models import MLP
        >>> with TemporaryDirectory() as root:
        ...     data = LabelledImages("sample")
        ...     trained = trained_network(MLP(), data, epochs=2, num_images=100, root=root, progress=False)
        >>> trained.model(torch.rand(5, 1, 28, 28)).shape, len(trained.seen), 0 <= trained.accuracy <= 1
        (torch.Size([5, 10]), 100, True)
    """
    check_positive(learning_rate=learning_rate)
    check_choice("precision", precision, _PRECISIONS)
    training = CachedTraining(data, epochs, num_images, batch_size, seed, precision, root, accelerator, progress)
    seen = training.seen
    network = copy.deepcopy(model).cpu().float()
    *_, classes = inspect_model(network.eval(), Protocol(data.image_shape, 1, 2))
    if classes != data.num_classes:
        raise ValueError(
            f"Expected a `model` with a logit for each of the {data.num_classes} classes of {data.name!r}, but got "
            f"{classes}."
        )
    first = draw_state(network, seed)
    network.load_state_dict(first, strict=False)  # of tied weights only the first are drawn
    classifier = Classifier(
        nn.Sequential(Normalize(data.mean, data.std), network), data.num_classes, learning_rate, seed
    )
    configuration = {
        "layers": str(network),
        "weights": digest(first),
        "trained": [name for name, parameter in network.named_parameters() if parameter.requires_grad],
        "learning_rate": float(learning_rate),
        "momentum": _MOMENTUM,
        "weight_decay": _WEIGHT_DECAY,
    }
    training.run(classifier, type(model).__name__.lower(), configuration)
    return TrainedNetwork(classifier.model, epochs, seen, classifier.accuracy, classifier.seen_accuracy)


@dataclass
class CachedTraining:
    """A training on a data set in memory whose result is cached.

    It trains a LightningModule whose batches are uint8 images and labels. The module decides what its checkpoints hold,
    and must seed all random numbers at the beginning of each epoch.

    Attributes:
        seen: ``(M,)``, ascending, indices of the images to train on.

    Args:
        data: the data set; ``prepare_data`` and ``setup`` are called if needed.
        epochs, num_images, batch_size, seed, precision, root, accelerator, progress: see :func:`trained_network`.

    Raises:
        ValueError: ``data`` is no :class:`~leakage.datamodules.LabelledImages`, an option is out of its range, or
            ``num_images`` is larger than the data set.
    """

    data: LabelledImages
    epochs: int
    num_images: int | None
    batch_size: int
    seed: int
    precision: str
    root: str | os.PathLike[str] | None
    accelerator: str
    progress: bool

    def __post_init__(self) -> None:
        if not isinstance(self.data, LabelledImages):
            raise ValueError(f"Expected `data` to be a LabelledImages, but got {type(self.data).__name__}.")
        check_count(0, epochs=self.epochs, seed=self.seed)
        check_count(batch_size=self.batch_size)
        if not hasattr(self.data, "test"):
            self.data.prepare_data()
            self.data.setup("fit")
        self.seen = _choose_images(self.data, self.num_images, self.seed)

    def run(self, module: LightningModule, name: str, configuration: dict[str, Any]) -> None:
        """Train and test the module, or read it from the cache, and leave it on the CPU in evaluation mode.

        Args:
            module: the module with its initial weights.
            name: prefix of the folder's name, before the hash.
            configuration: everything that determines the result besides the data and the options of this object.

        Raises:
            ValueError: a checkpoint in the cache is broken.
            OSError: the cache can't be written.
        """
        data, epochs = self.data, self.epochs
        configuration = {
            "format": 2,
            "data": {name: value for name, value in data.configuration.items() if name not in ("batch_size", "seed")},
            "test": digest({"images": data.test.images[::97], "labels": data.test.labels}),
            "images": len(self.seen),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": self.precision,
            **configuration,
        }
        key = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(self.root or "~/.cache/leakage/networks").expanduser() / f"{name}_{key}"
        if not (folder / "configuration.json").is_file():
            write_json(folder / "configuration.json", configuration)  # if this fails, better before the training
        kept = [int(path.stem.removeprefix("epoch_")) for path in folder.glob("epoch_*.ckpt")]
        done = max((epoch for epoch in kept if epoch <= epochs), default=0)
        last, goal = (folder / f"epoch_{epoch}.ckpt" for epoch in (done, epochs))
        if done:
            checkpoint = WholeCheckpointIO().load_checkpoint(last)
            module.load_state_dict(checkpoint["state_dict"])
            module.on_load_checkpoint(checkpoint)
        options: dict[str, Any] = {
            "accelerator": self.accelerator,
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": self.progress,
            "plugins": [WholeCheckpointIO()],
        }
        precision = cast('Literal["32-true", "bf16-mixed"]', self.precision)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
            # The images are in memory: workers would only copy them.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            trainer = Trainer(max_epochs=epochs, precision=precision, **options)
            if done < epochs:
                batches: DataLoader[Any] = DataLoader(
                    TensorDataset(data.train.images, data.train.labels),
                    batch_size=None,
                    sampler=_Order(self.seen, self.batch_size, self.seed, done),
                    generator=torch.Generator(),  # not used, but without it the global one advances
                )
                trainer.fit(module.train(), batches, ckpt_path=last if done else None)
            module.eval()
            if done < epochs or not epochs:
                Trainer(**options).test(module, data.test_dataloader(), verbose=False)
            if done < epochs:
                trainer.save_checkpoint(goal)
        module.zero_grad(set_to_none=True)
        module.cpu()


def check_weights(model: nn.Module, epoch: int, learning_rate: float) -> None:
    """Raise a ``FloatingPointError`` unless all weights of a model in training are finite."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"Expected finite weights in training, but got NaN or inf in {name!r} in epoch "
                f"{epoch + 1} with learning_rate={learning_rate:g}. Lower `learning_rate`."
            )


class Classifier(LightningModule):
    """Trains a network, images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, by SGD on the cross-entropy."""

    def __init__(self, model: nn.Module, num_classes: int, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.seed = seed
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.accuracy = self.seen_accuracy = math.nan

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum and weight decay."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, self.learning_rate, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)

    def on_train_epoch_start(self) -> None:
        """Seed dropout, so that an interrupted training continues in the same way."""
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, "training dropout"))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        logits = self.model(in_unit_range(images))
        self.train_accuracy.update(logits, labels)
        return F.cross_entropy(logits, labels)

    def on_train_epoch_end(self) -> None:
        """Check the weights before they are saved, and compute the training accuracy."""
        check_weights(self.model, self.current_epoch, self.learning_rate)
        self.seen_accuracy = round(float(self.train_accuracy.compute()), 6)
        self.train_accuracy.reset()
        self.log("train/accuracy", self.seen_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the images that are classified correctly."""
        for images, labels in zip(*(torch.split(part, _TESTED_AT_ONCE) for part in batch), strict=True):
            self.test_accuracy.update(self.model(images), labels)

    def on_test_epoch_end(self) -> None:
        """Compute the test accuracy."""
        self.accuracy = round(float(self.test_accuracy.compute()), 6)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the accuracies to the checkpoint."""
        checkpoint["leakage"] = {"test": self.accuracy, "train": self.seen_accuracy}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the accuracies from the checkpoint."""
        self.accuracy, self.seen_accuracy = checkpoint["leakage"]["test"], checkpoint["leakage"]["train"]


class _Order(Sampler[Tensor]):
    """Yields the indices of each batch of an epoch; Lightning sets the epoch, except for the first of a run."""

    def __init__(self, indices: Tensor, batch_size: int, seed: int, epoch: int) -> None:
        self.indices = indices
        self.batches = math.ceil(len(indices) / batch_size)
        self.seed = seed
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, "training order"))
        order = self.indices[torch.randperm(len(self.indices), generator=generator)]
        # Batches of nearly equal size, so that the last one is not too small for BatchNorm.
        return iter(order.tensor_split(self.batches))


def _choose_images(data: LabelledImages, num_images: int | None, seed: int) -> Tensor:
    """Return the indices of the images to train on, ascending."""
    there = len(data.train)
    if num_images is None:
        return torch.arange(there)
    check_count(num_images=num_images)
    if num_images > there:
        raise ValueError(
            f"Expected `num_images` of at most {there}, the training images of {data.name!r}, but got {num_images}."
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, "training images"))
    return torch.randperm(there, generator=generator)[:num_images].sort().values
