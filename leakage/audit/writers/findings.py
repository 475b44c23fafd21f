"""Conclusions from measurements: which client leaked most, and whether an attack did better than a guess."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakage.metrics.baselines import below_baseline

if TYPE_CHECKING:
    from leakage.audit.report import AuditReport, Figure, Measured, Planned, Problem


def most_leaked_first(rows: Iterable[Measured]) -> list[Measured]:
    """Sort by the low end of the share of reconstructed images, then by PSNR; rows with neither come last."""
    return sorted(rows, key=_leaked, reverse=True)


def best_guess(row: Measured) -> tuple[str, Figure] | None:
    """Return the guess without gradient with the highest mean PSNR, and its name; None if there is no guess."""
    known = {name: figure for name, figure in row.baselines.items() if not math.isnan(figure.value)}
    return max(known.items(), key=lambda item: item[1].value, default=None)


def no_better(row: Measured) -> bool:
    """Whether an attack has no higher mean PSNR than the best guess without gradient."""
    guess = best_guess(row)
    if guess is None or "psnr" not in row.metrics:
        return False
    return bool(below_baseline(row.metrics["psnr"].value, {guess[0]: guess[1].value}))


@dataclass(frozen=True)
class Side:
    """A client in a comparison: its declared defenses and accuracy, and the attack that found most."""

    client: str
    defenses: list[Any]
    accuracy: Any
    worst: Measured | None


def side_by_side(report: AuditReport) -> list[Side]:
    """Compare what leaks from clients with different defenses; empty if there is nothing to compare.

    ``accuracy`` is the accuracy that the user declared for the network that such clients train, or ``None``.
    """
    clients = report.declared.clients
    if len(clients) < 2 or not any(client.get("defenses") for client in clients):
        return []
    sides = []
    for client in clients:
        own = [row for row in report.measured if row.client == client.get("name") and "success_rate" in row.metrics]
        worst = next(iter(most_leaked_first(own)), None)
        sides.append(Side(str(client.get("name")), client.get("defenses") or [], client.get("accuracy"), worst))
    return sides


def defended(report: AuditReport) -> set[str]:
    """Return the names of clients with a declared defense."""
    return {str(client.get("name")) for client in report.declared.clients if client.get("defenses")}


def grouped(problems: Iterable[Problem]) -> list[tuple[Problem, list[str]]]:
    """Group equal problems, and return each with the list of its places."""
    places: dict[tuple[str, ...], tuple[Problem, list[str]]] = {}
    for one in problems:
        places.setdefault((one.kind, one.problem, one.fix, one.means), (one, []))[1].append(one.where)
    return list(places.values())


def outcome(planned: Planned, measured: Iterable[Measured]) -> str:
    """Return ``"ran"``, ``"ended early"`` if the attack was stopped but measured something, or ``"not run"``."""
    if planned.done:
        return "ran"
    began = any((row.client, row.attack) == (planned.client, planned.attack) for row in measured)
    return "ended early" if began else "not run"


def _leaked(row: Measured) -> tuple[float, ...]:
    success, psnr = row.metrics.get("success_rate"), row.metrics.get("psnr")
    values = [success.low, success.value] if success else [math.nan] * 2
    return tuple(-math.inf if math.isnan(value) else value for value in [*values, psnr.value if psnr else math.nan])
