from __future__ import annotations

import itertools
import math

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from ..test_plots import texts_overlap
from .conftest import load

_plots = load("second_order/reach_plots.py")
plot_noise = _plots.plot_noise
plot_reach = _plots.plot_reach

POINTS = torch.tensor([[17.1, 1.0, 0.9, 1.0, 1], [4.3, 0.5, 0.3, 0.7, 4], [0.5, 0.0, 0.0, 0.1, 32]])
PANELS = {
    "Gauss-Newton": {"LeNet": POINTS, "ConvNet-3": torch.tensor([[400.0, 0.8, math.nan, math.nan, 1]])},
    "L-BFGS": {"ConvNet-3": torch.tensor([[400.0, 0.2, 0.1, 0.3, 1]])},
}
CURVE = {"0": (1e-12, 1e-13, 1e-11), "1e-4": (1e-6, 1e-7, 1e-5), "float16": (1e-5, 1e-6, 1e-4)}


def markers(figure: Figure, panel: int) -> list[tuple[float, float, str]]:
    lines = [line for line in figure.axes[panel].get_lines() if len(line.get_xdata()) == 1]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0]), to_hex(line.get_color())) for line in lines]


def test_markers_bars_and_numbers() -> None:
    figure = plot_reach(PANELS, title="mnist")
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["Gauss-Newton", "L-BFGS"]
    assert first.get_xscale() == "log"
    assert first.get_xlim() == second.get_xlim()
    drawn = markers(figure, 0)
    assert [place[:2] for place in drawn] == [
        pytest.approx(point) for point in ((17.1, 1.0), (4.3, 0.5), (0.5, 0.0), (400.0, 0.8))
    ]
    assert drawn[0][2] == drawn[1][2] != drawn[3][2] == markers(figure, 1)[0][2], "a colour for each group"
    assert [text.get_text() for text in first.texts] == ["1", "4", "32", "1"]
    bars = [line.get_ydata() for line in first.get_lines() if len(line.get_xdata()) == 2]
    bars = [list(bar) for bar in bars if list(bar) != [0, 1]]
    assert bars == [pytest.approx(ends) for ends in ([0.9, 1.0], [0.3, 0.7], [0.0, 0.1])], "none where there is none"
    boundary = [line for line in first.get_lines() if list(line.get_xdata()) == [1, 1]]
    assert len(boundary) == 1, "as many equations as unknowns"
    assert not texts_overlap(figure)


def test_markers_of_one_place_stand_side_by_side() -> None:
    point = torch.tensor([[10.0, 1.0, 0.9, 1.0, 1]])
    figure = plot_reach({"": {str(index): point for index in range(5)}})
    places = sorted(math.log10(place) for place, _, _ in markers(figure, 0))
    low, high = (math.log10(end) for end in figure.axes[0].get_xlim())
    gaps = [(right - left) / (high - low) for left, right in itertools.pairwise(places)]
    assert min(gaps) > 0.03
    assert sum(abs(place - 1) < 1e-6 for place in places) == 1


def test_noise_has_its_levels_in_order_and_both_scales() -> None:
    figure = plot_noise({"LeNet": {"Gauss-Newton": CURVE, "L-BFGS": {"1e-4": (0.0, 0.0, math.inf)}}})
    axes, right = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1e-4", "float16"]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
    assert drawn[0] == ([0, 1], pytest.approx([1e-12, 1e-6]))
    assert drawn[1] == (pytest.approx([2], abs=0.1), pytest.approx([1e-5])), "apart, as it is no number"
    assert drawn[2] == ([1], [1e-15]), "0 has no logarithm"
    assert right.get_ylim() == pytest.approx([-10 * math.log10(mse) for mse in axes.get_ylim()])
    assert right.get_ylabel() == "PSNR in dB"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Gauss-Newton", "L-BFGS"]
    assert not texts_overlap(figure)


def test_many_panels_share_their_scale() -> None:
    worse = dict.fromkeys(CURVE, (0.5, 0.4, 0.6))
    figure = plot_noise({f"{images} images": {"Gauss-Newton": worse if images else CURVE} for images in range(3)})
    assert len({axes.get_ylim() for axes in figure.axes[:3]}) == 1


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "Expected `panels` to hold at least one, but got none"),
        ({"a": {}}, "Expected groups in 'a', but got none"),
        ({"a": {"b": POINTS[:, :4]}}, r"Expected the points of 'b' in 'a' of shape \(P, 5\), but got \(3, 4\)"),
        ({"a": {"b": POINTS[:0]}}, r"but got \(0, 5\)"),
        ({"a": {"b": POINTS * torch.tensor([0.0, 1, 1, 1, 1])}}, "Expected positive equations per unknown, but got"),
        ({"a": {"b": POINTS * torch.tensor([1, 2.0, 1, 1, 1])}}, "Expected successes of 'b' from 0 to 1, but got"),
    ],
)
def test_refuses_points(panels: dict[str, dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_reach(panels)


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "Expected `panels` to hold at least one, but got none"),
        ({"a": {}}, "Expected methods in 'a', but got none"),
        ({"a": {"b": {}}}, "Expected levels in 'b in a', but got none"),
        ({"a": {"b": {"0": (math.nan, 0, 0)}}}, "Expected an MSE of at least 0, but got .nan, 0, 0. for 'b' at '0'"),
    ],
)
def test_refuses_levels(panels: dict[str, dict[str, dict[str, tuple[float, float, float]]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_noise(panels)
