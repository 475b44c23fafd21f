"""Plots of the success of attacks: over the equations per unknown, and over noise in the gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from torch import Tensor

from leakage.plots import COLOURS, INK, PALE, new_figure

# Markers with room for a number inside.
_MARKERS = ("o", "s", "D", "p", "8", "h", "d")
# Panels side by side; inches: width and height of a panel, width of a single panel, a line of the legend, the title.
_ACROSS, _WIDTH, _HEIGHT, _SINGLE, _LINE, _TITLE = 2, 4.6, 3.2, 5.6, 0.24, 0.4
# Inches of a letter in the legend, and of the marker and gaps of an entry.
_LETTER, _ENTRY = 0.075, 0.55
# Step by which overlapping markers are moved apart, as a share of the axis.
_APART = 0.018
# Markers overlap if they are nearer than this, as a share of the axis and in success.
_NEAR, _NEAR_SUCCESS = 0.036, 0.06
# Distance between methods at a level that is not a number, in steps of the axis.
_BESIDE = 0.16
# An MSE is clamped to this range; the lower end is about the square of single precision's rounding.
_LEAST, _MOST = 1e-15, 1e2


def plot_reach(
    panels: Mapping[str, Mapping[str, Tensor]],
    *,
    ylabel: str = "images with MSE < 1e-4",
    title: str = "",
) -> Figure:
    """Plot success over the number of equations per unknown, with a marker for each experiment.

    Vertical bars are 95 % intervals. The number in a marker is the number of images behind one gradient. Left of the
    dashed line there are more unknowns than equations. Markers that would overlap are drawn side by side.

    Args:
        panels: maps the heading of each panel, such as a method, to its groups. Groups map a name, which has the same
            colour and marker in all panels, to ``(P, 5)``: equations per unknown (positive), success from 0 to 1, the
            ends of its interval (NaN for none), and images per gradient.
        ylabel: what counts as a success.
        title: title of the figure.

    Raises:
        ValueError: if there are no panels, a panel has no groups, or numbers have the wrong shape or range.

    Example:
        >>> points = torch.tensor([[17.0, 1.0, 0.93, 1.0, 1], [8.5, 0.9, 0.80, 0.95, 2]])
        >>> figure = plot_reach({"Gauss-Newton": {"LeNet, sigmoid": points}})
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['LeNet, sigmoid', 'as many equations as unknowns']
    """
    _check_reach(panels)
    groups = list(dict.fromkeys(name for named in panels.values() for name in named))
    boundary = "as many equations as unknowns"
    figure, grid = _panels(panels, [*groups, boundary], title)
    places = torch.cat([points[:, 0].double() for named in panels.values() for points in named.values()])
    low = math.log10(min(float(places.min()), 1.0)) - 0.2
    high = math.log10(max(float(places.max()), 1.0)) + 0.2
    handles = [
        Line2D([], [], color=_colour(index), marker=marker_of(index), linestyle="none", markersize=8)
        for index in range(len(groups))
    ]
    for axes, (heading, named) in zip(grid, panels.items(), strict=True):
        axes.axvspan(10**low, 1, color="#f2f2f2", linewidth=0, zorder=0)
        line = axes.axvline(1, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        drawn: list[tuple[float, float]] = []
        for index, name in enumerate(groups):
            for ratio, success, bottom, top, images in named[name].tolist() if name in named else ():
                place = _free(drawn, (math.log10(ratio) - low) / (high - low), success)
                drawn.append((place, success))
                x, colour = 10 ** (low + place * (high - low)), _colour(index)
                if math.isfinite(bottom + top):
                    axes.plot([x, x], [bottom, top], color=colour, alpha=0.4, linewidth=1.2, zorder=2, clip_on=False)
                axes.plot(
                    [x], [success], color=colour, marker=marker_of(index), markersize=10, linestyle="none", zorder=3,
                    markeredgecolor="white", markeredgewidth=0.6, clip_on=False,
                )  # fmt: skip
                axes.annotate(
                    f"{images:g}", (x, success), color="white", fontsize=6, weight="bold", ha="center",
                    va="center_baseline", zorder=4, annotation_clip=False,
                )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(10**low, 10**high)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_xlabel("equations per unknown", color=INK)
        finish_axes(axes, heading)
    grid[0].set_ylabel(ylabel, color=INK)
    draw_legend(figure, [*handles, line], [*groups, boundary], note="number in a marker: images per gradient")
    return figure


def plot_noise(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]],
    *,
    xlabel: str = "noise in the gradient, relative to its RMS",
    title: str = "",
) -> Figure:
    """Plot median MSE (left axis) and PSNR (right axis) over changes to the gradient, with a line per method.

    Bands reach from the first to the third quartile. Values below 1e-15, the square of single precision's rounding, are
    drawn at 1e-15; values above 100 or not finite are drawn at 100.

    Args:
        panels: maps the heading of each panel to its methods. Methods map a name to levels, such as ``"1e-4"`` or
            ``"float16"``, and these to the median of the MSE and its quartiles, at least 0. Levels are evenly spaced in
            the given order. Levels that are not numbers come last, without a line.
        xlabel: what the levels are.
        title: title of the figure.

    Raises:
        ValueError: if there are no panels, a panel has no methods, a method has no levels, or an MSE is below 0.

    Example:
        >>> curve = {"0": (1e-12, 1e-13, 1e-11), "1e-4": (1e-5, 1e-6, 1e-4), "float16": (1e-4, 1e-5, 1e-3)}
        >>> figure = plot_noise({"LeNet": {"Gauss-Newton": curve}})
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['0', '1e-4', 'float16']
    """
    _check_noise(panels)
    methods = list(dict.fromkeys(name for named in panels.values() for name in named))
    figure, grid = _panels(panels, methods, title)
    for axes, (heading, named) in zip(grid, panels.items(), strict=True):
        levels = list(dict.fromkeys(level for curve in named.values() for level in curve))
        # Levels that are not numbers come last.
        levels.sort(key=lambda level: not _is_number(level))
        for index, method in enumerate(methods):
            curve = {level: [_drawable(value) for value in values] for level, values in named.get(method, {}).items()}
            for numbers in (True, False):
                chosen = [level for level in levels if level in curve and _is_number(level) == numbers]
                if not chosen:
                    continue
                # Without a line, methods are drawn side by side.
                shift = 0.0 if numbers else _BESIDE * (index - (len(methods) - 1) / 2)
                x = [levels.index(level) + shift for level in chosen]
                median, low, high = zip(*(curve[level] for level in chosen), strict=True)
                axes.plot(
                    x, median, color=_colour(index), marker=marker_of(index), linestyle="-" if numbers else "none",
                    markeredgecolor="white", markeredgewidth=0.6, linewidth=1.7, markersize=7, zorder=3, clip_on=False,
                )  # fmt: skip
                if numbers and len(chosen) > 1:
                    axes.fill_between(x, low, high, color=_colour(index), alpha=0.15, linewidth=0)
                else:
                    axes.vlines(x, low, high, color=_colour(index), alpha=0.35, linewidth=1.2, zorder=2)
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, _LEAST / 3), max(top, 2 * bottom))
        axes.set_xticks(range(len(levels)), levels)
        axes.set_xlim(-0.4, len(levels) - 0.6)
        axes.set_xlabel(xlabel, color=INK)
        finish_axes(axes, heading)
    for axes in grid:  # one scale for all
        axes.set_ylim(min(one.get_ylim()[0] for one in grid), max(one.get_ylim()[1] for one in grid))
    grid[0].set_ylabel("median MSE", color=INK)
    right = grid[-1].twinx()
    right.set_ylim(*(-10 * math.log10(mse) for mse in grid[-1].get_ylim()))
    right.set_ylabel("PSNR in dB", color=INK)
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
    handles = [
        Line2D([], [], color=_colour(index), marker=marker_of(index), linewidth=1.7) for index in range(len(methods))
    ]
    draw_legend(figure, handles, methods)
    return figure


def _panels(headings: Mapping[str, object], names: list[str], title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure and axes, with room for the title above and a legend of these names below."""
    down = math.ceil(len(headings) / _ACROSS)
    across = math.ceil(len(headings) / down)
    width = across * _WIDTH if len(headings) > 1 else _SINGLE
    lines = math.ceil(len(names) / legend_columns(names, width)) + 1
    figure = new_figure(max(width, 0.11 * len(title) + 0.3), down * _HEIGHT + lines * _LINE + (_TITLE if title else 0))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes in grid.flat[len(headings) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=12, color=INK, weight="bold")
    return figure, list(grid.flat[: len(headings)])


