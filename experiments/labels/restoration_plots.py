"""Pictures of what rules for labels find, next to a guess that looks at no gradient."""

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

# How rules are written and drawn, the same in all pictures. Colours (Okabe and Ito) are told apart by most readers,
# rules of one colour by marker and line.
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
# Panels side by side; inches of one, of a single one, and of legend and title.
_ACROSS, _WIDTH, _HEIGHT, _SINGLE, _LEGEND, _TITLE = 4, 2.9, 3.0, (5.0, 4.0), 1.6, 0.5
# Rules stand beside one another, so that intervals don't cover each other: how far, and all of them at most, in steps.
_APART, _SPREAD = 0.05, 0.3


def plot_recall(
    panels: Mapping[str, Mapping[str, Tensor]],
    *,
    trivial: Mapping[str, Tensor],
    xlabel: str,
    title: str = "",
) -> Figure:
    """Instance recall of each rule over the batch size, or over whatever else the rows tell.

    Values on the axis below are evenly spaced, in ascending order. The upright bars are 95 % intervals; rules stand
    a little beside one another so that all can be seen.

    Args:
        panels: the heading of each panel to its curves: rule, a key of :data:`leakage.labels.RULES` or
            ``"auto"``, to ``(P, 4)``: where on the axis below, recall from 0 to 1 and the ends of its interval.
        trivial: for each panel ``(P, 2)``: where, and the recall of a guess without a gradient.
        xlabel: what is on the axis below.
        title: above all.

    Raises:
        ValueError: no panels, one without curves, an unknown rule, or numbers of another shape or range.

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
    # A long title must not be cut.
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
    if automatic:  # a halo around the rule that it has chosen
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
