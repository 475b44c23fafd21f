"""Results of `reach.py`: its rows, table and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reach_plots import plot_noise, plot_reach
from reach_victims import WRITTEN, Cell, cell_columns
from torch import Tensor
from why import FOUND

from leakage.comparison import align
from leakage.metrics import ShareOverVictims
from leakage.plots import save_figure

METHODS_WRITTEN = {
    "gauss_newton": "Gauss-Newton", "rgap": "R-GAP", "idlg": "L-BFGS, robust", "idlg_published": "L-BFGS, published",
}  # fmt: skip
_ACTIVATIONS = {
    "relu": "ReLU", "leaky_relu": "leaky ReLU", "gelu": "GELU", "sigmoid": "sigmoid", "silu": "SiLU", "tanh": "tanh",
}  # fmt: skip
THRESHOLDS = {"below_1e6": 1e-6, "below_1e4": FOUND, "below_1e3": 1e-3}


@dataclass
class ReachRow:
    """Results of one method in one cell, a row of ``summary.json``.

    Attributes:
        method: name of the attack.
        dataset: data set of the images.
        network: ``"lenet"``, ``"wide_lenet"``, ``"convnet"``, ``"convnet32"`` or ``"resnet18"``.
        norm: norm layers of the network.
        activation: activation function of the network.
        epochs: number of training epochs, 0 for none.
        labels: ``"random"`` or ``"equal"``.
        images: number of images per victim.
        noise: noise in the gradients, relative to their root mean square.
        half: whether gradients were rounded to float16.
        init: ``"papers"`` or ``"torch"``.
        own_weights: whether each victim has its own network.
        test_accuracy: test accuracy of the network; None if untrained.
        victims: number of victims.
        equations: number of equations of a victim, which is the number of the network's parameters.
        unknowns: number of pixels of a victim.
        below_1e6: share of the images with an MSE below 1e-6.
        below_1e6_ci: 95 % Wilson interval of ``below_1e6`` over victims.
        below_1e4: share of the images with an MSE below 1e-4.
        below_1e4_ci: 95 % Wilson interval of ``below_1e4`` over victims.
        below_1e3: share of the images with an MSE below 1e-3.
        below_1e3_ci: 95 % Wilson interval of ``below_1e3`` over victims.
        all_below_1e4: share of the victims with all images below 1e-4.
        all_below_1e4_ci: 95 % Wilson interval of ``all_below_1e4``.
        mse_median: median MSE over images.
        mse_quartiles: first and third quartile of the MSE over images.
        seconds_per_victim: run time of the attack per victim.
        evaluations_median: median number of evaluations of the objective, over victims.
        verdict: why victims failed, for ``gauss_newton`` only.
    """

    method: str
    dataset: str
    network: str
    norm: str
    activation: str
    epochs: int
    labels: str
    images: int
    noise: float
    half: bool
    init: str
    own_weights: bool
    test_accuracy: float | None
    victims: int
    equations: int
    unknowns: int
    below_1e6: float
    below_1e6_ci: tuple[float, float]
    below_1e4: float
    below_1e4_ci: tuple[float, float]
    below_1e3: float
    below_1e3_ci: tuple[float, float]
    all_below_1e4: float
    all_below_1e4_ci: tuple[float, float]
    mse_median: float
    mse_quartiles: tuple[float, float]
    seconds_per_victim: float
    evaluations_median: float
    verdict: str | None = None


def make_row(cell: Cell, mse: Tensor, evaluations: Tensor, **columns: Any) -> ReachRow:
    """Return a row from the MSE ``(V, N)`` of all images and the evaluations ``(V,)``."""
    shares: dict[str, Any] = {}
    below = {name: (mse < limit).double().mean(1) for name, limit in THRESHOLDS.items()}
    below["all_below_1e4"] = (mse < FOUND).all(1).double()
    for name, values in below.items():
        metric = ShareOverVictims()
        metric.update(values)
        estimate = metric.compute()
        shares |= {name: estimate.value, f"{name}_ci": (estimate.low, estimate.high)}
    lower, median, upper = (_quantile(mse, share) for share in (0.25, 0.5, 0.75))
    return ReachRow(
        **cell_columns(cell),
        victims=len(mse),
        mse_median=median,
        mse_quartiles=(lower, upper),
        evaluations_median=statistics.median(evaluations.tolist()),
        **shares,
        **columns,
    )


def _quantile(mse: Tensor, share: float) -> float:
    """Return a quantile of the MSE over all images; NaN counts as infinite."""
    ranked = mse.double().nan_to_num(math.inf).flatten().sort().values.tolist()
    place = share * (len(ranked) - 1)
    low, high = ranked[math.floor(place)], ranked[math.ceil(place)]
    return low if low == high else low + (place - math.floor(place)) * (high - low)


def format_table(rows: Sequence[ReachRow]) -> str:
    """Format the rows as a table for the terminal."""
    names = ["dataset", "network", "norm", "activation", "epochs", "labels", "noise", "half"]
    several = [name for name in names if len({getattr(row, name) for row in rows}) > 1]
    header = [*several, "images", "equations", "unknowns", "method", "< 1e-6", "< 1e-4", "< 1e-3", "all < 1e-4"]
    lines = [[*header, "median MSE", "evaluations", "s/victim", "why it fails"]]
    for row in rows:
        cell = [str(getattr(row, name)) for name in several]
        cell += [str(row.images), f"{row.equations:,}", f"{row.unknowns:,}", METHODS_WRITTEN[row.method]]
        cell += [f"{100 * share:.0f} %" for share in (row.below_1e6, row.below_1e4, row.below_1e3)]
        low, high = (100 * end for end in row.all_below_1e4_ci)
        cell.append(f"{100 * row.all_below_1e4:.0f} % [{low:.0f}, {high:.0f}]")
        cell += [f"{row.mse_median:.1e}", f"{row.evaluations_median:.0f}", f"{row.seconds_per_victim:.2f}"]
        lines.append([*cell, row.verdict or ""])
    return align(lines)


def draw_pictures(rows: Sequence[ReachRow], output: Path) -> list[Path]:
    """Plot success over equations per unknown, and the MSE over noise if there is some; return the files."""
    methods = [method for method in METHODS_WRITTEN if any(row.method == method for row in rows)]
    exact = [row for row in rows if not row.noise and not row.half] or list(rows)
    panels: dict[str, dict[str, list[list[float]]]] = {METHODS_WRITTEN[method]: {} for method in methods}
    for row in exact:
        points = panels[METHODS_WRITTEN[row.method]].setdefault(_group(row, exact), [])
        points.append([row.equations / row.unknowns, row.below_1e4, *row.below_1e4_ci, row.images])
    figure = plot_reach(
        {
            method: {group: torch.tensor(points, dtype=torch.float64) for group, points in groups.items()}
            for method, groups in panels.items()
            if groups
        },
        title=_title(exact),
    )
    paths = [output / "reach.png"]
    save_figure(figure, paths[0])
    noisy = [row for row in rows if row.noise or row.half]
    if noisy:
        paths.append(output / "noise.png")
        save_figure(_noise_picture(rows), paths[1])
    return paths


def _noise_picture(rows: Sequence[ReachRow]) -> Any:
    """Plot the median MSE of each method over the noise, with a panel for each choice of the other options."""
    panels: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    names = ("dataset", "images")
    several = [name for name in names if len({getattr(row, name) for row in rows}) > 1]
    for row in sorted(rows, key=lambda row: (row.half, row.noise)):
        heading = _group(row, rows)
        heading += f", {row.dataset}" if "dataset" in several else ""
        heading += f", {row.images} image{'s' if row.images > 1 else ''}" if "images" in several else ""
        level = "float16" if row.half else _level(row.noise)
        curve = panels.setdefault(heading, {}).setdefault(METHODS_WRITTEN[row.method], {})
        curve[level] = (row.mse_median, *row.mse_quartiles)
    return plot_noise(panels, title=_title(rows))


def _level(noise: float) -> str:
    if not noise:
        return "0"
    mantissa, exponent = f"{noise:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}" if math.isclose(float(f"{noise:.0e}"), noise) else f"{noise:g}"


def _group(row: ReachRow, rows: Sequence[ReachRow]) -> str:
    """Return the legend entry of a row: the network, and all other options with several values."""
    parts = [WRITTEN[row.network], _ACTIVATIONS[row.activation]]
    parts += [f"{row.norm} norm"] if len({one.norm for one in rows if one.network == row.network}) > 1 else []
    parts += [f"{row.epochs} epoch{'s' if row.epochs != 1 else ''}"] if len({one.epochs for one in rows}) > 1 else []
    parts += [f"{row.labels} labels"] if len({one.labels for one in rows}) > 1 else []
    return ", ".join(parts)


def _title(rows: Sequence[ReachRow]) -> str:
    datasets = ", ".join(dict.fromkeys(row.dataset for row in rows))
    equal = "" if any(row.labels == "random" for row in rows) else ", equal labels"
    return f"{datasets}, {rows[0].victims} victims per marker{equal}"
