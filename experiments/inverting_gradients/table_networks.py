"""The networks of `table.py`, untrained or trained, and the victims that share their gradients."""

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
from leakage.models.layers import ACTIVATIONS

# Each is called with the number of channels, the image size and the number of classes.
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
# Networks with more parameters than this are shared by all victims.
_SMALL = 500_000


def add_options(parser: argparse.ArgumentParser, *, network: str, victims: int) -> None:
    """Add the options for data set, network and victims that all scripts on these networks share.

    Args:
        parser: parser of the script.
        network: default of ``--network``.
        victims: default of ``--victims``.
    """
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout",
    )
    add("--benchmark", choices=tuple(BENCHMARKS), help="data set that a folder holds, to use its statistics")
    add("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    add("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    add("--network", choices=tuple(NETWORKS), default=network, help="default: %(default)s")
    add("--activation", choices=tuple(ACTIVATIONS), help="activation of the network (default: the network's own)")
    add("--epochs", type=int, default=0, help="training epochs of the network, 0 for none (default: %(default)s)")
    add("--train-images", type=int, help="number of images to train the network on (default: all)")
    add(
        "--learning-rate", type=float, help="rate to train the network with (default: that of leakage.clients.training)"
    )
    add("--networks", type=Path, help="folder that keeps trained networks (default: ~/.cache/leakage/networks)")
    add("--victims", type=int, default=victims, help="number of victims (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of victims, networks and starts (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder for results")
    add("--accelerator", default="auto", help="as for Lightning's Trainer (default: %(default)s)")


def add_attack_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of scripts that reconstruct the victims' images."""
    add = parser.add_argument
    add("--images", type=int, default=1, help="images per victim (default: %(default)s)")
    add(
        "--infer-labels", action="store_true", help="infer labels from the gradient; by default the attacker knows them"
    )
    add(
        "--others",
        type=int,
        default=1000,
        help="training images to distinguish victims' images from (default: %(default)s)",
    )
    add("--lanes", type=int, default=16, help="victims attacked at once (default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in the output folder, if there is one")


@dataclass
class Network:
    """The network of the victims.

    Attributes:
        model: maps images in [0, 1] to logits.
        own: whether each victim draws its own weights.
        accuracy: accuracy on the test images, 0 to 1; None if untrained.
    """

    model: nn.Module
    own: bool
    accuracy: float | None


def make_network(given: argparse.Namespace, data: LabelledImages, epochs: int) -> Network:
    """Return the requested network after this many epochs of training, from the cache if possible.

    All networks normalise images first, except LeNet, which takes unnormalised images as in the papers on attacks.

    Raises:
        ValueError: if the network does not fit the images.
    """
    channels, height, width = data.image_shape
    if given.activation is not None and given.network == "vit":
        raise ValueError(f"Expected no `--activation` with 'vit', which has only GELU, but got {given.activation!r}.")
    with torch.random.fork_rng(devices=[]):
        activation = {} if given.activation is None else {"activation": given.activation}
        network = NETWORKS[given.network](channels, (height, width), data.num_classes, **activation)
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
    """Return victims with test images, which no network was trained on."""
    reveal = not given.hide_learning_rate
    local = {} if reveal and given.local_steps == 1 else {"learning_rate": given.local_learning_rate}
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
        reveal_learning_rate=reveal,
        **local,
    )
