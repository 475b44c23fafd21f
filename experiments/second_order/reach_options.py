"""Command line of `reach.py`."""

from __future__ import annotations

import argparse
import inspect
import itertools
import math
from pathlib import Path

from reach_victims import WIDTHS, WRITTEN, Cell

from leakage.attacks import GaussNewtonAttack, GradientInversion, IDLGAttack, RGAPAttack
from leakage.datamodules import LABELLED_DATASETS
from leakage.dummies.pixels import STARTS
from leakage.errors import check_count, check_positive
from leakage.models import NETWORKS
from leakage.models.layers import ACTIVATIONS, NORMS
from leakage.solvers import SOLVERS

METHODS = ("gauss_newton", "rgap", "idlg", "idlg_published")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reach.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--dataset",
        nargs="+",
        required=True,
        help=f"names from {', '.join(LABELLED_DATASETS)}, or folders of images in ImageFolder layout "
        "(<folder>/<class>/<image>)",
    )
    add_cells(parser, images=1)
    add(
        "--noise",
        nargs="+",
        type=float,
        default=[0.0],
        help="noise relative to the gradient's root mean square (default: 0)",
    )
    add("--half", action="store_true", help="also use gradients without noise, rounded to float16")
    add("--methods", nargs="+", choices=METHODS, default=["gauss_newton", "idlg"], help="default: gauss_newton idlg")
    add("--victims", type=int, default=20, help="victims per cell (default: %(default)s)")
    add(
        "--infer-labels", action="store_true", help="infer labels from the gradient; by default the attacker knows them"
    )
    add("--start", choices=STARTS, default="auto", help="start of gauss_newton (default: %(default)s)")
    add("--solver", choices=SOLVERS, default="auto", help="solver of gauss_newton (default: %(default)s)")
    add("--max-steps", type=int, help="steps of gauss_newton per start (default: its own)")
    add("--max-evaluations", type=int, help="evaluations of idlg and idlg_published per start (default: their own)")
    add(
        "--restarts",
        type=int,
        help="restarts of gauss_newton and idlg for a victim that was not found (default: their own)",
    )
    add(
        "--precision",
        choices=("32-true", "64-true"),
        default="32-true",
        help="precision of attacks (default: %(default)s)",
    )
    add("--why", type=int, default=2, help="failed victims to diagnose, and as many solved ones (default: %(default)s)")
    add("--learning-rate", type=float, help="learning rate of the training (default: that of leakage.clients.training)")
    add("--lanes", type=int, default=64, help="victims attacked at once (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of victims, networks, noise and starts (default: %(default)s)")
    add("--output", type=Path, required=True, help="folder for results")
    add("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    add("--accelerator", default="auto", help="as for Lightning's Trainer (default: %(default)s)")
    return parser


def add_cells(parser: argparse.ArgumentParser, images: int) -> None:
    """Add the options of networks and images, those of `features.py` too; `images` per victim by default."""
    add = parser.add_argument
    add("--network", nargs="+", choices=tuple(WRITTEN), default=["lenet"], help="default: lenet")
    add("--norm", nargs="+", choices=NORMS, help="norm layers of convnet, convnet32 and resnet18 (default: their own)")
    add("--activations", nargs="+", choices=tuple(ACTIVATIONS), help="default: each network's own")
    add(
        "--init",
        choices=("papers", "torch"),
        default="papers",
        help="weights of LeNets: from U(-0.5, 0.5) or torch's default initialisation (default: %(default)s)",
    )
    add("--epochs", nargs="+", type=int, default=[0], help="training epochs, 0 for none (default: 0)")
    add("--images", nargs="+", type=int, default=[images], help=f"images per victim (default: {images})")
    add(
        "--labels",
        nargs="+",
        choices=("random", "equal"),
        default=["random"],
        help="labels of a victim (default: random)",
    )
    add(
        "--test-images",
        action="store_true",
        help="victims hold test images (default: training images that no network saw)",
    )
    add(
        "--train-images",
        type=int,
        help="images to train on (default: 6000, or half of them if there are fewer than 12000)",
    )
    add("--networks", type=Path, help="folder that keeps trained networks (default: ~/.cache/leakage/networks)")
    add("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    add("--image-size", type=int, help="scale and crop a folder's images to this height and width")


def check_given(given: argparse.Namespace) -> None:
    """Raise a ``ValueError`` if a number is out of range or an option has no effect with the others."""
    check_count(victims=given.victims, lanes=given.lanes)
    check_count(0, seed=given.seed, why=given.why)
    for name in ("epochs", "images"):
        for value in getattr(given, name):
            check_count(0 if name == "epochs" else 1, **{name: value})
    for value in given.noise:
        if not 0 <= value < math.inf:
            raise ValueError(f"Expected `--noise` to be at least 0 and finite, but got {value}.")
    if not any(given.epochs):
        for name in ("train_images", "learning_rate", "networks"):
            if getattr(given, name) is not None:
                raise ValueError(
                    f"Expected `--epochs` above 0 with `--{name.replace('_', '-')}`, but got {given.epochs}."
                )
    if given.train_images is not None:
        check_count(train_images=given.train_images)
    if given.learning_rate is not None:
        check_positive(learning_rate=given.learning_rate)
    lenets = {"lenet", "wide_lenet"} & {*given.network}
    if given.init == "torch" and not lenets:
        raise ValueError(
            f"Expected `--init papers` without a LeNet in `--network`, but got 'torch' and {given.network}."
        )
    if given.norm is not None and lenets == {*given.network}:
        raise ValueError(f"Expected no `--norm` with LeNets, which have none, but got {given.norm}.")
    for name, methods in (
        ("max_steps", {"gauss_newton"}),
        ("max_evaluations", {"idlg", "idlg_published"}),
        ("restarts", {"gauss_newton", "idlg"}),
    ):
        if getattr(given, name) is not None and not methods & {*given.methods}:
            option = name.replace("_", "-")
            raise ValueError(f"Expected `--{option}` with one of {sorted(methods)}, but got {given.methods}.")


def make_cells(given: argparse.Namespace, datasets: list[str]) -> list[Cell]:
    """Return all requested cells; the number of images varies fastest, so that easy cells come first."""
    noises = [(noise, False) for noise in dict.fromkeys(given.noise)] + ([(0.0, True)] if given.half else [])
    cells = []
    for dataset, network, epochs, labels, (noise, half), images in itertools.product(
        datasets, *map(dict.fromkeys, (given.network, given.epochs, given.labels, noises, given.images))
    ):
        takes = inspect.signature(NETWORKS[WIDTHS.get(network, (network, 0))[0]]).parameters
        norms = (given.norm or [takes["norm"].default]) if "norm" in takes else ["none"]
        for norm, activation in itertools.product(norms, given.activations or [takes["activation"].default]):
            cells.append(Cell(dataset, network, norm, activation, epochs, labels, images, noise, half))
    return list(dict.fromkeys(cells))


def make_attack(method: str, given: argparse.Namespace) -> GradientInversion:
    """Return the attack for a method, with the options of the command line."""
    options = {"seed": given.seed}
    if method == "rgap":
        return RGAPAttack(**options)
    if given.restarts is not None and method != "idlg_published":
        options["restarts"] = given.restarts
    steps = given.max_steps if method == "gauss_newton" else given.max_evaluations
    if steps is not None:
        options["max_evaluations"] = steps
    if method == "gauss_newton":
        return GaussNewtonAttack(start=given.start, solver=given.solver, underdetermined=True, **options)
    return IDLGAttack(protocol="published" if method == "idlg_published" else "robust", **options)
