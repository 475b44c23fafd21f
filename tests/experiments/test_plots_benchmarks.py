from __future__ import annotations

import math

import pytest
from matplotlib.colors import to_hex

from ..test_plots import texts_overlap
from .conftest import load

_plots = load("benchmarks/benchmark_plots.py")
plot_over_lanes = _plots.plot_over_lanes
plot_parts = _plots.plot_parts

CURVES = {
    "ms": {"lenet": {16: 0.5, 1: 4.0}, "resnet18": {1: 400.0}},
    "MiB": {"resnet18": {1: 300.0, 4: 1200.0}, "lenet": {1: 1.0}},
}


def test_curves_over_lanes() -> None:
    figure = plot_over_lanes(CURVES, title="a machine")
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["ms", "MiB"]
    assert {first.get_xscale(), first.get_yscale()} == {"log"}
    drawn = [list(zip(*line.get_data(), strict=True)) for line in first.get_lines()]
    assert drawn == [[(1, 4.0), (16, 0.5)], [(1, 400.0)]], "in the order of the lanes"
    colours = [[to_hex(line.get_color()) for line in axes.get_lines()] for axes in figure.axes]
    assert colours[0] == colours[1][::-1], "of the name, whatever the order"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lenet", "resnet18"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "4", "16"]
    for axes, values in ((first, (0.5, 400)), (second, (1, 1200))):
        low, high = axes.get_ylim()
        assert low <= values[0] < values[1] <= high
    assert not texts_overlap(figure)


def test_many_curves_are_told_apart_and_close_values_have_a_tick() -> None:
    curves = {f"cell/{index}": {2**power: 1.5 + 0.1 * index for power in range(11)} for index in range(11)}
    figure = plot_over_lanes({"ms": curves})
    axes = figure.axes[0]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
    assert len(looks) == 11
    low, high = axes.get_ylim()
    assert any(low <= tick <= high for tick in axes.get_yticks())
    assert len(axes.get_xticks()) <= 8
    assert not texts_overlap(figure)


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "Expected `panels` to hold at least one, but got none"),
        ({"ms": {}}, "Expected curves with values in 'ms', but got none"),
        ({"ms": {"a": {}}}, "Expected curves with values in 'ms', but got none"),
        ({"ms": {"a": {1: 0.0}}}, "Expected positive numbers for 'a' in 'ms', but got 0.0 at 1"),
        ({"ms": {"a": {0: 1.0}}}, "Expected positive numbers for 'a' in 'ms', but got 1.0 at 0"),
        ({"ms": {"a": {1: math.inf}}}, "Expected positive numbers for 'a' in 'ms', but got inf at 1"),
    ],
)
def test_refuses_curves(panels: dict[str, dict[str, dict[int, float]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_over_lanes(panels)


def test_parts_follow_one_another() -> None:
    bars = {"idlg": {"objective": 120.0, "L-BFGS": 30.5, "rest": 1.0}, "limit": {"objective": 6.0}}
    figure = plot_parts(bars, xlabel="seconds", title="where it goes")
    axes = figure.axes[0]
    boxes = [(box.get_x(), box.get_width(), round(box.get_y() + box.get_height() / 2, 6)) for box in axes.patches]
    assert boxes == [(0, 120, 0), (120, 30.5, 0), (150.5, 1, 0), (0, 6, 1)]
    assert to_hex(axes.patches[0].get_facecolor()) == to_hex(axes.patches[3].get_facecolor()), "one colour, one part"
    assert len({to_hex(box.get_facecolor()) for box in axes.patches}) == 3
    assert [text.get_text() for text in axes.texts] == ["120", "30.5"], "no room in the others"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["idlg", "limit"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first above"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["objective", "L-BFGS", "rest"]
    assert not texts_overlap(figure)


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        ({}, "Expected `bars` to hold at least one with parts, but got none"),
        ({"a": {}}, "Expected `bars` to hold at least one with parts, but got none"),
        ({"a": {"b": -1.0}}, "Expected values of at least 0, but got -1.0 for 'b' of 'a'"),
        ({"a": {"b": math.nan}}, "Expected values of at least 0, but got nan for 'b' of 'a'"),
        ({"a": {"b": 0.0}}, "Expected values above 0, but got none"),
    ],
)
def test_refuses_parts(bars: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_parts(bars, xlabel="seconds")
