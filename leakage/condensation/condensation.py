"""The base class of condensations: the module that a Trainer runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from leakage.condensation.augmentation import SiameseAugmentation
from leakage.condensation.decoding import decode
from leakage.condensation.embeddings import embedding_layer
from leakage.condensation.fresh import FreshNetworks, Goal, Networks
from leakage.condensation.kmeans import Clusters
from leakage.condensation.matching import Matching
from leakage.condensation.networks import fitting_network
from leakage.condensation.pool import NetworkPool
from leakage.condensation.protocols import CondensationProtocol
from leakage.condensation.recipe import Recipe
from leakage.condensation.start import start_images
from leakage.condensation.synthetic_set import SyntheticSet
from leakage.datamodules.labelled import ClassBatch, LabelledImages
from leakage.errors import check_choice, check_count
from leakage.files.checkpoints import check_checkpoint
from leakage.plots import save_figure
from leakage.seeds import derive_seed

_PRECISIONS = ("32-true", "64-true", "bf16-mixed")
# The parts that the time of a run is split into.
PARTS = ("real", "synthetic", "network", "evaluation")
# What a checkpoint keeps besides images, network and momentum, which Lightning saves.
_KEPT = ("step", "last_loss", "seconds", "real_images_seen")


class Condensation(LightningModule):
    """Base class of condensations: the synthetic images, their updates, checkpoints and results.

    Each network in turn sees real and synthetic images of every class. The synthetic images are moved so that some
    statistic of the network on them, such as its gradient, comes closer to that on the real images. A subclass defines
    the statistic (:meth:`configure_matching`), and sets :attr:`protocol`, :attr:`outer` (unless it is 1) and
    :attr:`inner` (unless it is 0).

    All iterations are one epoch of the Trainer. The images are normalised and never clamped.

    Attributes:
        synthetic_images: the parameters, normalised, ``(K * images_per_class, C, H, W)`` in the order of the classes.
        seconds: time spent so far on real images (``"real"``), on synthetic images (``"synthetic"``), on drawing and
            training networks (``"network"``) and in callbacks that evaluate (``"evaluation"``).
        last_loss: the sum of the distances over classes at the last step.
        step: number of complete training steps.
        within_step: whether a training step has begun but is not complete.
        protocol: the protocol of the search.
        outer: steps on each network.
        inner: epochs for which the network is trained on the synthetic images between two steps.
        method: the name of the method in a recipe.

    Args:
        images_per_class: synthetic images of each class.
        num_classes: number of classes, checked against the data; by default that of the data.
        network: architecture, drawn anew for each iteration; by default the :class:`~leakage.models.ConvNet` that fits
            the data, with ``network_width`` channels. It takes normalised images. Dropout is off; BatchNorm takes its
            statistics from real images.
        augmentation: strategy of :class:`~leakage.condensation.SiameseAugmentation`, the same random transform for real
            and synthetic images of a class (DSA); None for no augmentation.
        seed: seed of networks, initial images, order and augmentation, each with its own stream.
        iterations, batch_size, network_reuse, learning_rate, momentum, decay, initialization: replace the values of
            the protocol, see :class:`~leakage.condensation.CondensationProtocol`.
        real_images, factor, synthetic_batch_size, pool, pool_passes, network_width: replace further values of the
            protocol.

    Raises:
        ValueError: a number is out of range; in ``fit``, the DataModule is not a
            :class:`~leakage.datamodules.LabelledImages`, the network does not fit its images, ``factor`` does not
            divide their size, a class has too few real images to start from, the checkpoint has another configuration,
            or the Trainer has already fitted. With clustered real images also if a batch is larger than a class, or the
            logits of the network are not the output of a linear layer.
        FloatingPointError: in ``fit``, a loss or derivative is not finite. The images are then the last ones for which
            both were finite since the run began or was resumed.

    Example:
        >>> from leakage.condensation import DistributionMatchingCondensation
        >>> condensation = DistributionMatchingCondensation(10)
        >>> isinstance(condensation, Condensation), condensation.protocol.learning_rate
        (True, 1.0)
    """

    protocol: CondensationProtocol
    outer = 1
    inner = 0
    method: str

    def __init__(
        self,
        images_per_class: int = 1,
        num_classes: int | None = None,
        *,
        network: nn.Module | None = None,
        augmentation: str | None = None,
        seed: int = 0,
        iterations: int | None = None,
        batch_size: int | None = None,
        network_reuse: int | None = None,
        learning_rate: float | None = None,
        momentum: float | None = None,
        decay: bool | None = None,
        initialization: str | None = None,
        real_images: str | None = None,
        factor: int | None = None,
        synthetic_batch_size: int | None = None,
        pool: int | None = None,
        pool_passes: int | None = None,
        network_width: int | None = None,
    ) -> None:
        super().__init__()
        check_count(images_per_class=images_per_class)
        if num_classes is not None:
            check_count(2, num_classes=num_classes)
        check_count(0, seed=seed)
        if network is not None and not isinstance(network, nn.Module):
            raise ValueError(f"Expected `network` to be a torch.nn.Module, but got {type(network).__name__}.")
        self.augmentation = None if augmentation is None else SiameseAugmentation(augmentation)
        self.save_hyperparameters(ignore=["network"])
        self.automatic_optimization = False
        # In a tuple, so that it does not become a submodule: the user's network is not changed, `network` is a copy.
        self._given_network = (network,)
        self.network: nn.Module = nn.Identity()
        self.synthetic_images = nn.Parameter(torch.empty(0, 1, 1, 1))
        self._about_data: dict[str, Any] = {}  # what a synthetic set records about its data set
        self._networks: Networks
        self._reset()

    @abstractmethod
    def configure_matching(self, data: LabelledImages) -> Matching:
        """Return the statistic of :attr:`network` that is to be matched on real and synthetic images.

        Raises:
            ValueError: the network does not have this statistic.
        """

    def _replaced(self) -> dict[str, Any]:
        """Return the values of the protocol that the user has replaced, None for the others."""
        return {field.name: self.hparams[field.name] for field in dataclasses.fields(CondensationProtocol)}

    def _reset(self) -> None:
        self.step = 0
        self.last_loss = float("nan")
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.real_images_seen = 0
        self.within_step = False
        self._sound_images: Tensor | None = None

    @property
    def iteration(self) -> int:
        """Number of complete iterations."""
        return self.step // self.outer

    @property
    def images_per_second(self) -> float:
        """Real images matched per second of the run, without the time of evaluations."""
        spent = sum(seconds for part, seconds in self.seconds.items() if part != "evaluation")
        return self.real_images_seen / spent if spent else 0.0

    def synthetic_set(self) -> SyntheticSet:
        """Return a copy of the current synthetic images, in the data's scale.

        Raises:
            RuntimeError: ``Trainer.fit`` has not begun.
        """
        if not self._about_data:
            raise RuntimeError("Expected `Trainer.fit` to have begun, but got no synthetic images yet.")
        labels = torch.arange(self._num_classes).repeat_interleave(self.hparams["images_per_class"])
        scale, shift = (torch.tensor(self._about_data[name])[:, None, None] for name in ("std", "mean"))
        images = self.synthetic_images.detach().cpu().float() * scale + shift
        return SyntheticSet(images, labels, **self._about_data, recipe=Recipe.of(self), factor=self.protocol.factor)

    def synthetic_dataset(self) -> TensorDataset:
        """Return pairs of a decoded image ``(C, H, W)``, in the data's scale and not clamped, and its label."""
        return self.synthetic_set().to_dataset()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``synthetic.safetensors``, ``synthetic.png`` and the decoded images as 8-bit ``images/<class>/*.png``.

        Raises:
            FileExistsError: ``images`` holds files that this set would not replace. The set and its picture have been
                written by then.
            ValueError: the images have neither one nor three channels, so can't be written as PNG. The set and its
                picture have been written by then.
            OSError: a file can't be written.
        """
        folder = Path(folder)
        synthetic = self.synthetic_set()
        synthetic.save(folder / "synthetic.safetensors")
        save_figure(synthetic.figure(), folder / "synthetic.png")
        synthetic.save_images(folder / "images")

    @contextlib.contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the time spent in the ``with`` block to a part of :attr:`seconds`."""
        self._wait()
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[part] += time.perf_counter() - begun

    def _wait(self) -> None:
        # A GPU runs asynchronously.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def setup(self, stage: str) -> None:
        """Check the data, and make synthetic images and a network that fit them."""
        data = self._datamodule
        if self.trainer.current_epoch and not self.trainer.ckpt_path:
            raise ValueError(
                "Expected a new Trainer, but got one that has already fitted. It would not train again, and the images "
                "would be lost."
            )
        check_choice("precision", self.trainer.precision, _PRECISIONS)
        if self.trainer.world_size > 1:
            raise ValueError(
                "Expected a Trainer with one process (devices=1, num_nodes=1), but got "
                f"{self.trainer.world_size}, each of which would condense the whole set. Run one process per seed "
                "instead."
            )
        wanted = self.hparams["num_classes"]
        if wanted is not None and wanted != data.num_classes:
            raise ValueError(f"Expected `num_classes` to be {data.num_classes}, that of {data.name}, but got {wanted}.")
        asked = self.hparams["batch_size"]
        if None not in (asked, data.batch_size) and asked != data.batch_size:
            raise ValueError(
                f"Expected one `batch_size`, but got {asked} for the condensation and {data.batch_size} for the data."
            )
        self._reset()
        self.network = fitting_network(self._given_network[0], data, self.protocol.network_width)
        matching, clusters = self.configure_matching(data), None
        if self.protocol.real_images == "kmeans":
            layer = embedding_layer(self.network, data.image_shape)
            clusters = Clusters(data, layer, data.batch_size or self.protocol.batch_size)
        start = self.protocol.initialization, self.hparams["seed"], self.protocol.factor
        self.synthetic_images = nn.Parameter(start_images(data, self.hparams["images_per_class"], *start))
        self._about_data = {name: getattr(data, name) for name in ("mean", "std", "class_names")}
        self._about_data["dataset"] = data.name
        loops = (self.outer, self.inner)
        given = (self.network, data, matching, clusters, self.augmentation, dict(self.hparams), loops, self.clock)
        pool = self.protocol.pool, self.protocol.pool_passes
        self._networks = NetworkPool(*given, *pool) if self.protocol.pool else FreshNetworks(*given)
        if self.trainer.precision == "64-true":
            self.double()  # Lightning does so only after loading a checkpoint, which would then be rounded

    def teardown(self, stage: str) -> None:
        """Free the networks."""
        if hasattr(self, "_networks"):
            del self._networks

    def configure_optimizers(self) -> torch.optim.SGD:
        """Return SGD on the synthetic images."""
        return torch.optim.SGD([self.synthetic_images], lr=self.protocol.learning_rate, momentum=self.protocol.momentum)

    def on_fit_start(self) -> None:
        """Request the remaining batches from the DataModule."""
        self._datamodule.default_batch_size = self.protocol.batch_size
        self._datamodule.first_batch = self.step
        self._datamodule.batches_per_epoch = self._steps

    def on_train_start(self) -> None:
        """Turn dropout off, and stop at once if no steps are left."""
        self.network.eval()
        self.trainer.should_stop |= self.step >= self._steps

    def on_train_epoch_start(self) -> None:
        """Request the remaining batches from the DataModule, in case there are several epochs."""
        self._datamodule.first_batch = self.step

    def training_step(self, batch: ClassBatch, batch_idx: int) -> None:
        """Compute the statistic of the real images, move the synthetic images towards it, then train the network."""
        if batch.step != self.step:
            raise RuntimeError(f"Expected the real images of step {self.step}, but got those of {batch.step}.")
        self.within_step = True
        goal = self._networks.goal(batch)
        self.real_images_seen += goal.real_images
        with self.clock("synthetic"):
            reuse = self.protocol.network_reuse
            for update in range(self.step * reuse, (self.step + 1) * reuse):
                left = 1 - update / (self._steps * reuse) if self.protocol.decay else 1.0
                self.trainer.optimizers[0].param_groups[0]["lr"] = self.protocol.learning_rate * left
                self._move(goal, update)
        self.step += 1
        self._networks.after(self.step, decode(self.synthetic_images.detach(), self.protocol.factor))
        self.within_step = False
        self.log("train/loss", self.last_loss, prog_bar=True, batch_size=1)
        times = {f"time/{part}": seconds for part, seconds in self.seconds.items()}
        self.log_dict({"train/images_per_second": self.images_per_second} | times, batch_size=1)
        self.trainer.should_stop |= self.step >= self._steps

    @property
    def _datamodule(self) -> LabelledImages:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, LabelledImages):
            raise ValueError(
                "Expected `Trainer.fit(condensation, datamodule=...)` with a labelled data set of "
                f"`leakage.datamodules`, `LabelledImages`, but got {type(datamodule).__name__}."
            )
        return datamodule

    @property
    def _steps(self) -> int:
        return self.protocol.iterations * self.outer

    @property
    def _num_classes(self) -> int:
        return len(self._about_data["class_names"])

    def _move(self, goal: Goal, update: int) -> None:
        """Update the synthetic images once."""
        images = self.synthetic_images
        decoded = decode(images, self.protocol.factor)
        by_class = decoded.view(self._num_classes, -1, *images.shape[1:])
        matched = by_class[:, self._batch(update, by_class.shape[1])]
        distances, derivatives = self._networks.match(goal, matched.detach())
        sound = torch.isfinite(distances) & torch.isfinite(derivatives).flatten(1).all(1)
        if not bool(sound.all()):
            if self._sound_images is not None:
                images.data.copy_(self._sound_images)
            label = int((~sound).nonzero()[0])
            name, loss = self._about_data["class_names"][label], float(distances[label])
            what = "derivative that is not" if math.isfinite(loss) else f"loss of {loss:g}"
            raise FloatingPointError(
                f"Expected a finite matching loss and derivative, but got a {what} at iteration {self.iteration}, "
                f"class {label} ({name}). The synthetic images are the last for which both were finite. "
                "A smaller `learning_rate` may help."
            )
        self._sound_images = images.detach().clone()
        (images.grad,) = torch.autograd.grad(matched, images, derivatives)
        cast(Any, self.optimizers()).step()
        self.last_loss = float(distances.sum())

    def _batch(self, update: int, count: int) -> Tensor | slice:
        """Choose which of the ``count`` images of each class an update matches."""
        size = self.protocol.synthetic_batch_size
        if size is None or size >= count:
            return slice(None)
        passed, place = divmod(update, math.ceil(count / size))
        generator = torch.Generator().manual_seed(derive_seed(self.hparams["seed"], passed, "synthetic batch"))
        return torch.split(torch.randperm(count, generator=generator), size)[place]

    @property
    def _architecture(self) -> str:
        shapes = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        return f"{self.network} {shapes}"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the progress of the run to a checkpoint.

        Raises:
            RuntimeError: a training step is not complete, for example because it has failed.
        """
        if self.within_step:
            raise RuntimeError(
                "Expected a checkpoint between two training steps, but got one within a step. A run resumed from it "
                "would end differently from one that never stopped. Use the previous checkpoint."
            )
        checkpoint["leakage"] = {
            "module": type(self).__name__,
            "precision": self.trainer.precision,
            "network": self._architecture,
            **{name: copy.copy(getattr(self, name)) for name in _KEPT},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume from a checkpoint. Without ``decay`` the number of ``iterations`` may have changed."""
        free = set() if self.protocol.decay else {"iterations"}
        options = {name: value for name, value in self.hparams.items() if name not in free}
        check_checkpoint(checkpoint, type(self).__name__, options, self.trainer.precision)
        saved = checkpoint["leakage"]
        if saved["network"] != self._architecture:
            raise ValueError(
                "Expected the network of the checkpoint, but got one of another architecture. Give the `network` that "
                "the run began with."
            )
        for name in _KEPT:
            setattr(self, name, copy.copy(saved[name]))
        if self.step < self._steps and "loops" in checkpoint:
            # The checkpoint may be from a finished run of fewer iterations: Lightning takes its one epoch for complete.
            progress = checkpoint["loops"]["fit_loop"]
            progress["epoch_progress"]["current"].update(processed=0, completed=0)
            progress["epoch_loop.batch_progress"]["is_last_batch"] = False
