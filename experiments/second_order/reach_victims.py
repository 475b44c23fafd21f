"""The victims of `reach.py`: their networks, their images, and what happens to the gradients that they share."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import Normalize

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.training import trained_network
from leakage.datamodules import LabelledDataModule, draw_victims
from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.datamodules.images import ImageVictims, LabelledImages, digest
from leakage.datamodules.labelled import LabelledTensors, in_unit_range
from leakage.models import NETWORKS, LeNet, draw_state
from leakage.seeds import derive_seed

sys.path.append(str(Path(__file__).parents[1] / "labels"))
from restoration_clients import TorchLeNet
from restoration_options import TRAINING_IMAGES

# How networks are written.
WRITTEN = {"lenet": "LeNet", "wide_lenet": "LeNet-32", "convnet": "ConvNet-3", "resnet18": "ResNet-18"}
_WIDE = 32
# More parameters than this are shared by all victims.
_SMALL = 2_000_000


@dataclass(frozen=True)
class Cell:
    """One choice of all that may be given several times."""

    dataset: str
    network: str
    norm: str
    activation: str
    epochs: int
    labels: str
    images: int
    noise: float
    half: bool

    @property
    def folder(self) -> str:
        """Below the output."""
        name = f"{self.dataset}_{self.network}_{self.norm}_{self.activation}_epochs_{self.epochs}"
        name += f"_{self.labels}_{self.images}" + (f"_noise_{self.noise:g}" if self.noise else "")
        return name + ("_half" if self.half else "")

    def __str__(self) -> str:
        several = f"{self.images} images" if self.images > 1 else "one image"
        told = [f"{several} of {self.dataset}", WRITTEN[self.network], self.activation]
        told += [f"{self.norm} norm"] if self.norm != "none" else []
        told += [f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"] if self.epochs else []
        told += ["equal labels"] if self.labels == "equal" and self.images > 1 else []
        told += [f"noise {self.noise:g}"] if self.noise else []
        return ", ".join([*told, *(["float16"] if self.half else [])])


@dataclass
class Network:
    """What the victims of a cell are given.

    Attributes:
        model: images in [0, 1] to logits, in evaluation mode.
        images: ``(M,)``, indices of the training images that victims may hold.
        own: whether each victim draws weights of its own.
        accuracy: on the test images, 0 to 1; None untrained.
    """

    model: nn.Module
    images: Tensor
    own: bool
    accuracy: float | None


def make_network(cell: Cell, given: argparse.Namespace, data: LabelledDataModule) -> Network:
    """The network of a cell, trained if the cell says so (from the cache, if it is there).

    Untrained LeNets take images as they are, as in the papers on attacks, all others normalised images.

    Raises:
        ValueError: a network that does not fit the images, or can't have such a norm.
    """
    channels, height, width = data.image_shape
    options: dict[str, Any] = {"activation": cell.activation}
    if cell.network in ("lenet", "wide_lenet"):
        kind: type[nn.Module] = TorchLeNet if given.init == "torch" else LeNet
        options |= {"width": _WIDE} if cell.network == "wide_lenet" else {}
    else:
        kind = NETWORKS[cell.network]
        options["norm"] = cell.norm
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(given.seed)
        network = kind(channels, (height, width), data.num_classes, **options)
    network.load_state_dict(draw_state(network, given.seed), strict=False)
    there = torch.arange(len(data.train))
    if cell.epochs:
        rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
        trained = trained_network(
            network,
            data,
            epochs=cell.epochs,
            num_images=given.train_images or min(TRAINING_IMAGES, len(there) // 2),
            seed=given.seed,
            root=given.networks,
            accelerator=given.accelerator,
            progress=sys.stderr.isatty(),
            **rate,
        )
        unseen = there[torch.isin(there, trained.seen, invert=True)]
        return Network(trained.model, unseen, False, trained.accuracy)
    small = sum(parameter.numel() for parameter in network.parameters()) <= _SMALL
    model = network if isinstance(network, LeNet) else nn.Sequential(Normalize(data.mean, data.std), network)
    return Network(model.eval(), there, small, None)


def make_victims(cell: Cell, given: argparse.Namespace, data: LabelledDataModule, network: Network) -> VictimDataModule:
    """The victims of a cell."""
    victims = DrawnVictims(
        data.train,
        network.images,
        data.num_classes,
        labels=cell.labels,
        victims=given.victims,
        num_images=cell.images,
        seed=given.seed,
        lanes=given.lanes,
        model=network.model,
        weights="own" if network.own else "shared",
        reveal_labels=not given.infer_labels,
    )
    if not cell.noise and not cell.half:
        return victims
    return PerturbedVictims(victims, noise=cell.noise, half=cell.half)


class DrawnVictims(ImageVictims):
    """Victims of images in memory, of any classes or each of a single one.

    Args:
        data: all images.
        images: ``(M,)``, indices of those that victims may hold.
        num_classes: of ``data``.
        labels: ``"random"``, no image twice; or ``"equal"``, where all images of a victim are of one class.
        options: see :class:`~leakage.datamodules.images.ImageVictims`.
    """

    def __init__(
        self, data: LabelledTensors, images: Tensor, num_classes: int, *, labels: str = "random", **options: Any
    ) -> None:
        super().__init__(**options)
        self.data, self.images, self.num_classes, self.labels = data, images, num_classes, labels

    def open_images(self) -> tuple[LabelledImages, int]:
        """The images that victims may hold."""
        return _InMemory(self.data, self.images), self.num_classes

    def setup(self, stage: str | None = None) -> None:
        """Draw the victims' images."""
        if hasattr(self, "victim"):
            return
        super().setup(stage)
        if self.labels == "equal":
            self._order = draw_victims(
                self.data.labels[self.images],
                victims=self.victims,
                num_images=self.num_images,
                distribution="single-class",
                seed=self.seed,
            )

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """As in the base class, with what the draws are made from."""
        return super().configuration | {"labels": self.labels, "images": digest({"images": self.images})}


