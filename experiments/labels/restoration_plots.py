"""Plots of the recall of label inference rules, compared with a guess that uses no gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from leakage.errors import check_choice
from leakage.plots import INK, PALE, new_figure

# Name and style of each rule, the same in all plots. Most readers can distinguish the colours (Okabe and Ito); rules of
# one colour differ by marker and line.
_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_STYLES = {
    "idlg": ("iDLG", _RED, "*", ":"),
    "row_minimum": ("row minimum", _SKY, "v", "--"),
    "llg": ("LLG", _ORANGE, "s", ":"),
    "llg_star": ("LLG*", _ORANGE, "D", "--"),
    "rlg": ("RLG", _SKY, "^", ":"),
    "ilrg": ("iLRG", _BLUE, "s", "--"),
    "geng": ("Geng et al.", _PINK, "X", "--"),
    "mean_feature": ("mean feature", _BLUE, "o", "-"),
    "llg_plus": ("LLG+", _RED, "s", "-"),
    "rlu": ("RLU", _PINK, "D", "-"),
    "posterior": ("posterior", _GREEN, "o", "-"),
    "auto": ("auto", "#000000", "o", "-"),
}
# Panels per row; width and height of a panel, size of a single panel, and size of legend and title, in inches.
_ACROSS, _WIDTH, _HEIGHT, _SINGLE, _LEGEND, _TITLE = 4, 2.9, 3.0, (5.0, 4.0), 1.6, 0.5
# Rules are shifted so that their intervals do not overlap: the shift per rule and the maximum in all, in axis steps.
_APART, _SPREAD = 0.05, 0.3


def plot_recall(
    panels: Mapping[str, Mapping[str, Tensor]],
    *,
    trivial: Mapping[str, Tensor],
    xlabel: str,
    title: str = "",
) -> Figure:
    """Plot the instance recall of each rule over the batch size or another quantity.

    Values on the x axis are evenly spaced, in ascending order. The vertical bars are 95 % intervals. Rules are
    shifted slightly so that all are visible.

    Args:
        panels: maps the heading of each panel to its curves. These map a rule, a key of :data:`leakage.labels.RULES` or
            ``"auto"``, to ``(P, 4)``: the value on the x axis, recall from 0 to 1 and the ends of its interval.
        trivial: maps the heading of each panel to ``(P, 2)``: the value on the x axis, and the recall of a guess
            without a gradient.
        xlabel: label of the x axis.
        title: title of the figure.

    Raises:
        ValueError: there are no panels, a panel has no curves, a rule is unknown, or a tensor has another shape or
            range.

    Example:
        >>> curve = torch.tensor([[8, 1.0, 0.98, 1.0], [64, 0.96, 0.95, 0.97]])
        >>> guess = torch.tensor([[8, 0.55], [64, 0.87]])
        >>> figure = plot_recall({"untrained": {"ilrg": curve}}, trivial={"untrained": guess}, xlabel="batch size")
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['iLRG', 'trivial guess']
    """
    _check(panels, trivial)
    down = math.ceil(len(panels) / _ACROSS)
    across = math.ceil(len(panels) / down)
    width, height = (_WIDTH, _HEIGHT) if len(panels) > 1 else _SINGLE
    # Widen the figure for a long title.
    figure = new_figure(max(width * across + _LEGEND, 0.11 * len(title) + 0.3), height * down + _TITLE)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    means = {
        rule: float(torch.cat([curves[rule][:, 1].double() for curves in panels.values() if rule in curves]).mean())
        for rule in _STYLES
        if any(rule in curves for curves in panels.values())
    }
    handles: dict[str, Line2D] = {}
    for index, (heading, curves) in enumerate(panels.items()):
        axes = grid[index // across, index % across]
        places = sorted({*torch.cat([trivial[heading][:, 0], *(curve[:, 0] for curve in curves.values())]).tolist()})
        guess = sorted(trivial[heading].tolist())
        (line,) = axes.plot(
            [places.index(where) for where, _ in guess], [recall for _, recall in guess],
            color=PALE, linewidth=1.5, linestyle=(0, (4, 3)), zorder=1.5,
            marker="_" if len(guess) == 1 else None, markersize=12,
        )  # fmt: skip
        handles["trivial guess"] = line
        for number, rule in enumerate(means):
            if rule in curves:
                shift = min(_APART, _SPREAD / len(means)) * (number - (len(means) - 1) / 2)
                handles[rule] = _draw(axes, rule, sorted(curves[rule].tolist()), places, shift)
        _finish(axes, places, heading)
        if index % across == 0:
            axes.set_ylabel("instance recall (IRec)", color=INK)
        if index + across >= len(panels):
            axes.set_xlabel(xlabel, color=INK)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    order = [*sorted(means, key=lambda rule: -means[rule]), "trivial guess"]
    figure.legend(
        [handles[name] for name in order], [_STYLES[name][0] if name in _STYLES else name for name in order],
        loc="outside right center", frameon=False, fontsize=9, labelcolor=INK, handlelength=3,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=12, color=INK, weight="bold")
    return figure


def _draw(axes: Axes, rule: str, curve: list[list[float]], places: list[float], shift: float) -> Line2D:
    _, colour, marker, style = _STYLES[rule]
    automatic = rule == "auto"
    x = [places.index(where) + shift for where, _, _, _ in curve]
    for place, (_, _, low, high) in zip(x, curve, strict=True):
        if math.isfinite(low + high):
            axes.plot([place, place], [low, high], color=colour, alpha=0.35, linewidth=0.9, zorder=2, clip_on=False)
    if automatic:  # a halo around the chosen rule
        axes.plot(x, [mean for _, mean, _, _ in curve], color=colour, alpha=0.15, linewidth=6, zorder=1.8)
    (line,) = axes.plot(
        x, [mean for _, mean, _, _ in curve], color=colour, linestyle=style, marker=marker, clip_on=False,
        linewidth=0.6 if automatic else 1.7, markersize=8 if automatic else 5, zorder=2.5 if automatic else 3,
        markerfacecolor="none" if automatic else colour, markeredgecolor=colour if automatic else "white",
        markeredgewidth=1.1 if automatic else 0.5,
    )  # fmt: skip
    return line


def _finish(axes: Axes, places: list[float], heading: str) -> None:
    axes.set_title(heading, fontsize=10, color=INK)
    axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylim(0, 1)
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _check(panels: Mapping[str, Mapping[str, Tensor]], trivial: Mapping[str, Tensor]) -> None:
    if not panels:
        raise ValueError("Expected `panels` to hold at least one, but got none.")
    if panels.keys() != trivial.keys():
        raise ValueError(f"Expected `trivial` for the panels {list(panels)}, but got {list(trivial)}.")
    for heading, curves in panels.items():
        if not curves:
            raise ValueError(f"Expected curves in the panel {heading!r}, but got none.")
        for name in curves:
            check_choice("rule", name, _STYLES)
        for name, curve, columns in (
            ("the trivial guess", trivial[heading], 2),
            *((repr(rule), curve, 4) for rule, curve in curves.items()),
        ):
            if curve.ndim != 2 or curve.shape[1] != columns or not len(curve):
                raise ValueError(f"Expected the curve of {name} of shape (P, {columns}), but got {tuple(curve.shape)}.")
            if not bool(((curve[:, 1] >= 0) & (curve[:, 1] <= 1)).all()):
                raise ValueError(f"Expected recalls of {name} from 0 to 1, but got {curve[:, 1].tolist()}.")
