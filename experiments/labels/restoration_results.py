"""The results of `restoration.py` as rows, plots and a table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from restoration_plots import plot_recall

from leakage.comparison import align
from leakage.metrics import mean_interval
from leakage.plots import save_figure

# Names of the networks as in the papers.
WRITTEN = {
    "convnet": "ConvNet", "mlp": "MLP", "lenet": "LeNet",
    "alexnet": "AlexNet", "vgg11": "VGG11", "resnet18": "ResNet-18", "resnet20": "ResNet-20", "vit": "ViT",
}  # fmt: skip
_DATASETS = {
    "mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100", "svhn": "SVHN", "sample": "bundled sample",
}  # fmt: skip
_ACTIVATIONS = {
    "relu": "ReLU", "leaky_relu": "leaky ReLU", "gelu": "GELU", "sigmoid": "sigmoid", "silu": "SiLU", "tanh": "tanh",
}  # fmt: skip
# Number of batch sizes shown in a plot over another quantity.
_PANELS = 4
# The quantities in which cells may differ, with the text of a value; then file and axis label of recall over them.
_DIMENSIONS = {
    "epochs": lambda epochs: f"{epochs} epoch{'s' if epochs > 1 else ''}" if epochs else "untrained",
    "distribution": str,
    "local_steps": lambda steps: f"{steps} local step{'s' if steps > 1 else ''}",
    "batch_size": lambda size: f"batch size {size}",
}
_PICTURES = {
    "batch_size": ("restoration.png", "batch size"),
    "epochs": ("restoration_epochs.png", "epochs of training"),
    "local_steps": ("restoration_steps.png", "local steps"),
}


@dataclass
class RestorationRow:
    """The results of one rule in one cell, a row of ``summary.json``; scores are means over victims, from 0 to 1.

    Attributes:
        rule: a key of ``RULES`` or ``"auto"``.
        dataset: name of the data set.
        network: a key of ``NETWORKS``.
        activation: activation of the network.
        epochs: epochs of training, 0 for none.
        batch_size: number of images behind each gradient.
        distribution: distribution of the victims' labels, see ``draw_victims``.
        victims: number of victims.
        irec: share of the images whose label is found.
        irec_ci: 95 % confidence interval of ``irec``.
        leacc: share of the classes whose presence is correct.
        lnacc: share of the classes whose count is correct.
        exact: share of the victims whose counts are all correct.
        trivial_irec: ``irec`` of the guess without a gradient.
        trivial_leacc: ``leacc`` of the guess without a gradient.
        seconds: time for all victims, including the learning of the rule.
        leacc_ci: 95 % confidence interval of ``leacc``.
        lnacc_ci: 95 % confidence interval of ``lnacc``.
        exact_ci: 95 % confidence interval of ``exact``.
        trivial_lnacc: ``lnacc`` of the guess without a gradient.
        trivial_exact: ``exact`` of the guess without a gradient.
        chosen: the rule that ``"auto"`` chose; None for other rules.
        local_steps: number of local steps of each client.
        weights: ``"own"`` or ``"shared"``.
        seen: whether the network was trained on the victims' images; None if it is untrained.
        norm: normalisation of the network.
        mode: mode of BatchNorm, ``"train"`` or ``"eval"``; None without BatchNorm.
        classes: number of random classes; None if the images have their own labels.
        init: ``"papers"`` or ``"torch"``.
        auxiliary_images: number of the attacker's images.
        test_accuracy: test accuracy of the network, 0 to 1; None if it is untrained.
        auxiliary_labels: whether the attacker knows the labels of its images; None without images.
        best_other: the rule other than ``"auto"`` with the highest ``irec``; None in the rows of other rules.
        behind_best: mean over victims of the recall of ``best_other`` minus that of ``"auto"``, -1 to 1. The best of
            several rules is chosen after the fact, so even a good choice is slightly above 0.
        behind_best_ci: 95 % confidence interval of ``behind_best``; None for one victim.
    """

    rule: str
    dataset: str
    network: str
    activation: str
    epochs: int
    batch_size: int
    distribution: str
    victims: int
    irec: float
    irec_ci: list[float]
    leacc: float
    lnacc: float
    exact: float
    trivial_irec: float
    trivial_leacc: float
    seconds: float
    leacc_ci: list[float]
    lnacc_ci: list[float]
    exact_ci: list[float]
    trivial_lnacc: float
    trivial_exact: float
    chosen: str | None
    local_steps: int
    weights: str
    seen: bool | None
    norm: str
    mode: str | None
    classes: int | None
    init: str
    auxiliary_images: int
    test_accuracy: float | None
    # Older results do not have these fields.
    auxiliary_labels: bool | None = None
    best_other: str | None = None
    behind_best: float | None = None
    behind_best_ci: list[float] | None = None


def read_rows(folder: Path, rows: Any) -> list[RestorationRow]:
    names = {field.name for field in fields(RestorationRow)}
    needed = {field.name for field in fields(RestorationRow) if field.default is MISSING}
    if not rows or not all(isinstance(row, dict) and needed <= row.keys() <= names for row in rows):
        raise ValueError(
            f"Expected '{folder / 'run.json'}' to be the complete record of a cell, but got other rows. Remove "
            f"'{folder}' to run the cell again, or choose another `output`."
        )
    return [RestorationRow(**row) for row in rows]


def behind_best(recalls: Mapping[str, Sequence[float]]) -> tuple[str | None, float | None, list[float] | None]:
    """Return how far ``"auto"`` is behind the best other rule on the same victims.

    Args:
        recalls: recalls of every victim for each rule, with victims in the same order.

    Returns:
        The best other rule, the mean difference, and the ends of its 95 % confidence interval (None for one victim).
        All are None if there is no other rule.
    """
    others = {rule: sum(values) for rule, values in recalls.items() if rule != "auto"}
    if not others:
        return None, None, None
    best = max(others, key=lambda rule: others[rule])
    differences = torch.tensor(recalls[best], dtype=torch.float64) - torch.tensor(recalls["auto"], dtype=torch.float64)
    interval = list(mean_interval(differences)) if len(differences) > 1 else None
    return best, differences.mean().item(), interval


def draw_pictures(rows: Sequence[RestorationRow], output: Path) -> list[Path]:
    """Plot recall over the batch size, and over epochs and local steps if there are several values of them."""
    several = [name for name in _DIMENSIONS if len({getattr(row, name) for row in rows}) > 1]
    paths = []
    for over, (file, xlabel) in _PICTURES.items():
        if over != "batch_size" and over not in several:
            continue
        apart = [name for name in several if name != over]
        shown = list(rows)
        if "batch_size" in apart:
            sizes = sorted({row.batch_size for row in rows})
            chosen = {sizes[round(i * (len(sizes) - 1) / (_PANELS - 1))] for i in range(_PANELS)}
            shown = [row for row in rows if row.batch_size in chosen]
        panels: dict[str, dict[str, list[list[float]]]] = {}
        trivial: dict[str, dict[float, float]] = {}
        for row in shown:
            words = (_DIMENSIONS[name](getattr(row, name)) for name in apart)
            heading = ", ".join(words) or _heading(rows[0])
            place = getattr(row, over)
            panels.setdefault(heading, {}).setdefault(row.rule, []).append([place, row.irec, *row.irec_ci])
            trivial.setdefault(heading, {})[place] = row.trivial_irec
        figure = plot_recall(
            {
                heading: {rule: torch.tensor(curve) for rule, curve in curves.items()}
                for heading, curves in panels.items()
            },
            trivial={heading: torch.tensor([*guess.items()]) for heading, guess in trivial.items()},
            xlabel=xlabel,
            title=_title(rows[0]),
        )
        save_figure(figure, output / file)
        paths.append(output / file)
    return paths


def _title(row: RestorationRow) -> str:
    dataset = _DATASETS.get(row.dataset, row.dataset)  # a folder keeps its name
    dataset += "" if row.classes is None else f" over {row.classes} classes"
    norm = "" if row.norm == "none" else f", {row.norm} norm{f' ({row.mode})' if row.mode else ''}"
    return f"{dataset}, {WRITTEN[row.network]}, {_ACTIVATIONS[row.activation]}{norm}"


def _heading(row: RestorationRow) -> str:
    """Return the heading of a single panel."""
    words = [_DIMENSIONS["epochs"](row.epochs)]
    words += [row.distribution] if row.distribution != "uniform" else []
    words += [_DIMENSIONS["local_steps"](row.local_steps)] if row.local_steps > 1 else []
    return ", ".join(words)


def format_table(rows: Sequence[RestorationRow]) -> str:
    """Return the rows as a table for the terminal, with the trivial guess below the rules of each cell."""
    several = [name for name in _DIMENSIONS if len({getattr(row, name) for row in rows}) > 1]
    lines = [[*(name.replace("_", " ") for name in several), "rule", "IRec", "", "LeAcc", "LnAcc", "exact", "time"]]
    for _, group in itertools.groupby(rows, key=lambda row: [getattr(row, name) for name in _DIMENSIONS]):
        cell = list(group)
        where = [str(getattr(cell[0], name)) for name in several]
        for row in cell:
            low, high = row.irec_ci
            scores = [f"{value:.3f}" for value in (row.leacc, row.lnacc, row.exact)]
            rule = row.rule if row.chosen is None else f"auto ({row.chosen})"
            lines.append([*where, rule, f"{row.irec:.3f}", f"[{low:.3f}, {high:.3f}]", *scores, f"{row.seconds:.1f} s"])
        first = cell[0]
        scores = [f"{value:.3f}" for value in (first.trivial_leacc, first.trivial_lnacc, first.trivial_exact)]
        lines.append([*where, "trivial guess", f"{first.trivial_irec:.3f}", "", *scores, ""])
    return align(lines)
