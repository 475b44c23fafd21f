"""``report.html``: the audit as one page, without network access and scripts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from leakage.audit.writers import curves, findings, words
from leakage.audit.writers.pictures import data_uri

if TYPE_CHECKING:
    from leakage.audit.report import AuditReport, Measured, VictimRow

# The number of victims near the median that a gallery shows besides the worst.
_TYPICAL = 8
# A URL without the punctuation of the sentence around it, or code between backticks.
_MARKED = re.compile(r"(?P<address>https?://[^\s<>\"`]*[^\s<>\"`'.,;:!?)\]}])|`(?P<code>[^`\n]+)`")
_LINK, _CODE = Markup('<a href="{0}" rel="noreferrer">{0}</a>'), Markup("<code>{0}</code>")
# The order in which thresholds are shown.
DECISIONS = ["exceeded", "inconclusive", "within"]
# The number of galleries that are open at first.
_OPEN = 4


@dataclass(frozen=True)
class Picture:
    """An entry of a gallery: the row of a victim's image, and its pictures as data URIs."""

    row: VictimRow
    truth: str
    reconstruction: str
    guess: str


@dataclass(frozen=True)
class Gallery:
    """The pictures of one attack on one client."""

    row: Measured
    worst: list[Picture]
    typical: list[Picture]


def render_page(report: AuditReport, victims: Sequence[VictimRow], folder: Path) -> str:
    """Render the page.

    Args:
        report: the report to show.
        victims: the lines of ``victims.jsonl``. Without them there are no curves and no typical victims.
        folder: the folder that the paths of the pictures are relative to.

    Raises:
        ValueError: the path of a picture leads out of the folder.
    """
    measured = findings.most_leaked_first(report.measured)
    pairs = {(row.client, row.attack) for row in measured}
    victims = [row for row in victims if (row.client, row.attack) in pairs]
    galleries = [_gallery(row, victims, folder) for row in measured]
    clients = list(dict.fromkeys(row.client for row in victims))
    charts = {client: curves.curves(row for row in victims if row.client == client) for client in clients}
    return _template().render(
        report=report,
        measured=measured,
        galleries=[one for one in galleries if one.worst or one.typical],
        charts=charts,
        threshold_psnr=-10 * math.log10(report.success_threshold),
        open_galleries=_OPEN,
        thresholds=sorted(report.thresholds, key=lambda one: DECISIONS.index(one.decision)),
        defended=findings.defended(report),
        sides=findings.side_by_side(report),
    )


def _gallery(row: Measured, victims: Sequence[VictimRow], folder: Path) -> Gallery:
    own = [one for one in victims if (one.client, one.attack) == (row.client, row.attack)]
    shown = {(one.victim, one.image) for one in row.worst}
    others = [one for one in own if one.reconstruction and (one.victim, one.image) not in shown]
    known = [one.psnr for one in own if not math.isnan(one.psnr)]
    middle = median(known) if known else 0.0
    others.sort(key=lambda one: (math.isnan(one.psnr), _distance(one.psnr, middle), one.victim, one.image))
    typical = sorted(others[:_TYPICAL], key=lambda one: (one.victim, one.image))
    worst = [one for one in row.worst if one.reconstruction]
    return Gallery(row, *([_picture(one, folder) for one in rows] for rows in (worst, typical)))


def _distance(psnr: float, middle: float) -> float:
    return 0.0 if psnr == middle else abs(psnr - middle)  # both may be infinite


def _picture(row: VictimRow, folder: Path) -> Picture:
    return Picture(row, *(data_uri(folder, path) for path in (row.truth, row.reconstruction, row.guess)))


def _value(value: Any) -> str:
    """Format a declared value in words."""
    if value is None:
        return "not given"
    if value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        options = _value({name: one for name, one in value.items() if name != "name"})
        return value["name"] if options == "none" else f"{value['name']} ({options})"
    if isinstance(value, dict):
        return ", ".join(f"{_name(name)} {_value(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> float:
    """Return the position of a share on a bar, from 0 to 100."""
    return round(100 * min(max(share, 0.0), 1.0), 1)


def _breakable(name: str) -> Markup:
    """Allow line breaks after the dots of a name."""
    return Markup("<wbr>").join(escape(f"{part}.") for part in words.plain(name).split("."))[:-1]


def _prose(text: str) -> Markup:
    """Show URLs in a text as links, and text between backticks as code."""
    pieces, end, text = [], 0, words.plain(text)
    for found in _MARKED.finditer(text):
        pieces.append(escape(text[end : found.start()]))
        pieces.append((_CODE if found["code"] else _LINK).format(found["code"] or found["address"]))
        end = found.end()
    return Markup("").join([*pieces, escape(text[end:])])


def _name(name: str) -> str:
    return str(name).replace("_", " ")


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: words.plain(value) if type(value) is str else value,
    )
    environment.filters |= {
        "value": _value,
        "name": _name,
        "prose": _prose,
        "breakable": _breakable,
        "percent": _percent,
        "label": words.label,
        "duration": words.duration,
        "moment": words.moment,
    }
    environment.globals |= {"words": words, "curves": curves, "findings": findings}
    return environment.get_template("page.html")
