"""The clients of `restoration.py`, with their networks, their images and the gradients they share."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from restoration_options import AUXILIARY_IMAGES, TRAINING_IMAGES
from restoration_results import WRITTEN
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import Normalize

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.training import trained_network
from leakage.clients.victim import Victim
from leakage.datamodules import LabelledImages, draw_victims, in_unit_range
from leakage.errors import check_count
from leakage.labels import Auxiliary, LabelReader
from leakage.models import NETWORKS, LeNet, draw_state
from leakage.seeds import derive_seed

# Untrained networks with more parameters than this are shared by all victims by default.
_SMALL = 2_000_000
# Images in one pass, images in one pass if all layers keep gradients, and numbers in the gradients of one pass.
_IMAGES_AT_ONCE, _TRAINED_ON_AT_ONCE, _NUMBERS_AT_ONCE = 1024, 128, 2**26


@dataclass(frozen=True)
class Cell:
    """One combination of the options that take several values."""

    epochs: int
    distribution: str
    local_steps: int
    batch_size: int

    @property
    def folder(self) -> str:
        """The name of the cell's folder in the output folder."""
        distribution = self.distribution.replace(":", "_")
        return f"epochs_{self.epochs}_{distribution}_steps_{self.local_steps}_batch_{self.batch_size}"


@dataclass
class Network:
    """The network of a cell's clients, and the images that they may hold."""

    model: nn.Module  # takes images in [0, 1]
    images: Tensor  # (M,), indices of the training images that victims hold
    accuracy: float | None


class TorchLeNet(LeNet):
    """LeNet with torch's default initialisation of each layer."""

    def reset_parameters(self) -> None:
        """Keep the weights that the layers drew."""


