from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from leakage.metrics import wilson_interval
from leakage.plots import figure_pixels, plot_accuracy, plot_fidelity, plot_gallery, save_figure, to_pixels


def texts_overlap(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes overlap or leave the figure."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += axes.texts
        if axes.axison:
            low, high = axes.get_ylim()
            ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
            labels = [label for label in axes.get_yticklabels() if label.get_position()[1] in ticks]
            texts += [axes.xaxis.label, axes.yaxis.label, *labels]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    texts = [text for text in texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    outside = [
        (name, "border")
        for name, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1
    ]
    pairs = [(one, other) for i, (one, a) in enumerate(boxes) for other, b in boxes[:i] if a.overlaps(b)]
    return outside + pairs


def test_gallery_shows_every_pixel_and_leaves_empty_places_empty() -> None:
    image = torch.rand(1, 8, 8)
    figure = plot_gallery([[image, None], [image, image]], columns=["truth", "final"], rows=["0", "1"])
    shown = [axes.get_images() for axes in figure.axes]
    assert [len(images) for images in shown] == [1, 0, 1, 1]
    assert np.array_equal(shown[0][0].get_array(), to_pixels(image))
    assert shown[0][0].get_interpolation() == "nearest"
    assert shown[0][0].get_cmap().name == "gray"
    assert shown[0][0].get_clim() == (0, 255)


def test_gallery_texts_do_not_overlap() -> None:
    images = [[torch.rand(3, 32, 32)] * 9] * 3
    captions = [["label 10", *["at 1000"] * 7, "103.1 dB, label 10"]] * 3
    columns = ["truth", "start", "10", "20", "50", "100", "200", "500", "final"]
    figure = plot_gallery(
        images,
        columns=columns,
        rows=[f"victim {1000 * row}\n10000 iterations" for row in range(3)],
        captions=captions,
        title="A title",
    )
    assert not texts_overlap(figure)


def test_a_title_longer_than_the_grid_is_whole() -> None:
    figure = plot_gallery([[torch.rand(1, 8, 8)]], columns=["truth"], rows=["0"], title="A title of many words " * 2)
    assert not texts_overlap(figure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": [], "columns": ["a"], "rows": []}, "Expected `images` and `columns` to hold at least one"),
        ({"images": [[None]], "columns": ["a"], "rows": []}, "Expected `rows` with a label for each row"),
        ({"images": [[None]], "columns": ["a", "b"], "rows": ["0"]}, r"Expected `images` in 1 rows of 2.* got \[1\]"),
        (
            {"images": [[None]], "columns": ["a"], "rows": ["0"], "captions": [["", ""]]},
            r"Expected `captions` in 1 rows of 1.* got \[2\]",
        ),
        ({"images": [[torch.rand(8, 8)]], "columns": ["a"], "rows": ["0"]}, r"shape \(C, H, W\), but got \(8, 8\)"),
    ],
)
def test_gallery_refuses(arguments: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_gallery(**arguments)


def test_fidelity_is_the_share_under_the_threshold_with_wilsons_interval() -> None:
    errors = torch.tensor([1e-6, 1e-4, 1e-4, 0.1, torch.nan])
    axes = plot_fidelity({"iDLG": errors}).axes[0]
    curve = axes.get_lines()[0]
    thresholds, shares = curve.get_data()
    for threshold, expected in ((1e-5, 0.2), (1e-3, 0.6), (0.5, 0.8)):
        nearest = int(np.abs(np.log(thresholds / threshold)).argmin())
        assert shares[nearest] == pytest.approx(expected)
    assert shares[-1] == pytest.approx(0.8), "an error that is not a number lies under no threshold"
    band = axes.collections[0].get_paths()[0].vertices
    low, high = wilson_interval(0.8, 5)
    at_the_end = band[band[:, 0] == thresholds[-1], 1]
    assert at_the_end.min() == pytest.approx(low)
    assert at_the_end.max() == pytest.approx(high)


def test_fidelity_marks_the_threshold_and_tells_the_share_there() -> None:
    figure = plot_fidelity({"DLG": torch.tensor([1e-5, 1.0]), "iDLG": torch.tensor([1e-5, 1e-5])})
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert any(set(line.get_xdata()) == {1e-3} for line in axes.get_lines())
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["DLG: 50.0 % of 2", "iDLG: 100.0 % of 2"]
    assert legend.get_title().get_text() == "share under 1e-3 (dashed)"


@pytest.mark.parametrize("errors", [torch.zeros(3), torch.full((3,), torch.nan), torch.full((3,), torch.inf)])
def test_fidelity_of_victims_without_a_scale(errors: torch.Tensor) -> None:
    figure = plot_fidelity({"DLG": errors}, title="A title")
    left, right = figure.axes[0].get_xlim()
    assert left < 1e-3 < right
    assert not texts_overlap(figure)


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "Expected `curves` to hold at least one, but got none"),
        ({"DLG": torch.zeros(0)}, r"errors of 'DLG' of shape \(V,\), but got \(0,\)"),
        ({"DLG": torch.zeros(2, 1)}, r"errors of 'DLG' of shape \(V,\), but got \(2, 1\)"),
    ],
)
def test_fidelity_refuses(curves: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_fidelity(curves)


def test_pixels_clip_what_lies_outside_and_blacken_what_is_no_number() -> None:
    image = torch.tensor([[[-1.0, 0.5, 2.0, torch.nan]]])
    assert to_pixels(image).tolist() == [[0, 128, 255, 0]]
    assert to_pixels(torch.rand(5, 4, 4)).shape == (4, 4), "of five channels the mean"


def test_saved_picture_is_the_figure(tmp_path: Path) -> None:
    figure = plot_fidelity({"DLG": torch.zeros(3)})
    path = tmp_path / "new" / "fidelity.png"
    save_figure(figure, path)
    with Image.open(path) as picture:
        assert picture.size == (960, 630)
    assert [file.name for file in path.parent.iterdir()] == ["fidelity.png"]
    assert figure_pixels(figure).shape == (420, 640, 3)


def test_saving_tells_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plot_fidelity({"DLG": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"Expected `path` to end with one of .*'png'.*, but got '.*fidelity.bmpp'"):
        save_figure(figure, tmp_path / "fidelity.bmpp")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Expected to write '.*fidelity.png', but got"):
        save_figure(figure, tmp_path / "file" / "fidelity.png")

    def full(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    save_figure(figure, tmp_path / "fidelity.png")
    whole = (tmp_path / "fidelity.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_figure(figure, tmp_path / "fidelity.png")
    assert (tmp_path / "fidelity.png").read_bytes() == whole, "the earlier picture is kept"
    assert not list(tmp_path.glob("*.partial"))


def test_no_window_and_no_global_state() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_fidelity({"DLG": torch.zeros(3)})
    plot_gallery([[None]], columns=["a"], rows=["0"])
    assert plt.get_fignums() == before


def curve(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


CURVE = curve((0, 0.10, 0.08, 0.12), (10, 0.62, 0.61, 0.63), (100, 0.695, 0.69, 0.70))


def test_accuracy_shows_every_point_its_band_and_the_lines() -> None:
    figure = plot_accuracy({"dc": CURVE, "fast": CURVE[1:]}, lines={"paper": 0.705}, title="A title")
    axes = figure.axes[0]
    assert figure.texts[0].get_text() == "A title"
    first, second, line = axes.get_lines()
    assert first.get_xydata().tolist() == CURVE[:, :2].tolist()
    assert second.get_xydata().tolist() == CURVE[1:, :2].tolist()
    assert set(line.get_ydata()) == {0.705}
    assert len({drawn.get_color() for drawn in (first, second, line)}) == 3
    corners = axes.collections[0].get_paths()[0].vertices.tolist()
    for place, _, low, high in CURVE.tolist():
        assert [place, low] in corners
        assert [place, high] in corners
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["dc: 69.5 % at 100", "fast: 69.5 % at 100", "paper: 70.5 %"]


def test_accuracy_is_logarithmic_only_where_points_are_far_apart() -> None:
    near, far = CURVE, curve((0, 0.1, 0, 0.2), *((x, 0.5, 0.4, 0.6) for x in (10, 100, 1000)))
    assert plot_accuracy({"dc": near}).axes[0].get_xscale() == "linear"
    axes = plot_accuracy({"dc": near, "dsa": far}).axes[0]
    assert axes.get_xscale() == "symlog"
    places = axes.transData.transform([(x, 0.5) for x in (0, 10, 100, 1000)])[:, 0]
    assert (np.diff(places) > 50).all(), "0 has a place, and each decade"


@pytest.mark.parametrize("points", [CURVE, CURVE * torch.tensor([10.0, 1, 1, 1]), CURVE[:1]])
def test_accuracy_texts_do_not_overlap(points: torch.Tensor) -> None:
    figure = plot_accuracy({"dc": points}, lines={"random real images": 0.5, "paper": 0.705}, title="A title")
    assert texts_overlap(figure) == []


def test_accuracy_of_one_network_has_no_band_and_hardly_any_difference_is_not_magnified() -> None:
    nan = float("nan")
    axes = plot_accuracy({"dc": curve((3, 0.5, nan, nan), (4, 0.5001, nan, nan))}).axes[0]
    low, high = axes.get_ylim()
    assert low < 0.5 < high
    assert high - low >= 0.039
    figure_pixels(plot_accuracy({"dc": curve((0, 0.1, nan, nan))}))


@pytest.mark.parametrize(
    ("curves", "lines", "message"),
    [
        ({}, None, "Expected `curves` to hold at least one"),
        ({"dc": torch.rand(3, 3)}, None, r"Expected the curve of 'dc' of shape \(P, 4\), but got \(3, 3\)"),
        ({"dc": torch.rand(0, 4)}, None, r"Expected the curve of 'dc' of shape \(P, 4\), but got \(0, 4\)"),
        ({"dc": 100 * CURVE}, None, "Expected accuracies of 'dc' from 0 to 1, but got .*69"),
        ({"dc": CURVE}, {"paper": 70.5}, "Expected `lines` from 0 to 1, but got 70.5 for 'paper'"),
    ],
)
def test_accuracy_refuses(curves, lines, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_accuracy(curves, lines=lines)
