"""Results of methods that make small training sets: their rows, table and picture."""

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

# A type of row with `accuracy_std` and `accuracy_ci`.
Row = TypeVar("Row")

# The files that a run writes to the top level of its folder.
FILES = ("summary.json", "accuracy.png", "synthetic.png", "synthetic.safetensors")


@dataclass
class CondensationRow:
    """Test accuracy of networks trained on the sets of one method, a line of ``summary.json``.

    Attributes:
        method: a key of ``METHODS`` in ``condensing.py``.
        dataset: name of the data set.
        images_per_class: images per class of each set; None for the whole training set.
        evaluation: ``"dc"`` or ``"dsa"``; None for the whole training set.
        sets: number of sets, each with its own seed.
        iterations: iterations of the condensation, or None if nothing is condensed.
        accuracy_mean: mean over the networks of all sets, 0 to 1.
        accuracy_std: standard deviation over the networks of all sets.
        accuracy_ci: 95 % confidence interval of the mean by Student's t-distribution. With several sets it is over
            their means, since networks trained on the same set are not independent; with one set it is over its
            networks, and holds for this set only.
        networks: number of networks trained on each set.
        seconds: average time to make a set, without tests, summed over all sessions of a resumed run; for ``"full"``
            the time of training and testing.
        published_accuracy: accuracy in the paper of this evaluation, 0 to 1; None if there is none or nothing is
            condensed.
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
    """Compute the accuracy columns of a row from one evaluation of each set, all with the same number of networks."""
    accuracies = torch.cat([outcome.accuracies for outcome in found])
    means = torch.stack([outcome.accuracies.mean() for outcome in found])
    return {
        "accuracy_mean": float(means.mean()),
        "accuracy_std": float(accuracies.std()) if len(accuracies) > 1 else math.nan,
        "accuracy_ci": mean_interval(means if len(found) > 1 else accuracies),
        "networks": found[0].networks,
    }


def format_table(rows: Sequence[CondensationRow]) -> str:
    """Format the rows for the terminal: a line per method, with the accuracies of each evaluation."""
    evaluations = list(dict.fromkeys(row.evaluation for row in rows if row.evaluation)) or ["dc"]
    columns = [title for name in evaluations for title in (f"test accuracy ({name})", "95 % interval", "paper")]
    lines = [["", "images per class", "iterations", "sets x networks", *columns, "time per set"]]
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
    """Format an accuracy with its standard deviation, and its interval; a single network has neither."""
    spread = "" if math.isnan(std) else f" ± {100 * std:.1f}"
    low, high = interval
    return f"{100 * mean:.1f}{spread} %", "-" if math.isnan(low) else f"[{100 * low:.1f}, {100 * high:.1f}]"


def read_accuracy_row(folder: Path, configuration: dict[str, Any], kind: type[Row]) -> Row | None:
    """Read the row of a finished run with :func:`read_record`, or None if there is none.

    A single network has neither standard deviation nor interval. They are null in the file, since JSON has no NaN.
    """
    record = read_record(folder, configuration, kind)
    if record is None:
        return None
    std, interval = record["accuracy_std"], record["accuracy_ci"]
    record["accuracy_std"] = math.nan if std is None else std
    record["accuracy_ci"] = tuple(math.nan if end is None else end for end in interval)
    return kind(**record)


def write_overview(folder: Path, rows: Sequence[CondensationRow]) -> None:
    """Write the rows, a picture with the curves of all methods, and the first set of the first method that has one."""
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
    """Remove the files that an earlier run of a method has written, and no others."""
    written = ("run.json", "last.ckpt", "accuracy.*", "synthetic.*", "synthetic/iteration_*.png", "evaluations/*.json")
    for pattern in ("budget.json", "evaluations/*.json", *(f"seed_*/{name}" for name in written)):
        for path in folder.glob(pattern):
            path.unlink()
