"""``index.html`` of ``leakage demo``: pictures and figures on one page, and what to do next."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from leakage import __version__
from leakage.comparison import WRITTEN, Row, SideBySide, first_victims, plot_errors
from leakage.datamodules.base import VictimDataModule
from leakage.files.text import write_text
from leakage.plots import INK, PALE, as_power

PAGE = "index.html"
# A placeholder for the page's background colour in the picture.
_GROUND = "#fdfcfb"


def write_page(folder: Path, rows: Sequence[Row], victims: VictimDataModule, files: Sequence[str]) -> None:
    """Write the page, which is a single file and needs no network.

    Args:
        folder: the folder of the demo, with its files.
        rows: the figures of each attack.
        victims: the attacked victims.
        files: other files in ``folder`` to link to.

    Raises:
        OSError: the page can't be written.
    """
    # Imported here, since `leakage demo --help` does not need it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"picture": _picture, "written": _written}
    shown: list[SideBySide] = first_victims(folder, [row.method for row in rows], victims)
    page = environment.get_template("demo_page.html").render(
        version=__version__,
        rows=rows,
        shown=shown,
        victims=victims.victims,
        threshold=as_power(rows[0].success_threshold),
        curve=_as_svg(plot_errors(folder, rows)),
        files=files,
    )
    write_text(folder / PAGE, page)


def _written(name: str) -> str:
    return WRITTEN.get(name, name)


def _picture(image: Tensor) -> str:
    """Return a data URI of an image (C, H, W); values outside [0, 1] are clipped, and one channel is grey."""
    pixels = (image.detach().cpu().clamp(0, 1).nan_to_num() * 255).round().byte()
    file = io.BytesIO()
    Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _as_svg(figure: Figure) -> str:
    """Return the figure as SVG in the colours of the page around it, light or dark."""
    for axes in figure.axes:
        axes.patch.set_visible(False)
        axes.tick_params(colors=INK, which="both")
        axes.grid(color=PALE, alpha=0.3)
        axes.spines[:].set_color(PALE)
        if legend := axes.get_legend():
            legend.get_frame().set(facecolor=_GROUND, alpha=1)
            for text in (legend.get_title(), *legend.get_texts()):
                text.set_color(INK)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.02, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace(_GROUND, "var(--paper)")
