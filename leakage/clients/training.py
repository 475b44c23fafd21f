"""Networks after a few epochs of training: what a client's network is later in federated learning."""

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
from leakage.datamodules import LabelledImages, in_unit_range
from leakage.errors import check_choice, check_count, check_positive
from leakage.files.checkpoints import WholeCheckpointIO
from leakage.files.text import write_json
from leakage.models import draw_state
from leakage.pieces import digest
from leakage.seeds import derive_seed

_MOMENTUM, _WEIGHT_DECAY = 0.9, 5e-4
_PRECISIONS = ("32-true", "bf16-mixed")
# Test images at a time; many more are slower on the CPU, whose caches don't hold them.
_TESTED_AT_ONCE = 16


@dataclass
class TrainedNetwork:
    """A network after some epochs of training.

    Attributes:
        model: in evaluation mode, on the CPU, float32; images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``. What
            normalises the images is its first part.
        epochs: how often it has seen each of its images.
        seen: ``(M,)`` int64, ascending, the indices in ``data.train`` of the images it was trained on (for 0 epochs
            would be).
        accuracy: share of the test images that it labels correctly, 0 to 1.
        train_accuracy: the same of its training images, during the last epoch; NaN for 0 epochs.
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
    """Train a network, or read it from the cache: plain SGD on the cross-entropy, no augmentation.

    Momentum 0.9, weight decay 5e-4, the same rate in all epochs. The first weights are those that
    :func:`~leakage.models.draw_state` draws from ``seed``; the images of epoch e are shuffled by ``seed`` and e. So
    the network depends on the arguments alone (on the CPU; up to rounding elsewhere), and the global random state is
    left as it was.

    Each training has a folder under ``root``, named by a hash of all that decides its result but ``epochs``: the
    network's layers and first weights, the data, ``num_images``, ``learning_rate``, ``batch_size``, ``seed`` and
    ``precision``. In it are checkpoints after the epochs that were asked for. Training goes on from the last that is
    not beyond ``epochs``, to the same weights as without a break. Networks whose layers print alike but compute
    differently need a ``root`` each.

    Args:
        model: an architecture, left as it is, see :data:`leakage.models.NETWORKS`; takes normalised images.
        data: made ready (``prepare_data``, ``setup``) if it is not yet.
        epochs: passes over the images; 0 for the first weights.
        num_images: train on so many of the training images, drawn by ``seed``; by default on all.
        learning_rate: of SGD. The default serves MLP, LeNet, ConvNet, and VGG11 and ResNet18 with
            ``norm="batch"``. LeNet with ``"relu"`` or ``"silu"``, whose first weights are large, needs a tenth of it;
            VGG11 with ``norm="none"`` stays at chance for epochs.
        batch_size: images in a batch at most; an epoch's batches are of one size, give or take one image.
        seed: of weights, images and orders.
        precision: ``"32-true"`` or ``"bf16-mixed"``, of the training; weights and test are float32.
        root: the folder of the cache, by default ``~/.cache/leakage/networks``.
        accelerator: as for Lightning's Trainer.
        progress: show a bar.

    Raises:
        ValueError: a network that does not fit the data or can't be drawn anew, an option out of its range, more
            ``num_images`` than there are, or a checkpoint in the cache that is broken (delete it to train anew).
        FloatingPointError: weights that are no longer finite, with the epoch and the rate.
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
    *_, classes = inspect_model(network.eval(), data.image_shape, 2)
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
    """A training on a data set in memory that is kept, and read the next time.

    What is trained is a LightningModule whose batches are uint8 images and labels, which says itself what belongs into
    its checkpoints, and draws nothing that it does not seed at the beginning of an epoch.

    Attributes:
        seen: ``(M,)``, ascending, the indices of the images to train on.

    Args:
        data: made ready if it is not yet.
        epochs, num_images, batch_size, seed, precision, root, accelerator, progress: see :func:`trained_network`.

    Raises:
        ValueError: other data, an option out of its range, or more ``num_images`` than there are.
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
        """Train and test it, or read it; it is on the CPU and in evaluation mode then.

        Args:
            module: with its first weights.
            name: of its folder, before the hash.
            configuration: all that decides the result but the data and the options here.

        Raises:
            ValueError: a checkpoint in the cache that is broken.
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
            write_json(folder / "configuration.json", configuration)  # where that fails, better before than after
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
                    generator=torch.Generator(),  # nothing is drawn, but one without advances the global one
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
    """Raise a ``FloatingPointError`` if training has spoilt them."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"Expected finite weights in training, but got NaN or inf in {name!r} in epoch "
                f"{epoch + 1} with learning_rate={learning_rate:g}. Lower `learning_rate`."
            )


class Classifier(LightningModule):
    """A network ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)`` that learns by SGD on the cross-entropy."""

    def __init__(self, model: nn.Module, num_classes: int, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.seed = seed
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.accuracy = self.seen_accuracy = math.nan

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum and weight decay."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, self.learning_rate, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)

    def on_train_epoch_start(self) -> None:
        """Dropout is the same whether or not the training had a break before."""
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, "training dropout"))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        logits = self.model(in_unit_range(images))
        self.train_accuracy.update(logits, labels)
        return F.cross_entropy(logits, labels)

    def on_train_epoch_end(self) -> None:
        """Look at the weights before they are kept."""
        check_weights(self.model, self.current_epoch, self.learning_rate)
        self.seen_accuracy = round(float(self.train_accuracy.compute()), 6)
        self.train_accuracy.reset()
        self.log("train/accuracy", self.seen_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count what is labelled correctly."""
        for images, labels in zip(*(torch.split(part, _TESTED_AT_ONCE) for part in batch), strict=True):
            self.test_accuracy.update(self.model(images), labels)

    def on_test_epoch_end(self) -> None:
        """Keep the share."""
        self.accuracy = round(float(self.test_accuracy.compute()), 6)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the accuracies."""
        checkpoint["leakage"] = {"test": self.accuracy, "train": self.seen_accuracy}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.accuracy, self.seen_accuracy = checkpoint["leakage"]["test"], checkpoint["leakage"]["train"]


class _Order(Sampler[Tensor]):
    """The indices of each batch of an epoch; Lightning tells which epoch, but for the first of a run."""

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
        # Of one size, so that no last batch is too small for BatchNorm.
        return iter(order.tensor_split(self.batches))


def _choose_images(data: LabelledImages, num_images: int | None, seed: int) -> Tensor:
    """Indices, ascending, of the images to train on."""
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
