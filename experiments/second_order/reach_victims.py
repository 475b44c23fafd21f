"""The victims of `reach.py`: their networks, images, and changes to their shared gradients."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.transforms import Normalize

from leakage.clients.training import trained_network
from leakage.datamodules import LabelledImages, Victims
from leakage.defenses import Defense, GaussianNoise
from leakage.models import NETWORKS, LeNet, draw_state

sys.path.append(str(Path(__file__).parents[1] / "labels"))
from restoration_clients import TorchLeNet
from restoration_options import TRAINING_IMAGES

# Display names of networks.
WRITTEN = {
    "lenet": "LeNet", "wide_lenet": "LeNet-32", "convnet": "ConvNet-3", "convnet32": "ConvNet-32",
    "resnet18": "ResNet-18",
}  # fmt: skip
# Networks of the library of another width: the name of the library's network, and the number of channels.
WIDTHS = {"wide_lenet": ("lenet", 32), "convnet32": ("convnet", 32)}
# Networks with more parameters than this are shared by all victims.
_SMALL = 2_000_000


@dataclass(frozen=True)
class Cell:
    """One combination of the options that accept several values."""

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
        """Name of the cell's folder in the output folder."""
        name = f"{self.dataset}_{self.network}_{self.norm}_{self.activation}_epochs_{self.epochs}"
        name += f"_{self.labels}_{self.images}" + (f"_noise_{self.noise:g}" if self.noise else "")
        return name + ("_half" if self.half else "")

    def __str__(self) -> str:
        several = f"{self.images} images" if self.images > 1 else "one image"
        parts = [f"{several} of {self.dataset}", WRITTEN[self.network], self.activation]
        parts += [f"{self.norm} norm"] if self.norm != "none" else []
        parts += [f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"] if self.epochs else []
        parts += ["equal labels"] if self.labels == "equal" and self.images > 1 else []
        parts += [f"noise {self.noise:g}"] if self.noise else []
        return ", ".join([*parts, *(["float16"] if self.half else [])])


@dataclass
class Network:
    """The network and the available images of a cell's victims.

    Attributes:
        model: maps images in [0, 1] to logits, in evaluation mode.
        images: ``(M,)``, indices of the training images that victims may hold.
        own: whether each victim draws its own weights.
        accuracy: accuracy on the test images, 0 to 1; None if untrained.
    """

    model: nn.Module
    images: Tensor
    own: bool
    accuracy: float | None


def make_network(cell: Cell, given: argparse.Namespace, data: LabelledImages) -> Network:
    """Return the network of a cell, trained if the cell requests it (from the cache if possible).

    Untrained LeNets take unnormalised images, as in the papers on attacks; all other networks normalise them first.

    Raises:
        ValueError: if the network does not fit the images, or does not support the norm.
    """
    channels, height, width = data.image_shape
    options: dict[str, Any] = {"activation": cell.activation}
    if cell.network in ("lenet", "wide_lenet"):
        kind: type[nn.Module] = TorchLeNet if given.init == "torch" else LeNet
    else:
        kind = NETWORKS[WIDTHS.get(cell.network, (cell.network, 0))[0]]
        options["norm"] = cell.norm
    if cell.network in WIDTHS:
        options["width"] = WIDTHS[cell.network][1]
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


def make_victims(cell: Cell, given: argparse.Namespace, data: LabelledImages, network: Network) -> Victims:
    """Return the victims of a cell."""
    defenses: list[Defense] = [GaussianNoise(cell.noise, relative=True)] if cell.noise else []
    return Victims(
        data.test if given.test_images else Subset(data.train, network.images.tolist()),
        num_classes=data.num_classes,
        labels="single-class" if cell.labels == "equal" else None,
        victims=given.victims,
        images=cell.images,
        seed=given.seed,
        lanes=given.lanes,
        model=network.model,
        weights="own" if network.own else "shared",
        reveal_labels=not given.infer_labels,
        defenses=[*defenses, Float16()] if cell.half else defenses,
    )


class Float16(Defense):
    """Gradients rounded to float16 and back."""

    def __call__(self, gradients: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the rounded gradients.

        Raises:
            ValueError: if a value is too large for float16.
        """
        largest = max(float(tensor.abs().max()) for tensor in gradients.values())
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(
                f"Expected gradients that float16 can hold, up to 65,504, with `--half`, but got {largest:.3g}. Use "
                "another `--init` or `--activations`."
            )
        return {name: tensor.half().to(tensor) for name, tensor in gradients.items()}


def cell_columns(cell: Cell) -> dict[str, Any]:
    """Return the columns of a row that describe its cell."""
    return asdict(cell)
