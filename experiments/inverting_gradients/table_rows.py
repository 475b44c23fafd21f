"""Results of `table.py`: its rows, the printed table, and the plot of PSNR over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from leakage.comparison import align
from leakage.plots import COLOURS, INK, PALE, new_figure

BASELINES = ("grey", "mean_colour", "nearest")
WRITTEN = {
    "inverting_gradients": "Inverting Gradients", "continuation": "Continuation", "grad_inversion": "GradInversion",
    "gias": "GIAS", "dlg": "DLG", "idlg": "iDLG", "gauss_newton": "Gauss-Newton",
}  # fmt: skip
_BASELINES_WRITTEN = {"grey": "grey", "mean_colour": "own mean colour", "nearest": "nearest training image"}


@dataclass
class TableRow:
    """Figures of one attack over all victims, a row of ``summary.json``.

    Attributes:
        attack: name of the attack.
        protocol: ``"published"`` or ``"robust"``.
        network: name of the network.
        activation: activation of the network; None for the network's own.
        epochs: number of training epochs, 0 for none.
        test_accuracy: test accuracy of the network, 0 to 1; None if untrained.
        images: number of images per victim.
        labels: ``"random"``, ``"distinct"`` or ``"equal"``.
        labels_revealed: whether the attacker knows the labels.
        local_steps: number of local steps per victim.
        victims: number of victims.
        psnr_mean: mean PSNR over victims, dB.
        psnr_ci: 95 % confidence interval of ``psnr_mean``, by Student's t.
        ssim_mean: mean SSIM over victims.
        exact: share of the images with an MSE below 1e-6.
        exact_ci: 95 % Wilson interval of ``exact``.
        identified: share of the images that are nearer to their reconstruction than any of ``others`` is, by MSE.
        identified_ci: 95 % Wilson interval of ``identified``.
        identified_features: share identified by the trained network's features before its last layer; None if
            untrained.
        others: number of other images.
        baseline_grey: mean PSNR of a grey image, dB.
        baseline_mean_colour: mean PSNR of each image's own mean colour, dB.
        baseline_nearest: mean PSNR of the nearest training image, dB.
        below: names of the baselines that the attack does not beat.
        label_accuracy: share of the images with the correct label.
        iterations: mean number of evaluations of the objective and its gradient, over all starts.
        seconds_per_victim: run time of the attack per victim.
        published_psnr: the paper's figure, dB; None if it has none.
        learning_rate_error: median over victims of the relative error of the recovered learning rate; None if the
            attacker knows the rate.
    """

    attack: str
    protocol: str
    network: str
    activation: str | None
    epochs: int
    test_accuracy: float | None
    images: int
    labels: str
    labels_revealed: bool
    local_steps: int
    victims: int
    psnr_mean: float
    psnr_ci: tuple[float, float]
    ssim_mean: float
    exact: float
    exact_ci: tuple[float, float]
    identified: float
    identified_ci: tuple[float, float]
    identified_features: float | None
    others: int
    baseline_grey: float
    baseline_mean_colour: float
    baseline_nearest: float
    below: list[str]
    label_accuracy: float
    iterations: float
    seconds_per_victim: float
    published_psnr: float | None = None
    learning_rate_error: float | None = None


def format_table(rows: Sequence[TableRow]) -> str:
    """Format the rows as a table for the terminal; a star marks attacks that do not beat every baseline."""
    lines = [["", "PSNR", "published", "SSIM", "exact", "identified", "labels", "iterations", "time"]]
    for row in rows:
        low, high = row.psnr_ci
        share, (least, most) = row.identified, row.identified_ci
        lines.append(
            [
                WRITTEN[row.attack] + " *" * bool(row.below),
                f"{row.psnr_mean:.1f} dB [{low:.1f}, {high:.1f}]",
                "" if row.published_psnr is None else f"{row.published_psnr:.1f} dB",
                f"{row.ssim_mean:.3f}",
                f"{100 * row.exact:.0f} %",
                f"{100 * share:.0f} % [{100 * least:.0f}, {100 * most:.0f}]",
                f"{100 * row.label_accuracy:.0f} %",
                f"{row.iterations:,.0f}",
                f"{row.seconds_per_victim:.1f} s",
            ]
        )
    first = rows[0]
    baselines = [f"{_BASELINES_WRITTEN[name]} {getattr(first, f'baseline_{name}'):.1f} dB" for name in BASELINES]
    notes = [f"Baselines without the gradient: {', '.join(baselines)}."]
    for row in rows:
        if row.below:
            names = " and ".join(_BASELINES_WRITTEN[name] for name in row.below)
            notes.append(f"* {WRITTEN[row.attack]} does not beat {names}, so it demonstrates no leakage.")
    return "\n".join([align(lines), "", *notes])


def plot_time(rows: Sequence[TableRow], title: str) -> Figure:
    """Plot PSNR over the run time of each attack per victim, with the baselines as lines."""
    figure = new_figure(7.2, 3.8)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for row, colour in zip(rows, COLOURS, strict=False):
        low, high = row.psnr_ci
        bars = None if math.isnan(low) else [[row.psnr_mean - low], [high - row.psnr_mean]]
        label = WRITTEN[row.attack] + (", below a baseline" if row.below else "")
        marker = "x" if row.below else "o"
        axes.errorbar(row.seconds_per_victim, row.psnr_mean, bars, fmt=marker, color=colour, capsize=3, label=label)
    for name, style in zip(BASELINES, (":", "--", "-."), strict=True):
        level = getattr(rows[0], f"baseline_{name}")
        axes.axhline(level, color=PALE, linestyle=style, linewidth=1, label=_BASELINES_WRITTEN[name])
    axes.set_xscale("log")
    axes.set_xlabel("seconds per victim", color=INK)
    axes.set_ylabel("PSNR, dB", color=INK)
    axes.set_title(title, fontsize=10, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
