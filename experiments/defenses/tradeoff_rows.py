"""The results of `tradeoff.py`: rows, table and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tradeoff_defenses import DEFENSES  # in this folder

from leakage.comparison import align
from leakage.plots import COLOURS, INK, PALE, new_figure

_COLUMNS = 4
_SHADE = "#E8E8E8"
_ATTACKERS = ("does not know the defense", "knows the defense")
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": PALE, "linestyle": "--", "marker": "o", "markersize": 3.5, "linewidth": 1.1},
    {"color": COLOURS[0], "linestyle": "-", "marker": "o", "markersize": 4.5, "linewidth": 1.6},
)
_PLAIN: dict[str, Any] = {"color": INK, "marker": "x", "markersize": 6, "linestyle": ""}


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
        psnr_encoded: mean PSNR against the encoded images if the defense encodes images, dB; else None.
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
    psnr_encoded: float | None = None


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
    guesses = sorted({f"{row.baseline:.1f}" for row in rows}, key=float)
    guess = guesses[0] if len(guesses) == 1 else f"{guesses[0]} to {guesses[-1]}"
    note = f"The best guess without any gradient has {guess} dB; * marks attacks that do not beat it."
    return "\n".join([align(lines), "", note])


def format_page(rows: Sequence[TradeoffRow]) -> str:
    """Format the best naive and the best adaptive attack of each defense as a Markdown table.

    Where an adaptive attacker finds nine images of ten, and a naive one fewer, the PSNR is bold.
    """
    found = best(rows)
    names = ["the client", "naive: PSNR", "found", "adaptive: PSNR", "95 % interval", "found", "identified", "bytes"]
    trained = any(row.test_accuracy is not None for row in rows)
    names += ["test accuracy"] * trained
    lines = []
    for defense, strength in dict.fromkeys((row.defense, row.strength) for row in rows):
        naive, adaptive = (found.get((defense, strength, kind)) for kind in (False, True))
        last = adaptive or naive
        assert last is not None
        cells = ["", ""] if naive is None else [_psnr(naive), _share(naive.success_rate, naive.success_ci)]
        broken = adaptive is not None and adaptive.success_rate >= 0.9 > (naive.success_rate if naive else 0.0)
        mark = "**" if broken else ""
        cells.append("" if adaptive is None else f"{mark}{_psnr(adaptive)}{mark}")
        cells.append("[{:.1f}, {:.1f}]".format(*last.psnr_ci))
        cells.append("" if adaptive is None else _share(adaptive.success_rate, adaptive.success_ci))
        cells += [_share(last.identified, last.identified_ci), f"{last.bytes:,}"]
        if trained:
            accuracy, interval = last.test_accuracy, last.test_accuracy_ci
            cells.append("not run" if accuracy is None or interval is None else _share(accuracy, interval, 1))
        lines.append([DEFENSES[defense].named(strength), *cells])
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _psnr(row: TradeoffRow) -> str:
    written = f"{row.psnr_mean:.1f} dB" if row.psnr_mean >= 0 else "below 0 dB"
    return written + " *" * (row.psnr_mean <= row.baseline)


def _share(value: float, interval: tuple[float, float], digits: int = 0) -> str:
    low, high = (f"{100 * end:.{digits}f}" for end in interval)
    return f"{100 * value:.{digits}f} % [{low}, {high}]"


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
        guess = next(row.baseline for row in both if row is not None)
        axes.plot([guess, guess], [place - 0.5, place + 0.5], ":", color=INK, linewidth=1)
        for row, colour, marker in zip(both, COLOURS, "os", strict=False):
            if row is not None:
                axes.plot(max(row.psnr_mean, 0.0), place, marker, color=colour, markersize=5, zorder=2)
    names = [DEFENSES[defense].named(strength) for defense, strength in cells]
    axes.set_yticks(range(len(cells)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=-1)
    axes.set_xlabel("PSNR of the images found, dB, 0 for less (further right: more is given away)", color=INK)
    axes.set_title(title, fontsize=10, color=INK)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for colour, marker, label in zip(COLOURS, "os", _ATTACKERS, strict=False)
    ]
    handles.append(Line2D([], [], color=INK, linestyle=":", label="best guess without any gradient"))
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def plot_tradeoff(rows: Sequence[TradeoffRow], title: str) -> Figure:
    """Plot privacy against accuracy, one panel per defense: a curve over its strengths for each kind of attacker.

    A cross marks clients without a defense, if they are among the rows. In the shaded area, an attack is no better than
    the best guess without any gradient.
    """
    found = {key: row for key, row in sorted(best(rows).items()) if row.test_accuracy is not None}
    names = list(dict.fromkeys(row.defense for row in rows if row.test_accuracy is not None))
    plain = next((row for (name, *_), row in found.items() if name == "none"), None)
    names = [name for name in names if name != "none"] or names
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = new_figure(0.6 + 2.1 * max(columns, 3), 1.3 + 1.75 * lines)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        own = [row for (defense, *_), row in found.items() if defense == name]
        axes.axhspan(-10, sum(row.baseline for row in own) / len(own), color=_SHADE, zorder=0, linewidth=0)
        for adaptive in (False, True):
            curve = [row for row in own if row.adaptive == adaptive]
            points = [(100 * (row.test_accuracy or 0.0), max(row.psnr_mean, 0.0)) for row in curve]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), **_STYLES[adaptive])
            if adaptive:
                _name_ends(axes, [DEFENSES[name].short(row.strength) for row in curve], points)
        if plain is not None and name != "none":
            axes.plot(100 * (plain.test_accuracy or 0.0), max(plain.psnr_mean, 0.0), **_PLAIN)
        axes.set_title(DEFENSES[name].written, fontsize=9, color=INK, pad=3)
        axes.tick_params(labelsize=7)
        axes.margins(0.12)
        axes.set_ylim(-9, max(max(row.psnr_mean for row in found.values()), 20) + 8)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("test accuracy of networks trained under the defense, % (right is better)", fontsize=9, color=INK)
    figure.supylabel("PSNR of the images found, dB, 0 for less (lower is better)", fontsize=9, color=INK)
    handles = [Line2D([], [], label=label, **_STYLES[adaptive]) for adaptive, label in enumerate(_ATTACKERS)]
    handles += [Line2D([], [], label="no defense", **_PLAIN)] * (plain is not None)
    handles.append(Patch(color=_SHADE, label="no better than a guess without the gradient"))
    legend: dict[str, Any] = {
        "title": title,
        "title_fontsize": 10,
        "loc": "outside upper center",
        "ncols": 4 if columns > 2 else 2,
    }
    figure.legend(handles=handles, fontsize=8, frameon=False, **legend)
    return figure


def _name_ends(axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write the weakest and the strongest strength next to the ends of a curve, the upper one above."""
    ends = sorted({0, len(points) - 1}, key=lambda place: -points[place][1])
    for place, offset in zip(ends, (4, -10), strict=False):
        x, y = points[place]
        right = x > 45  # most accuracies are high: write to the left of them
        axes.annotate(
            names[place], (x, y), xytext=(-5 if right else 5, offset), textcoords="offset points", fontsize=7,
            color=INK, ha="right" if right else "left",
        )  # fmt: skip
