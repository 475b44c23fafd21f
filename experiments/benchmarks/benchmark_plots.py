"""Pictures of benchmarks: curves over the number of lanes, and bars made up of parts."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from leakage.plots import COLOURS, INK, new_figure

sys.path.append(str(Path(__file__).parents[1] / "second_order"))
from reach_plots import draw_legend, finish_axes, legend_columns, marker_of

# Inches: size of a panel, height of a line of the legend and of the title.
_WIDTH, _HEIGHT, _LINE, _TITLE = 4.6, 3.4, 0.24, 0.4
# Inches: height of a bar and of the space below all bars, width of the axes and of a letter of a bar's name.
_BAR, _BELOW, _LENGTH, _LETTER = 0.42, 0.8, 5.2, 0.085
# Parts below this share of the longest bar show no number.
_SMALLEST = 0.09
# Maximum number of ticks on the axis of lanes.
_TICKS = 8
# Line styles, which distinguish curves of the same colour.
_STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
# Colours of parts, light enough for a number inside.
_LIGHT = ("#8DBBDD", "#F2B48C", "#8FD3BC", "#E5C3D8", "#F4D58A", "#B9DFF4", "#C9C9C9", "#D8C7A8", "#A9B9A9")


def plot_over_lanes(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], *, xlabel: str = "lanes", title: str = ""
) -> Figure:
    """Plot curves over the number of lanes, with both axes logarithmic and a separate scale for each panel.

    Args:
        panels: heading of each panel, such as ``"ms per victim"``, to its curves. A curve is a name, which has the
            same colour and marker in all panels, to at least one value by number of lanes; both are positive.
        xlabel: label of the axis of lanes.
        title: title of the figure.

    Raises:
        ValueError: there are no panels, a panel has no curves, a curve has no values, or a number is not positive and
            finite.

    Example:
        >>> figure = plot_over_lanes({"ms": {"LeNet": {1: 4.0, 16: 0.5}}, "MiB": {"LeNet": {1: 2.0, 16: 20.0}}})
        >>> [axes.get_title() for axes in figure.axes]
        ['ms', 'MiB']
    """
    if not panels:
        raise ValueError("Expected `panels` to hold at least one, but got none.")
    for heading, curves in panels.items():
        if not curves or not all(curves.values()):
            raise ValueError(f"Expected curves with values in {heading!r}, but got none.")
        for name, curve in curves.items():
            for lanes, value in curve.items():
                if not (0 < lanes < math.inf and 0 < value < math.inf):
                    raise ValueError(
                        f"Expected positive numbers for {name!r} in {heading!r}, but got {value} at {lanes}."
                    )
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    width = max(len(panels) * _WIDTH, 0.11 * len(title) + 0.3)
    lines = math.ceil(len(names) / legend_columns(names, width))
    figure = new_figure(width, _HEIGHT + lines * _LINE + (_TITLE if title else 0))
    figure.set_layout_engine("constrained")
    if title:
        figure.suptitle(title, fontsize=12, color=INK, weight="bold")
    ticks = sorted({lanes for curves in panels.values() for curve in curves.values() for lanes in curve})
    for axes, (heading, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, curve in curves.items():
            line = _line(names.index(name))
            line.set_data(*zip(*sorted(curve.items()), strict=True))
            axes.add_line(line)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.autoscale_view()
        axes.set_xticks(ticks[:: math.ceil(len(ticks) / _TICKS)])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        if high < 10 * low:  # there may be no power of ten for a tick
            axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(xlabel, color=INK)
        finish_axes(axes, heading)
    draw_legend(figure, [_line(index) for index in range(len(names))], names)
    return figure


def plot_parts(bars: Mapping[str, Mapping[str, float]], *, xlabel: str, title: str = "") -> Figure:
    """Plot a horizontal bar for each whole, made up of its parts; large parts show their value.

    Args:
        bars: name of each whole to its parts. A part is a name, which has the same colour in all bars, to a value of at
            least 0.
        xlabel: what the values are, such as ``"seconds"``.
        title: title of the figure.

    Raises:
        ValueError: there are no bars, a bar has no parts, a value is negative or not finite, or all values are zero.

    Example:
        >>> figure = plot_parts({"idlg": {"objective": 3.0, "L-BFGS": 1.0}}, xlabel="seconds")
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['objective', 'L-BFGS']
    """
    if not bars or not all(bars.values()):
        raise ValueError("Expected `bars` to hold at least one with parts, but got none.")
    for name, parts in bars.items():
        for part, value in parts.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"Expected values of at least 0, but got {value} for {part!r} of {name!r}.")
    longest = max(sum(parts.values()) for parts in bars.values())
    if not longest:
        raise ValueError("Expected values above 0, but got none.")
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    width = max(_LENGTH + _LETTER * max(map(len, bars)), 0.11 * len(title) + 0.3)
    lines = math.ceil(len(names) / legend_columns(names, width))
    figure = new_figure(width, _BELOW + len(bars) * _BAR + lines * _LINE + (_TITLE if title else 0))
    figure.set_layout_engine("constrained")
    if title:
        figure.suptitle(title, fontsize=12, color=INK, weight="bold")
    axes = figure.subplots()
    for row, parts in enumerate(bars.values()):
        left = 0.0
        for part, value in parts.items():
            axes.barh(row, value, left=left, height=0.62, color=_LIGHT[names.index(part) % len(_LIGHT)], zorder=2)
            if value >= _SMALLEST * longest:
                axes.text(
                    left + value / 2,
                    row,
                    f"{value:.3g}" if value < 100 else f"{value:.0f}",
                    fontsize=8,
                    color=INK,
                    ha="center",
                    va="center",
                )
            left += value
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(xlabel, color=INK)
    finish_axes(axes, "")
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.8)
    handles = [Patch(color=_LIGHT[index % len(_LIGHT)]) for index in range(len(names))]
    figure.legend(
        handles, names, loc="outside lower center", ncols=legend_columns(names, width), frameon=False, fontsize=9,
        labelcolor=INK,
    )  # fmt: skip
    return figure


def _line(index: int) -> Line2D:
    return Line2D(
        [], [], color=COLOURS[index % len(COLOURS)], linestyle=_STYLES[index // len(COLOURS) % len(_STYLES)],
        marker=marker_of(index), linewidth=1.5, markersize=5.5, markeredgecolor="white", markeredgewidth=0.5, zorder=3,
    )  # fmt: skip