@dataclass
class _InMemory:
    data: LabelledTensors
    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        place = self.images[index]
        return in_unit_range(self.data.images[place]), int(self.data.labels[place])


class PerturbedVictims(VictimDataModule):
    """Victims whose gradients don't arrive as they were.

    Args:
        victims: the same whose gradients do; their seed draws the noise.
        noise: see :func:`perturb`.
        half: see :func:`perturb`.
    """

    def __init__(self, victims: ImageVictims, *, noise: float = 0.0, half: bool = False) -> None:
        super().__init__(lanes=victims.lanes)
        self.reveal_labels, self.weights = victims.reveal_labels, victims.weights
        self.honest, self.noise, self.half = victims, noise, half

    def prepare_data(self) -> None:
        """Fetch the data set."""
        self.honest.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Take on the victims' network and number."""
        self.honest.setup(stage)
        self.victim, self.victims = self.honest.victim, self.honest.victims

    def share(self, victims: Sequence[int]) -> SharedGradient:
        """Their gradients with noise, rounded."""
        return perturb(self.honest.share(victims), noise=self.noise, half=self.half, seed=self.honest.seed)

    def val_dataloader(self) -> DataLoader[GroundTruth]:
        """The truth."""
        self.honest.audited = self.audited
        return self.honest.val_dataloader()

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """As that of the victims, told apart."""
        return self.honest.configuration | {"noise": self.noise, "half": self.half}


def perturb(shared: SharedGradient, *, noise: float, half: bool, seed: int) -> SharedGradient:
    r"""Gradients :math:`g + \nu \, \mathrm{rms}(g) \, \epsilon` with :math:`\epsilon \sim N(0, 1)`, then as float16.

    The root mean square is that of a victim's whole gradient, over all its tensors. The noise is drawn
    for each victim's number: it neither depends on the others nor, but for its size, on :math:`\nu`.

    Args:
        shared: V victims.
        noise: :math:`\nu`, at least 0.
        half: round to float16 and back.
        seed: of the noise.

    Raises:
        ValueError: gradients that float16 can't hold.
    """
    gradients: Mapping[str, Tensor] = shared.gradients
    if noise:
        flat = torch.cat([tensor.flatten(1) for tensor in gradients.values()], 1).double()
        sizes = [tensor[0].numel() for tensor in gradients.values()]
        drawn = []
        for victim in shared.ids.tolist():
            generator = torch.Generator().manual_seed(derive_seed(seed, victim, "gradient noise"))
            drawn.append(torch.randn(flat.shape[1], generator=generator, dtype=torch.float64))
        flat = flat + noise * flat.square().mean(1, keepdim=True).sqrt() * torch.stack(drawn).to(flat)
        parts = zip(gradients.items(), flat.split(sizes, 1), strict=True)
        gradients = {name: part.view_as(tensor).to(tensor) for (name, tensor), part in parts}
    if half:
        largest = max(float(tensor.abs().max()) for tensor in gradients.values())
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(
                f"Expected gradients that float16 can hold, up to 65,504, with `--half`, but got {largest:.3g}. Use "
                "another `--init` or `--activations`."
            )
        gradients = {name: tensor.half().to(tensor) for name, tensor in gradients.items()}
    return dataclasses.replace(shared, gradients=dict(gradients))


def cell_columns(cell: Cell) -> dict[str, Any]:
    """The cell's part of a row."""
    return asdict(cell)