def legend_columns(names: list[str], width: float) -> int:
    widest = _ENTRY + _LETTER * max(map(len, names))
    return max(1, min(len(names), math.floor((width - 0.2) / widest)))


def draw_legend(figure: Figure, handles: list[Line2D], names: list[str], note: str | None = None) -> None:
    figure.legend(
        handles, names, loc="outside lower center", ncols=legend_columns(names, figure.get_size_inches()[0]),
        frameon=False, fontsize=9, labelcolor=INK, title=note, title_fontproperties={"size": 8},
    )  # fmt: skip


def finish_axes(axes: Axes, heading: str) -> None:
    axes.set_title(heading, fontsize=10, color=INK, pad=10)  # markers reach above the axes
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _free(drawn: list[tuple[float, float]], place: float, success: float) -> float:
    """Return the nearest place on the axis where a marker does not overlap another."""
    steps = (sign * step * _APART for step in range(2 * len(drawn) + 1) for sign in (1, -1))
    for shift in steps:
        moved = place + shift
        covers = (abs(moved - x) < 0.99 * _NEAR and abs(success - y) < _NEAR_SUCCESS for x, y in drawn)
        if 0.02 <= moved <= 0.98 and not any(covers):
            return moved
    return place


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker_of(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _is_number(level: str) -> bool:
    try:
        float(level)
    except ValueError:
        return False
    return True


def _drawable(mse: float) -> float:
    return min(max(mse, _LEAST), _MOST)


def _check_reach(panels: Mapping[str, Mapping[str, Tensor]]) -> None:
    _check_filled(panels, "groups")
    for heading, groups in panels.items():
        for name, points in groups.items():
            if points.ndim != 2 or points.shape[1] != 5 or not len(points):
                raise ValueError(
                    f"Expected the points of {name!r} in {heading!r} of shape (P, 5), but got {tuple(points.shape)}."
                )
            if not bool(((points[:, 0] > 0) & torch.isfinite(points[:, 0])).all()):
                raise ValueError(f"Expected positive equations per unknown, but got {points[:, 0].tolist()}.")
            if not bool(((points[:, 1] >= 0) & (points[:, 1] <= 1)).all()):
                raise ValueError(f"Expected successes of {name!r} from 0 to 1, but got {points[:, 1].tolist()}.")


def _check_noise(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]]) -> None:
    _check_filled(panels, "methods")
    for heading, methods in panels.items():
        _check_filled({f"{name} in {heading}": curve for name, curve in methods.items()}, "levels")
        for name, curve in methods.items():
            for level, values in curve.items():
                if not all(value >= 0 for value in values):
                    raise ValueError(f"Expected an MSE of at least 0, but got {values} for {name!r} at {level!r}.")


def _check_filled(panels: Mapping[str, Mapping[str, object]], what: str) -> None:
    if not panels:
        raise ValueError("Expected `panels` to hold at least one, but got none.")
    for heading, named in panels.items():
        if not named:
            raise ValueError(f"Expected {what} in {heading!r}, but got none.")
