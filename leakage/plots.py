"""Pictures of results, drawn off screen: no window, no global state of matplotlib."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray
from torch import Tensor

from leakage.files.whole import whole_file
from leakage.metrics import SUCCESS_THRESHOLD, wilson_interval

INK = "#222222"
PALE = "#767676"
# Colours that colour-blind readers can distinguish (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Inches.
_CELL, _GAP, _CAPTION, _LINE = 1.15, 0.08, 0.30, 0.30
# An axis is logarithmic from this ratio of the largest to the smallest positive value.
_LOGARITHMIC = 20
_ROW_LABEL_PER_LETTER, _ROW_LABEL_LEAST = 0.085, 0.3


def plot_gallery(
    images: Sequence[Sequence[Tensor | None]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    title: str = "",
) -> Figure:
    """Plot images in a grid, without interpolation (nearest neighbour); values outside [0, 1] are clipped.

    Args:
        images: one sequence per row of ``(C, H, W)`` images in [0, 1], or None for an empty cell.
            One channel is shown in grey, three as RGB, any other number as the grey of their mean.
        columns: a heading per column.
        rows: a label per row.
        captions: a short line under each image, laid out as ``images``.
        title: above everything.

    Raises:
        ValueError: there are no images, or the numbers of rows, headings or captions do not match.

    Example:
        >>> image = torch.rand(1, 28, 28)
        >>> figure = plot_gallery([[image, None]], columns=["truth", "final"], rows=["victim 0"])
        >>> len(figure.axes)
        2
    """
    if not images or not columns:
        raise ValueError(f"Expected `images` and `columns` to hold at least one, but got {len(images)} rows.")
    if len(rows) != len(images):
        raise ValueError(f"Expected `rows` with a label for each row of images, but got {len(rows)}.")
    for name, grid in (("images", images), ("captions", captions)):
        sizes = None if grid is None else [len(row) for row in grid]
        if sizes is not None and sizes != [len(columns)] * len(rows):
            raise ValueError(
                f"Expected `{name}` in {len(rows)} rows of {len(columns)}, one per column, but got {sizes}."
            )
    caption_height = _CAPTION if captions is not None else 0.0
    left = _ROW_LABEL_LEAST + _ROW_LABEL_PER_LETTER * max(len(line) for label in rows for line in label.split("\n"))
    top = _LINE * (1 + max(heading.count("\n") for heading in columns)) + (0.45 if title else 0.1)
    width = left + len(columns) * (_CELL + _GAP) + 0.15
    # A narrow grid must not cut off a long title.
    width = max(width, 0.11 * len(title) + 0.3)
    height = top + len(images) * (_CELL + _GAP + caption_height) + 0.1
    figure = new_figure(width, height)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            x = left + j * (_CELL + _GAP)
            y = height - top - (i + 1) * _CELL - i * (_GAP + caption_height)
            axes = figure.add_axes((x / width, y / height, _CELL / width, _CELL / height))
            axes.set_axis_off()
            if image is not None:
                pixels = to_pixels(image)
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                if captions is not None and captions[i][j]:
                    axes.text(0.5, -0.05, captions[i][j], transform=axes.transAxes, fontsize=7.5, color=PALE,
                              ha="center", va="top")  # fmt: skip
            if i == 0:
                axes.text(0.5, 1.06, columns[j], transform=axes.transAxes, fontsize=10, color=INK,
                          ha="center", va="bottom")  # fmt: skip
        middle = height - top - i * (_CELL + _GAP + caption_height) - _CELL / 2
        figure.text((left - 0.12) / width, middle / height, rows[i], fontsize=9, color=INK, ha="right", va="center")
    if title:
        figure.text(0.5, 1 - 0.12 / height, title, fontsize=12, color=INK, ha="center", va="top", weight="bold")
    return figure


def plot_fidelity(curves: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """Plot the share of victims whose error is below a threshold against the threshold, as in the iDLG paper.

    The band around each curve is the 95 % Wilson interval of the share. A victim whose error is
    not a number (its attack diverged) is below no threshold. A line marks the threshold that counts as success, 1e-3;
    the legend gives the share there.

    Args:
        curves: name to the mean squared error of each victim, ``(V,)``, at least 0.
        title: above the axes.

    Raises:
        ValueError: there are no curves, or a curve has no victims or the wrong shape.

    References:
        Zhao et al., *iDLG*, 2020, figure 3, https://arxiv.org/abs/2001.02610.

    Example:
        >>> figure = plot_fidelity({"iDLG": torch.tensor([1e-6, 1e-4, 0.1])})
        >>> figure.axes[0].get_legend().get_texts()[0].get_text()
        'iDLG: 66.7 % of 3'
    """
    if not curves:
        raise ValueError("Expected `curves` to hold at least one, but got none.")
    for name, errors in curves.items():
        if errors.ndim != 1 or not len(errors):
            raise ValueError(f"Expected the errors of {name!r} of shape (V,), but got {tuple(errors.shape)}.")
    figure, axes = _curve_axes(title, "threshold of the mean squared error", "victims under the threshold")
    thresholds = _thresholds(curves)
    for index, (name, errors) in enumerate(curves.items()):
        errors = errors.detach().double().cpu()
        shares = (errors[:, None] < torch.from_numpy(thresholds)).double().mean(0)
        intervals = [wilson_interval(float(share), len(errors)) for share in shares]
        colour = COLOURS[index % len(COLOURS)]
        share = float((errors < SUCCESS_THRESHOLD).double().mean())
        axes.fill_between(
            thresholds, [low for low, _ in intervals], [high for _, high in intervals],
            color=colour, alpha=0.18, linewidth=0,
        )  # fmt: skip
        style = "-" if index < len(COLOURS) else "--"
        axes.plot(thresholds, shares.numpy(), style, color=colour, linewidth=2,
                  label=f"{name}: {100 * share:.1f} % of {len(errors)}")  # fmt: skip
    axes.axvline(SUCCESS_THRESHOLD, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
    axes.set_xscale("log")
    axes.set_xlim(thresholds[0], thresholds[-1])
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9,
                title=f"share under {as_power(SUCCESS_THRESHOLD)} (dashed)", title_fontsize=9)  # fmt: skip
    return figure


def plot_accuracy(
    curves: Mapping[str, Tensor],
    *,
    lines: Mapping[str, float] | None = None,
    xlabel: str = "iterations",
    title: str = "",
) -> Figure:
    """Plot test accuracy over the course of condensations, each with the band of its confidence interval.

    The x axis is linear up to the first positive value and logarithmic from there if the values
    are so far apart that most would overlap on a linear axis.

    Args:
        curves: name to ``(P, 4)``, a row for each evaluation: position on the x axis (at least 0), mean
            accuracy, and the ends of its 95 % interval, from 0 to 1. Where the ends are NaN there is no band.
        lines: name to an accuracy from 0 to 1, drawn as a horizontal line.
        xlabel: label of the x axis.
        title: above the axes.

    Raises:
        ValueError: there are no curves, a curve has no rows or the wrong shape, or an accuracy is outside [0, 1].

    Example:
        >>> curve = torch.tensor([[0, 0.10, 0.08, 0.12], [10, 0.62, 0.61, 0.63], [100, 0.695, 0.69, 0.70]])
        >>> figure = plot_accuracy({"DC": curve}, lines={"paper": 0.705})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['DC: 69.5 % at 100', 'paper: 70.5 %']
    """
    if not curves:
        raise ValueError("Expected `curves` to hold at least one, but got none.")
    for name, curve in curves.items():
        if curve.ndim != 2 or curve.shape[1] != 4 or not len(curve):
            raise ValueError(f"Expected the curve of {name!r} of shape (P, 4), but got {tuple(curve.shape)}.")
        if not bool(((curve[:, 1] >= 0) & (curve[:, 1] <= 1)).all()):
            raise ValueError(f"Expected accuracies of {name!r} from 0 to 1, but got {curve[:, 1].tolist()}.")
    for name, accuracy in (lines or {}).items():
        if not 0 <= accuracy <= 1:
            raise ValueError(f"Expected `lines` from 0 to 1, but got {accuracy} for {name!r}.")
    figure, axes = _curve_axes(title, xlabel, "accuracy")
    for index, (name, curve) in enumerate(curves.items()):
        x, mean, low, high = curve.detach().double().cpu().numpy().T
        colour = COLOURS[index % len(COLOURS)]
        axes.fill_between(x, low.clip(0, 1), high.clip(0, 1), color=colour, alpha=0.18, linewidth=0)
        style = "o-" if index < len(COLOURS) else "o--"
        axes.plot(x, mean, style, color=colour, linewidth=2, markersize=4, clip_on=False,
                  label=f"{name}: {100 * mean[-1]:.1f} % at {round(x[-1], 1):g}")  # fmt: skip
    for index, (name, accuracy) in enumerate((lines or {}).items(), len(curves)):
        axes.axhline(accuracy, color=COLOURS[index % len(COLOURS)], linewidth=1.5, linestyle=(0, (4, 3)),
                     label=f"{name}: {100 * accuracy:.1f} %", zorder=1.5)  # fmt: skip
    places = torch.cat([curve[:, 0].double().cpu() for curve in curves.values()])
    first, last = float(places[places > 0].min()) if bool((places > 0).any()) else 1.0, float(places.max())
    if last > _LOGARITHMIC * first:
        axes.set_xscale("symlog", linthresh=first, linscale=0.4)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, max(last, first) * 1.02)
    # A tiny difference must not look large.
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, (bottom + top) / 2 - 0.02), max(top, (bottom + top) / 2 + 0.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture atomically; the ending of the path, such as ``.png``, decides the format.

    Raises:
        ValueError: matplotlib does not support this ending.
        OSError: the file can't be written.
    """
    path = Path(path)
    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise ValueError(f"Expected `path` to end with one of {sorted(kinds)}, but got '{path}'.")
    with whole_file(path) as partial:
        figure.savefig(partial, format=kind, dpi=150)


