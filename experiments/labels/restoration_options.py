"""The options of `restoration.py`."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from leakage.clients.protocol import check_local_steps
from leakage.datamodules import LABELLED_DATASETS
from leakage.errors import check_count, check_positive
from leakage.labels import RULES
from leakage.models import NETWORKS
from leakage.models.layers import ACTIVATIONS, NORMS

TRAINING_IMAGES, AUXILIARY_IMAGES = 6000, 1000


def check_together(given: argparse.Namespace) -> None:
    """Raise a ``ValueError`` for options that have no effect together with the others."""
    trained, untrained = any(given.epochs), 0 in given.epochs
    if given.classes is not None:
        check_count(2, classes=given.classes)
        if trained:
            raise ValueError("Expected `--classes` with `--epochs 0`, as random labels can't be learnt, but got more.")
    if not trained:
        for name in ("seen", "train_images", "learning_rate", "precision", "networks"):
            value = getattr(given, name)
            if value not in (None, False, "32-true"):
                option = name.replace("_", "-")
                raise ValueError(f"Expected `--epochs` above 0 with `--{option}`, but got {given.epochs}.")
    if given.learning_rate is not None:
        check_positive(learning_rate=given.learning_rate)
    if given.weights == "own" and not untrained:
        raise ValueError(f"Expected `--epochs 0` with `--weights own`, but got {given.epochs}.")
    several = [steps for steps in given.local_steps if steps > 1]
    for name in ("local_learning_rate", "local_batch_size"):
        if getattr(given, name) is not None and not several:
            option = name.replace("_", "-")
            raise ValueError(f"Expected `--local-steps` above 1 with `--{option}`, but got {given.local_steps}.")
    if several and given.local_learning_rate is None:
        raise ValueError(f"Expected `--local-learning-rate` for {several[0]} local steps, but got none.")
    for size, steps in itertools.product(given.batch_sizes, several):
        check_local_steps(size, steps, given.local_learning_rate, given.local_batch_size)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="restoration.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout, "
        "<folder>/<class>/<image>",
    )
    add("--network", required=True, choices=tuple(NETWORKS), help="network of the clients")
    add("--activation", choices=tuple(ACTIVATIONS), help="activation (default: that of the network)")
    add("--norm", choices=NORMS, help="normalisation (default: that of the network)")
    add("--mode", choices=("train", "eval"), help="mode of BatchNorm in the clients' networks (default: eval)")
    add(
        "--init",
        choices=("papers", "torch"),
        default="papers",
        help="weights of LeNet: from U(-0.5, 0.5) or by torch's default (default: %(default)s)",
    )
    add("--classes", type=int, help="spread the images over this number of random labels; for untrained networks")
    add("--epochs", nargs="+", type=int, default=[0], help="epochs of training, 0 for none (default: 0)")
    add(
        "--train-images",
        type=int,
        help=f"images to train on (default: {TRAINING_IMAGES}, but at most half of the training images)",
    )
    add("--learning-rate", type=float, help="learning rate of the training (default: that of leakage.clients.training)")
    add(
        "--precision",
        choices=("32-true", "bf16-mixed"),
        default="32-true",
        help="precision of the training (default: %(default)s)",
    )
    add("--networks", type=Path, help="cache folder of trained networks (default: ~/.cache/leakage/networks)")
    add("--accelerator", default="auto", help="accelerator of Lightning's Trainer for training (default: %(default)s)")
    add("--weights", choices=("own", "shared"), help="weights of untrained networks (default: own if they are small)")
    add("--seen", action="store_true", help="victims hold images that the network was trained on")
    add(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[1, 8, 24, 64, 128, 256],
        help="images per victim (default: 1 8 24 64 128 256)",
    )
    add(
        "--rules",
        nargs="+",
        choices=(*RULES, "auto"),
        help="rules to test (default: all usable rules; auto is always included)",
    )
    add(
        "--distribution",
        nargs="+",
        default=["uniform"],
        help="distribution of the victims' labels: uniform, single-class, or dirichlet:A such as dirichlet:0.1 "
        "(default: uniform)",
    )
    add("--victims", type=int, default=50, help="victims in each cell (default: %(default)s)")
    add("--auxiliary-images", type=int, help=f"images of the attacker, 0 for none (default: {AUXILIARY_IMAGES})")
    add("--unlabelled", action="store_true", help="the attacker does not know the labels of its images")
    add("--local-steps", nargs="+", type=int, default=[1], help="SGD steps of each client (default: 1)")
    add("--local-learning-rate", type=float, help="learning rate of local steps")
    add("--local-batch-size", type=int, help="images of a local step (default: all images of the client)")
    add("--output", type=Path, required=True, help="folder for results")
    add("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    add("--seed", type=int, default=0, help="seed of images, networks and rules (default: %(default)s)")
    add("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    add("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    return parser
