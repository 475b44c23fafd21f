"""What came of several ways to make a small training set: rows, the table and the picture of them."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from leakage.callbacks import read_accuracies
from leakage.comparison import align
from leakage.condensation import Evaluation
from leakage.files.text import write_json
from leakage.metrics.estimates import mean_interval
from leakage.plots import plot_accuracy, save_figure

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from records import read_record

# Of rows with `accuracy_std` and `accuracy_ci`.
Row = TypeVar("Row")

# All that a run writes to its folder itself.
FILES = ("summary.json", "accuracy.png", "synthetic.png", "synthetic.safetensors")


@dataclass
class CondensationRow:
    """Test accuracy of networks trained on the sets of one method, a line of ``summary.json``.

    Attributes:
        method: one of those of ``condensing.py``.
        dataset: where the images come from.
        images_per_class: of each set; None for the whole training set.
        evaluation: ``"dc"`` or ``"dsa"``; None for the whole training set.
        sets: how many were made, each with a seed of its own.
        iterations: of the condensation, None where there is none.
        accuracy_mean: over the networks of all sets, 0 to 1.
        accuracy_std: over the networks of all sets.
        accuracy_ci: 95 % confidence interval of the mean, after Student: over the sets' means where there are several,
            as networks that are trained on the same set are not independent; for one set over its networks, so about
            this set alone.
        networks: how many were trained on each set.
        seconds: spent on making a set, without tests, on average and over all sessions of a resumed run; on training
            and testing for ``"full"``.
        published_accuracy: that of the paper of this evaluation, 0 to 1, where there is one and something is condensed.
    """

    method: str
    dataset: str
    images_per_class: int | None
    evaluation: str | None
    sets: int
    iterations: int | None
    accuracy_mean: float
    accuracy_std: float
    accuracy_ci: tuple[float, float]
    networks: int
    seconds: float
    published_accuracy: float | None = None


def sum_up(found: Sequence[Evaluation]) -> dict[str, Any]:
    """Columns of a row about accuracies, of one evaluation of each set with the same number of networks."""
    accuracies = torch.cat([outcome.accuracies for outcome in found])
    means = torch.stack([outcome.accuracies.mean() for outcome in found])
    return {
        "accuracy_mean": float(means.mean()),
        "accuracy_std": float(accuracies.std()) if len(accuracies) > 1 else math.nan,
        "accuracy_ci": mean_interval(means if len(found) > 1 else accuracies),
        "networks": found[0].networks,
    }


def format_table(rows: Sequence[CondensationRow]) -> str:
    """A line per method for the terminal, for each evaluation with the standard deviation over networks."""
    evaluations = list(dict.fromkeys(row.evaluation for row in rows if row.evaluation)) or ["dc"]
    columns = [title for name in evaluations for title in (f"test accuracy ({name})", "95 % interval", "paper")]
    lines = [["", "images per class", "iterations", "sets x networks", *columns, "time a set"]]
    for method in dict.fromkeys(row.method for row in rows):
        own = {row.evaluation or evaluations[0]: row for row in rows if row.method == method}
        first = next(iter(own.values()))
        line = [
            method,
            "all" if first.images_per_class is None else str(first.images_per_class),
            "-" if first.iterations is None else str(first.iterations),
            f"{first.sets} x {first.networks}",
        ]
        for name in evaluations:
            row = own.get(name)
            if row is None:
                line += ["-"] * 3
                continue
            paper = row.published_accuracy
            line += accuracy_cells(row.accuracy_mean, row.accuracy_std, row.accuracy_ci)
            line.append("-" if paper is None else f"{100 * paper:.1f} %")
        lines.append([*line, f"{first.seconds:.0f} s"])
    return align(lines)


def accuracy_cells(mean: float, std: float, interval: tuple[float, float]) -> tuple[str, str]:
    """An accuracy in words, and its interval; without what one network does not have."""
    spread = "" if math.isnan(std) else f" ± {100 * std:.1f}"
    low, high = interval
    return f"{100 * mean:.1f}{spread} %", "-" if math.isnan(low) else f"[{100 * low:.1f}, {100 * high:.1f}]"


def read_accuracy_row(folder: Path, configuration: dict[str, Any], kind: type[Row]) -> Row | None:
    """The row of a finished run as :func:`read_record` reads it, None if there is none.

    One network has neither standard deviation nor interval, and JSON no numbers for that: they are null in the file.
    """
    record = read_record(folder, configuration, kind)
    if record is None:
        return None
    std, interval = record["accuracy_std"], record["accuracy_ci"]
    record["accuracy_std"] = math.nan if std is None else std
    record["accuracy_ci"] = tuple(math.nan if end is None else end for end in interval)
    return kind(**record)


def write_overview(folder: Path, rows: Sequence[CondensationRow]) -> None:
    """The rows, the curves of all methods in one picture, and the first set of the first method that has one."""
    firsts = {row.method: sorted((folder / row.method).glob("seed_*/synthetic.safetensors")) for row in rows}
    paths = {method: found[0].with_name("accuracy.csv") for method, found in firsts.items() if found}
    curves = {f"{method}, held out": read_accuracies(path) for method, path in paths.items() if path.is_file()}
    lines = {f"{row.method}, test": row.accuracy_mean for row in rows if row.evaluation in (None, rows[0].evaluation)}
    paper = [row.published_accuracy for row in rows if row.published_accuracy is not None]
    if curves:
        lines |= {"paper": paper[0]} if paper else {}
        save_figure(plot_accuracy(curves, lines=lines, title=rows[0].dataset), folder / "accuracy.png")
    write_json(folder / "summary.json", [asdict(row) for row in rows])
    made = next((found[0] for found in firsts.values() if found), None)
    for name in ("synthetic.safetensors", "synthetic.png") if made is not None else ():
        shutil.copyfile(made.with_name(name), folder / name)


def clear(folder: Path) -> None:
    """Remove what an earlier run of a method has written, and nothing else."""
    written = ("run.json", "last.ckpt", "accuracy.*", "synthetic.*", "synthetic/iteration_*.png", "evaluations/*.json")
    for pattern in ("budget.json", "evaluations/*.json", *(f"seed_*/{name}" for name in written)):
        for path in folder.glob(pattern):
            path.unlink()
