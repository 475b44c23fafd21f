"""The results of `tradeoff.py`: rows, table and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tradeoff_defenses import DEFENSES  # in this folder

from leakage.comparison import align
from leakage.plots import COLOURS, INK, PALE, new_figure

_MARKERS = "osD^vP*X<>ph"


@dataclass
class TradeoffRow:
    """One attack on clients with one defense, an entry of ``summary.json``.

    Attributes:
        defense: name of the defense.
        strength: strength of the defense, in its own unit.
        attack: name of the attack.
        adaptive: whether the attacker knows the defense.
        network: name of the network.
        epochs: epochs of training of the network, 0 for none.
        images: number of images of a victim, or of all clients that are aggregated into one.
        victims: number of victims.
        psnr_mean: mean PSNR over victims, dB.
        psnr_ci: its 95 % interval, by Student's t.
        mse_median: median MSE over victims.
        success_rate: share of the images with an MSE below ``success_threshold``.
        success_ci: its 95 % Wilson interval.
        success_threshold: success threshold of the attack.
        identified: share of the images that are nearer to their reconstruction than any of ``others`` of their class.
        identified_ci: its 95 % Wilson interval.
        others: largest number of other images of a class.
        baseline: mean PSNR of the best guess without any gradient, dB.
        label_accuracy: share of the images with the right label.
        test_accuracy: test accuracy of networks trained under the defense, 0 to 1; None if none was trained.
        test_accuracy_ci: its 95 % interval, by Student's t, for the learning rate chosen with the first network.
        learning_rate: learning rate of this training, chosen from a few for the defense; None if none was trained.
        bytes: number of bytes that a client sends.
        epsilon: epsilon of one step of DP-SGD in which every image takes part, at ``delta``; None without noise of a
            fixed size.
        delta: delta of ``epsilon``.
        bound: bound on ``identified`` for every attacker who knows the label and not the other images; None if there is
            none.
        seconds_per_victim: duration of the attack per victim.
    """

    defense: str
    strength: float
    attack: str
    adaptive: bool
    network: str
    epochs: int
    images: int
    victims: int
    psnr_mean: float
    psnr_ci: tuple[float, float]
    mse_median: float
    success_rate: float
    success_ci: tuple[float, float]
    success_threshold: float
    identified: float
    identified_ci: tuple[float, float]
    others: int
    baseline: float
    label_accuracy: float
    epsilon: float | None
    delta: float
    bound: float | None
    seconds_per_victim: float
    bytes: int = 0
    test_accuracy: float | None = None
    test_accuracy_ci: tuple[float, float] | None = None
    learning_rate: float | None = None


def format_table(rows: Sequence[TradeoffRow]) -> str:
    """Format the rows as a table for the terminal; a star marks what is no better than a guess without any gradient."""
    private = any(row.epsilon is not None for row in rows)
    columns = ["", "attack", "attacker", "PSNR", "success", "identified", "labels", "bytes", "accuracy"]
    lines = [columns + ["epsilon", "bound"] * private]
    for row in rows:
        low, high = row.psnr_ci
        least, most = row.success_ci
        accuracy = ""
        if row.test_accuracy is not None and row.test_accuracy_ci is not None:
            half = (row.test_accuracy_ci[1] - row.test_accuracy_ci[0]) / 2
            accuracy = f"{100 * row.test_accuracy:.1f} %" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")
        lines.append(
            [
                DEFENSES[row.defense].named(row.strength),
                row.attack,
                "adaptive" if row.adaptive else "naive",
                f"{row.psnr_mean:.1f} dB [{low:.1f}, {high:.1f}]" + " *" * (row.psnr_mean <= row.baseline),
                f"{100 * row.success_rate:.0f} % [{100 * least:.0f}, {100 * most:.0f}]",
                f"{100 * row.identified:.0f} %",
                f"{100 * row.label_accuracy:.0f} %",
                f"{row.bytes:,}",
                accuracy,
                *(
                    [f"{row.epsilon:.3g}", f"{100 * row.bound:.2g} %"]
                    if row.epsilon and row.bound
                    else ["", ""] * private
                ),
            ]
        )
    note = f"The best guess without any gradient has {rows[0].baseline:.1f} dB; * marks attacks that do not beat it."
    return "\n".join([align(lines), "", note])


def best(rows: Sequence[TradeoffRow]) -> dict[tuple[str, float, bool], TradeoffRow]:
    """Return the attack with the best mean PSNR for each defense, strength and kind of attacker."""
    found: dict[tuple[str, float, bool], TradeoffRow] = {}
    for row in rows:
        key = row.defense, row.strength, row.adaptive
        if key not in found or row.psnr_mean > found[key].psnr_mean:
            found[key] = row
    return found


def plot_attackers(rows: Sequence[TradeoffRow], title: str) -> Figure:
    """Plot the PSNR under each defense and strength: the best naive and the best adaptive attack, joined by a line."""
    found = best(rows)
    cells = list(dict.fromkeys((row.defense, row.strength) for row in rows))
    figure = new_figure(7.2, 1.4 + 0.24 * len(cells))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for place, (defense, strength) in enumerate(cells):
        both = [found.get((defense, strength, adaptive)) for adaptive in (False, True)]
        values = [max(row.psnr_mean, 0.0) for row in both if row is not None]
        axes.plot([min(values), max(values)], [place, place], color=PALE, linewidth=1.2, zorder=1)
        for row, colour, marker in zip(both, COLOURS, "os", strict=False):
            if row is not None:
                axes.plot(max(row.psnr_mean, 0.0), place, marker, color=colour, markersize=5, zorder=2)
    axes.axvline(rows[0].baseline, color=INK, linestyle=":", linewidth=1)
    names = [DEFENSES[defense].named(strength) for defense, strength in cells]
    axes.set_yticks(range(len(cells)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=-1)
    axes.set_xlabel("PSNR of the images found, dB, 0 for less (further right: more is given away)", color=INK)
    axes.set_title(title, fontsize=10, color=INK)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for colour, marker, label in zip(
            COLOURS, "os", ("does not know the defense", "knows the defense"), strict=False
        )
    ]
    handles.append(Line2D([], [], color=INK, linestyle=":", label="best guess without any gradient"))
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def plot_tradeoff(rows: Sequence[TradeoffRow], title: str) -> Figure:
    """Plot privacy against accuracy: a curve over the strengths of each defense, for both attackers."""
    found = best(rows)
    figure = new_figure(7.6, 4.6)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row.defense for row in rows if row.test_accuracy is not None))
    for place, name in enumerate(names):
        colour, marker = COLOURS[place % len(COLOURS)], _MARKERS[place % len(_MARKERS)]
        for adaptive, style in ((True, "-"), (False, ":")):
            points = [
                (100 * row.test_accuracy, max(row.psnr_mean, 0.0))
                for (defense, _, known), row in sorted(found.items(), key=lambda item: item[0][1])
                if defense == name and known == adaptive and row.test_accuracy is not None
            ]
            if points:
                label = DEFENSES[name].written if adaptive or name == "none" else None
                axes.plot(*zip(*points, strict=True), style, marker=marker, color=colour, markersize=5, label=label)
    axes.axhline(rows[0].baseline, color=INK, linestyle="--", linewidth=1, label="best guess without any gradient")
    axes.set_xlabel("test accuracy of networks trained under the defense, % (right is better)", color=INK)
    axes.set_ylim(bottom=-1)
    axes.set_ylabel("PSNR of the images found, dB, 0 for less (lower is better)", color=INK)
    axes.set_title(f"{title}\nsolid: the attacker knows the defense; dotted: it does not", fontsize=10, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
