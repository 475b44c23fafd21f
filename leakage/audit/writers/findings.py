"""What a row of measurements comes to: which leaked most, and whether an attack did better than a guess."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from leakage.metrics.baselines import below_baseline

if TYPE_CHECKING:
    from leakage.audit.report import Figure, Measured


def most_leaked_first(rows: Iterable[Measured]) -> list[Measured]:
    """By the share of images that were reconstructed, then by PSNR; what has neither comes last."""
    return sorted(rows, key=_leaked, reverse=True)


def best_guess(row: Measured) -> tuple[str, Figure] | None:
    """The guess without gradient that has the highest mean PSNR, by name; None without any."""
    known = {name: figure for name, figure in row.baselines.items() if not math.isnan(figure.value)}
    return max(known.items(), key=lambda item: item[1].value, default=None)


def no_better(row: Measured) -> bool:
    """Whether the mean PSNR of an attack is no better than that of the best guess without gradient."""
    guess = best_guess(row)
    if guess is None or "psnr" not in row.metrics:
        return False
    return bool(below_baseline(row.metrics["psnr"].value, {guess[0]: guess[1].value}))


def _leaked(row: Measured) -> tuple[float, ...]:
    values = [row.metrics[name].value if name in row.metrics else math.nan for name in ("success_rate", "psnr")]
    return tuple(-math.inf if math.isnan(value) else value for value in values)
