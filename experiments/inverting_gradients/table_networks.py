"""The networks of `table.py` by name, untrained or trained, and the victims that share gradients of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms import Normalize

from leakage.clients.training import trained_network
from leakage.datamodules import LABELLED_DATASETS, LabelledImages, Victims
from leakage.datamodules.benchmarks import BENCHMARKS
from leakage.models import VGG11, ConvNet, LeNet, ResNet18, ResNet20, ViT, draw_state

# Each is called with channels, size of the images and number of classes.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "convnet": partial(ConvNet, width=32, norm="none"),
    "convnet64": partial(ConvNet, width=64),
    "resnet20": ResNet20,
    "resnet20x4": partial(ResNet20, width=64),
    "resnet18": partial(ResNet18, norm="batch"),
    "vgg11": partial(VGG11, norm="batch"),
    "vit": ViT,
}
WRITTEN = {
    "lenet": "LeNet", "convnet": "ConvNet, 32 channels", "convnet64": "ConvNet, 64 channels, instance norm",
    "resnet20": "ResNet-20", "resnet20x4": "ResNet-20, 64 channels", "resnet18": "ResNet-18", "vgg11": "VGG11",
    "vit": "ViT",
}  # fmt: skip
BATCH_NORM = ("evaluation", "training")
# More parameters than this are shared by all victims.
_SMALL = 500_000


def add_options(parser: argparse.ArgumentParser, *, network: str, victims: int) -> None:
    """Those of the data set, the network and the victims, which all scripts about such networks have.

    Args:
        parser: of the script.
        network: that is taken by default.
        victims: likewise.
    """
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout",
    )
    add("--benchmark", choices=tuple(BENCHMARKS), help="the data set that a folder holds, whose statistics are used")
    add("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    add("--root", type=Path, help="where the data sets lie (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    add("--network", choices=tuple(NETWORKS), default=network, help="default: %(default)s")
    add("--epochs", type=int, default=0, help="of its training, 0 for none (default: %(default)s)")
    add("--train-images", type=int, help="to train the network on (default: all)")
    add("--learning-rate", type=float, help="of the network's training (default: that of leakage.clients.training)")
    add("--networks", type=Path, help="folder that keeps trained networks (default: ~/.cache/leakage/networks)")
    add("--victims", type=int, default=victims, help="default: %(default)s")
    add("--seed", type=int, default=0, help="of victims, networks and starts (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder for results")
    add("--accelerator", default="auto", help="as for Lightning's Trainer (default: %(default)s)")


def add_attack_options(parser: argparse.ArgumentParser) -> None:
    """Further ones of scripts that rebuild the victims' images."""
    add = parser.add_argument
    add("--images", type=int, default=1, help="of a victim (default: %(default)s)")
    add("--infer-labels", action="store_true", help="read them off the gradient; else the attacker is told them")
    add("--others", type=int, default=1000, help="training images to tell victims' from (default: %(default)s)")
    add("--lanes", type=int, default=16, help="victims attacked at once (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in the folder, if there is one")


@dataclass
class Network:
    """What the victims are given.

    Attributes:
        model: images in [0, 1] to logits.
        own: whether each victim draws weights of its own.
        accuracy: on the test images, 0 to 1; None untrained.
    """

    model: nn.Module
    own: bool
    accuracy: float | None


def make_network(given: argparse.Namespace, data: LabelledImages, epochs: int) -> Network:
    """The network that was asked for after so many epochs, from the cache if it is there.

    All but LeNet, which takes images as they are in the papers on attacks, normalise them first.

    Raises:
        ValueError: a network that does not fit the images.
    """
    channels, height, width = data.image_shape
    with torch.random.fork_rng(devices=[]):
        network = NETWORKS[given.network](channels, (height, width), data.num_classes)
    network.load_state_dict(draw_state(network, given.seed), strict=False)
    accuracy = None
    if epochs:
        options = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
        trained = trained_network(
            network,
            data,
            epochs=epochs,
            num_images=given.train_images,
            seed=given.seed,
            root=given.networks,
            accelerator=given.accelerator,
            progress=sys.stderr.isatty(),
            **options,
        )
        model, accuracy = trained.model, trained.accuracy
    else:
        model = network if isinstance(network, LeNet) else nn.Sequential(Normalize(data.mean, data.std), network)
    model.train(given.batch_norm == "training")
    small = sum(parameter.numel() for parameter in network.parameters()) <= _SMALL
    return Network(model, small and not epochs, accuracy)


def make_victims(given: argparse.Namespace, data: LabelledImages, network: Network) -> Victims:
    """Victims with test images, which no network was trained on."""
    told = not given.hide_learning_rate
    local = {} if told and given.local_steps == 1 else {"learning_rate": given.local_learning_rate}
    return Victims(
        data.test,
        num_classes=data.num_classes,
        labels={"random": None, "equal": "single-class", "distinct": "distinct"}[given.labels],
        victims=given.victims,
        images=given.images,
        seed=given.seed,
        lanes=given.lanes,
        model=network.model,
        weights="own" if network.own else "shared",
        reveal_labels=not given.infer_labels,
        local_steps=given.local_steps,
        local_batch_size=given.local_batch_size,
        shuffle=given.shuffle,
        reveal_learning_rate=told,
        **local,
    )