class Clients:
    """The networks and images of all cells, and the attacker's images; all are checked.

    Args:
        given: options, checked for combinations that exclude each other.
        dataset: name of the data set.
        data: images, prepared and set up.
        cells: all cells of the run.

    Raises:
        ValueError: an option does not fit the network or the data.
    """

    def __init__(self, given: argparse.Namespace, dataset: str, data: LabelledImages, cells: Sequence[Cell]) -> None:
        self.given = given
        self.dataset = dataset
        self.data = data
        self._prepare_network()
        self._prepare_images(cells)

    def _prepare_network(self) -> None:
        given = self.given
        kind = NETWORKS[given.network]
        options = {name: getattr(given, name) for name in ("activation", "norm") if getattr(given, name) is not None}
        takes = inspect.signature(kind).parameters
        for name, value in options.items():
            if name not in takes:
                raise ValueError(
                    f"Expected no `--{name}` with {given.network!r}, which has only one, but got {value!r}."
                )
        # AlexNet has no option for the activation and uses ReLU.
        self.activation = given.activation or (takes["activation"].default if "activation" in takes else "relu")
        self.norm = given.norm or (takes["norm"].default if "norm" in takes else "none")
        if given.init == "torch":
            if given.network != "lenet":
                raise ValueError(f"Expected `--init papers` with {given.network!r}, which is torch's, but got 'torch'.")
            kind = TorchLeNet
        channels, height, width = self.data.image_shape
        self.num_classes = given.classes or self.data.num_classes
        self.network = kind(channels, (height, width), self.num_classes, **options)
        self.network.load_state_dict(draw_state(self.network, given.seed), strict=False)
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.weights = given.weights or ("own" if parameters <= _SMALL else "shared")
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.network.modules())
        if given.mode is not None and not has_batch_norm:
            raise ValueError(f"Expected no `--mode` with a network without BatchNorm, but got {given.mode!r}.")
        self.mode = (given.mode or "eval") if has_batch_norm else None

    def _prepare_images(self, cells: Sequence[Cell]) -> None:
        given, train = self.given, self.data.train
        self.labels = self._labels(train.labels, "training")
        if given.train_images is None:
            self.train_images = min(TRAINING_IMAGES, len(train) // 2)
        else:
            self.train_images = given.train_images
            check_count(train_images=given.train_images)
            if given.train_images > len(train):
                raise ValueError(
                    f"Expected `--train-images` of at most {len(train)}, the training images of {self.dataset!r}, but "
                    f"got {given.train_images}."
                )
        self.auxiliary = self._auxiliary()
        for cell in cells:
            there = len(train)
            if cell.epochs:
                there = self.train_images if given.seen else there - self.train_images
            if cell.batch_size > there:
                raise ValueError(
                    f"Expected `--batch-sizes` of at most {there}, the images that victims may hold after "
                    f"{cell.epochs} epochs, but got {cell.batch_size}. Choose another `--train-images`."
                )
            self.draw(cell, torch.arange(len(train)), victims=0)
            victim = self.victim(self.network, cell)
            LabelReader(auxiliary=self.auxiliary).check(victim)

    def _labels(self, own: Tensor, split: str) -> Tensor:
        """Return the images' own labels, or random labels spread evenly over ``--classes`` classes."""
        if self.given.classes is None:
            return own
        generator = torch.Generator().manual_seed(derive_seed(self.given.seed, 0, f"labels of {split} images"))
        return (torch.arange(len(own)) % self.given.classes)[torch.randperm(len(own), generator=generator)]

    def _auxiliary(self) -> Auxiliary | None:
        """Return test images, spread over the classes as evenly as possible."""
        test = self.data.test
        count = self.given.auxiliary_images
        if count is None:
            count = min(AUXILIARY_IMAGES, len(test))
        check_count(0, auxiliary_images=count)
        if count > len(test):
            raise ValueError(
                f"Expected `--auxiliary-images` of at most {len(test)}, the test images of {self.dataset!r}, but got "
                f"{count}."
            )
        if not count:
            if self.given.unlabelled:
                raise ValueError("Expected `--auxiliary-images` above 0 with `--unlabelled`, but got 0.")
            return None
        generator = torch.Generator().manual_seed(derive_seed(self.given.seed, 0, "auxiliary images"))
        order = torch.randperm(len(test), generator=generator)
        labels = self._labels(test.labels, "test")[order]
        # The rank of each image within its class; take all images of rank 1, then all of rank 2, and so on.
        place = F.one_hot(labels, self.num_classes).cumsum(0).gather(1, labels[:, None])[:, 0]
        first = place.argsort(stable=True)[:count]
        return Auxiliary(in_unit_range(test.images[order[first]]), None if self.given.unlabelled else labels[first])

    def own(self, cell: Cell) -> bool:
        """Return whether each victim has its own network."""
        return self.weights == "own" and not cell.epochs

    def draw(self, cell: Cell, images: Tensor, victims: int) -> Tensor:
        """Draw which of these images victims hold, as indices ``(V, N)``."""
        drawn = draw_victims(
            self.labels[images],
            victims=victims,
            num_images=cell.batch_size,
            distribution=cell.distribution,
            seed=self.given.seed,
        )
        return images[drawn]

    def victim(self, network: nn.Module, cell: Cell, *, all_layers: bool = False) -> Victim:
        """Return a client; by default only the last layer is trainable, which is far cheaper to differentiate."""
        given = self.given
        model = nn.Sequential(Normalize(self.data.mean, self.data.std), network).train(self.mode == "train")
        if not all_layers:
            model = copy.deepcopy(model).requires_grad_(False)
            model[1].classifier.requires_grad_(True)
        local = {}
        if cell.local_steps > 1:
            local = {"learning_rate": given.local_learning_rate, "local_batch_size": given.local_batch_size}
        return Victim(
            model,
            image_shape=self.data.image_shape,
            num_images=cell.batch_size,
            local_steps=cell.local_steps,
            **local,
        )

    def train(self, epochs: int) -> Network:
        """Return the network after this number of epochs, from the cache if possible."""
        given, there = self.given, torch.arange(len(self.data.train))
        if not epochs:
            return Network(self.network, there, None)
        print(f"{WRITTEN[given.network]} after {epochs} epoch{'s' if epochs > 1 else ''}:", flush=True)
        rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
        trained = trained_network(
            self.network,
            self.data,
            epochs=epochs,
            num_images=self.train_images,
            seed=given.seed,
            precision=given.precision,
            root=given.networks,
            accelerator=given.accelerator,
            **rate,
        )
        print(f"test accuracy {100 * trained.accuracy:.1f} %", flush=True)
        images = trained.seen if given.seen else there[torch.isin(there, trained.seen, invert=True)]
        return Network(trained.model[1], images, trained.accuracy)  # type: ignore[index]

    def share(self, client: Victim, names: Sequence[str], cell: Cell, drawn: Tensor, victims: Tensor) -> SharedGradient:
        """Return the gradients of these victims for the named tensors only."""
        images = _IMAGES_AT_ONCE
        if len(client.trainable) > len(names):
            numbers = sum(parameter.numel() for parameter in client.model.parameters())
            images = min(_TRAINED_ON_AT_ONCE, _NUMBERS_AT_ONCE * cell.batch_size // numbers)
        parts = []
        for part in torch.arange(len(drawn)).split(max(1, images // cell.batch_size)):
            states = None
            if self.own(cell):
                seeds = [derive_seed(self.given.seed, victim, "network") for victim in victims[part].tolist()]
                states = client.fresh_states(seeds)
            held = drawn[part]
            shared = client.share(in_unit_range(self.data.train.images[held]), self.labels[held], states=states)
            parts.append(dataclasses.replace(shared, gradients={name: shared.gradients[name] for name in names}))
        return SharedGradient.cat(parts)
