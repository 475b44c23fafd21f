from __future__ import annotations

import math

import pytest
import torch
from matplotlib.colors import to_hex
from torch import Tensor

from leakage.labels import RULES

from ..test_plots import texts_overlap
from .conftest import load

_plots = load("labels/restoration_plots.py")
_STYLES = _plots._STYLES
plot_recall = _plots.plot_recall


def curve(*points: tuple[float, float]) -> Tensor:
    return torch.tensor([[where, recall, recall - 0.02, min(1.0, recall + 0.02)] for where, recall in points])


GUESS = torch.tensor([[8, 0.55], [64, 0.87], [24, 0.75]])
PANELS = {
    "untrained": {"ilrg": curve((64, 0.95), (8, 1.0), (24, 0.99)), "rlg": curve((8, 0.7))},
    "20 epochs": {"auto": curve((8, 0.9), (24, 0.8), (64, 0.9)), "ilrg": curve((8, 0.4), (24, 0.3))},
}
TRIVIAL = dict.fromkeys(PANELS, GUESS)


def test_every_rule_has_its_own_style() -> None:
    assert _STYLES.keys() == {*RULES, "auto"}
    assert len({style[0] for style in _STYLES.values()}) == len(_STYLES)
    assert len({style[1:3] for style in _STYLES.values()}) == len(_STYLES)


def test_curves_guess_and_intervals() -> None:
    figure = plot_recall(PANELS, trivial=TRIVIAL, xlabel="batch size", title="mnist")
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["untrained", "20 epochs"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["8", "24", "64"], "ascending, evenly spaced"
    assert (first.get_xlabel(), first.get_ylabel()) == ("batch size", "instance recall (IRec)")
    assert first.get_ylim() == (0, 1)
    lines = {(to_hex(line.get_color()).upper(), line.get_marker()): line for line in first.get_lines()}
    ilrg = lines[_STYLES["ilrg"][1], "s"]
    assert list(ilrg.get_ydata()) == pytest.approx([1.0, 0.99, 0.95])
    assert list(ilrg.get_xdata()) == pytest.approx([0, 1, 2], abs=0.15)
    bars = [line for line in first.get_lines() if line.get_color() == ilrg.get_color() and line is not ilrg]
    assert [list(bar.get_ydata()) for bar in bars] == [
        pytest.approx(ends) for ends in ([0.98, 1.0], [0.97, 1.0], [0.93, 0.97])
    ]
    guess = next(line for line in second.get_lines() if list(line.get_ydata()) == pytest.approx([0.55, 0.75, 0.87]))
    assert guess.get_linestyle() == "--"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["auto", "iLRG", "RLG", "trivial guess"], "best first"
    assert not texts_overlap(figure)


@pytest.mark.parametrize("panels", [1, 4])
def test_title_and_legend_have_their_own_place(panels: int) -> None:
    curves = {f"batch size {index}": dict.fromkeys(_STYLES, curve((8, 0.5))) for index in range(panels)}
    title = "a_data_set_with_a_long_name over 100 classes, ResNet-18, sigmoid, batch norm (train)"
    figure = plot_recall(curves, trivial=dict.fromkeys(curves, GUESS), xlabel="batch size", title=title)
    figure.canvas.draw()
    legend, above = figure.legends[0].get_window_extent(), figure.texts[0].get_window_extent()
    headings = [axes.title.get_window_extent() for axes in figure.axes]
    assert not legend.overlaps(above)
    assert not any(heading.overlaps(above) or heading.overlaps(legend) for heading in headings)
    for box in (legend, above):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


def test_no_bar_without_an_interval() -> None:
    unknown = torch.tensor([[8, 0.9, math.nan, math.nan]])
    figure = plot_recall({"a": {"llg": unknown}}, trivial={"a": GUESS[:1]}, xlabel="batch size")
    assert len(figure.axes[0].get_lines()) == 2


@pytest.mark.parametrize(("panels", "rows"), [(1, [1]), (4, [4]), (6, [3, 3]), (9, [3, 3, 3]), (5, [3, 2])])
def test_panels_in_rows(panels: int, rows: list[int]) -> None:
    curves = {f"batch size {index}": PANELS["untrained"] for index in range(panels)}
    figure = plot_recall(curves, trivial=dict.fromkeys(curves, GUESS), xlabel="epochs", title="A title")
    figure.canvas.draw()
    shown = [axes for axes in figure.axes if axes.axison]
    heights = [round(axes.get_position().y0, 3) for axes in shown]
    assert [heights.count(height) for height in dict.fromkeys(heights)] == rows
    assert not texts_overlap(figure)


@pytest.mark.parametrize(
    ("panels", "trivial", "message"),
    [
        ({}, {}, "Expected `panels` to hold at least one, but got none"),
        ({"a": {"llg": curve((8, 0.5))}}, {"b": GUESS}, r"Expected `trivial` for the panels \['a'\], but got \['b'\]"),
        ({"a": {}}, {"a": GUESS}, "Expected curves in the panel 'a', but got none"),
        ({"a": {"best": curve((8, 0.5))}}, {"a": GUESS}, "Expected `rule` to be one of .* but got 'best'"),
        ({"a": {"llg": GUESS}}, {"a": GUESS}, r"Expected the curve of 'llg' of shape \(P, 4\), but got \(3, 2\)"),
        ({"a": {"llg": curve((8, 0.5))}}, {"a": GUESS[:0]}, r"Expected the curve of the trivial guess of shape \(P"),
        ({"a": {"llg": curve((8, 1.5))}}, {"a": GUESS}, "Expected recalls of 'llg' from 0 to 1, but got"),
    ],
)  # fmt: skip
def test_bad_input(panels: dict[str, dict[str, Tensor]], trivial: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_recall(panels, trivial=trivial, xlabel="batch size")
