"""Curves of success over threshold: the share of images whose PSNR reaches x dB, one chart per client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from leakage.metrics.estimates import wilson_interval

if TYPE_CHECKING:
    from leakage.audit.report import VictimRow

#: The ends of the axis, dB.
LOW, HIGH = 0, 60
#: Thresholds of the table under the chart, dB.
TABLE = (10, 15, 20, 25, 30, 40, 50, 60)
# The position and size of the plot in its view box.
LEFT, TOP, WIDTH, HEIGHT = 46, 24, 410, 206
_STEPS = np.linspace(LOW, HIGH, 121)


@dataclass(frozen=True)
class Curve:
    """A line of the chart: ``line`` and ``band`` are SVG points, ``table`` the shares at :data:`TABLE`."""

    name: str
    line: str
    band: str
    table: list[float]


def curves(rows: Iterable[VictimRow]) -> list[Curve]:
    """Return a line for each attack on one client, in the order of the rows, and last one for the best guesses.

    A score that is NaN reaches no threshold. The band is Wilson's 95 % interval over victims.
    """
    attacks: dict[str, list[VictimRow]] = {}
    for row in rows:
        attacks.setdefault(row.attack, []).append(row)
    lines = [_curve(name, [row.psnr for row in found], _victims(found)) for name, found in attacks.items()]
    if not attacks:
        return []
    # Every attack meets the same victims, unless the budget ended first.
    most = max(attacks.values(), key=len)
    return [*lines, _curve("", [row.baseline for row in most], _victims(most))]


def x_of(psnr: float) -> float:
    """Return the x-coordinate of a PSNR, clamped to the ends of the axis."""
    return LEFT + WIDTH * (min(max(psnr, LOW), HIGH) - LOW) / (HIGH - LOW)


def y_of(share: float) -> float:
    """Return the y-coordinate of a share."""
    return TOP + HEIGHT * (1 - share)


def _victims(rows: Sequence[VictimRow]) -> int:
    return len({row.victim for row in rows})


def _curve(name: str, scores: Sequence[float], victims: int) -> Curve:
    shares = _shares(scores, _STEPS)
    ends = [wilson_interval(float(share), victims) for share in shares]
    lows, highs = ([*zip(_STEPS, side, strict=True)] for side in zip(*ends, strict=True))
    line = _points([*zip(_STEPS, shares, strict=True)])
    return Curve(name, line, _points([*lows, *reversed(highs)]), _shares(scores, np.array(TABLE, float)).tolist())


def _shares(scores: Sequence[float], thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((np.asarray(scores)[:, None] >= thresholds).mean(0), dtype=np.float64)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x_of(psnr):.1f},{y_of(share):.1f}" for psnr, share in places)