def figure_pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render the figure as an array ``(height, width, 3)`` of values from 0 to 255."""
    file = io.BytesIO()
    figure.savefig(file, format="rgba", dpi=100)
    width, height = figure.canvas.get_width_height()
    return np.frombuffer(file.getvalue(), np.uint8).reshape(height, width, 4)[..., :3].copy()


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """Convert an image ``(C, H, W)`` in [0, 1] to values from 0 to 255: ``(H, W)`` in grey, ``(H, W, 3)`` in colour.

    Values outside [0, 1] are clipped, and NaN becomes black. For numbers of channels other than one
    and three, the mean of the channels is taken.

    Raises:
        ValueError: the image does not have three dimensions.

    Example:
        >>> to_pixels(torch.ones(3, 2, 2)).shape, to_pixels(torch.ones(1, 2, 2)).max()
        ((2, 2, 3), np.uint8(255))
    """
    if image.ndim != 3:
        raise ValueError(f"Expected an image of shape (C, H, W), but got {tuple(image.shape)}.")
    image = image.detach().cpu().float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    image = image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)
    pixels: NDArray[np.uint8] = (image * 255).round().to(torch.uint8).numpy()
    return pixels


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of the given size in inches, drawn off screen."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _curve_axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Create an empty figure for curves; returns the figure and its axes."""
    figure = new_figure(6.4, 4.2)
    axes = figure.add_axes((0.13, 0.14, 0.83, 0.74 if title else 0.82))
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if title:
        figure.text(0.5, 0.96, title, fontsize=12, color=INK, ha="center", va="top", weight="bold")
    return figure, axes


def as_power(threshold: float) -> str:
    """Format a threshold as a power of ten, such as 1e-3 or 2.5e-4."""
    mantissa, exponent = f"{threshold:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _thresholds(curves: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Return thresholds from the smallest error, or from two decades below the success threshold, up to 1."""
    best = min((float(errors[errors > 0].min()) for errors in curves.values() if bool((errors > 0).any())), default=1.0)
    lowest = min(math.log10(SUCCESS_THRESHOLD) - 2, max(math.log10(best) - 1, -12)) if math.isfinite(best) else -6.0
    return np.logspace(math.floor(lowest), 0, 400)
