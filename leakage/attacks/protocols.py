"""How attacks search: the protocol of the papers, and the robust one."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from leakage.errors import check_choice, check_count, check_flag, check_positive

# Calls of the published protocol have 20 iterations, one evaluation each.
ITERATIONS_PER_CALL = 20


@dataclass(frozen=True)
class SearchProtocol:
    """How an attack searches; the values of ``protocol="robust"`` and ``protocol="published"``.

    Attributes:
        start_std: standard deviation of the normal distribution that dummies start from; it is three
            times as wide for each restart.
        history_size: pairs that L-BFGS remembers.
        tolerance: the objective at which a victim has converged.
        max_evaluations: evaluations of the objective per start.
        restarts: further starts for a victim that ended above ``restart_above``.
        relative: whether the objective is divided by the squared norm of the shared gradient.
        line_search: whether every victim shortens its own steps.
        max_step: the most that an unknown, a pixel or a label's logit, changes in one step of the line
            search; images lie in [0, 1], and far outside the network is so saturated that no way leads
            back.
        spectrum: whether L-BFGS begins from the power spectrum of images
            (:class:`~leakage.solvers.ImageSpectrum`).
    """

    start_std: float
    history_size: int
    tolerance: float
    max_evaluations: int
    restarts: int
    relative: bool
    line_search: bool
    max_step: float
    spectrum: bool


PROTOCOLS = {
    "robust": SearchProtocol(
        start_std=0.01,
        history_size=200,
        tolerance=1e-8,
        max_evaluations=6000,
        restarts=3,
        relative=True,
        line_search=True,
        max_step=1.0,
        spectrum=True,
    ),
    "published": SearchProtocol(
        start_std=1.0,
        history_size=100,
        tolerance=1e-6,
        max_evaluations=300 * ITERATIONS_PER_CALL,
        restarts=0,
        relative=False,
        line_search=False,
        max_step=math.inf,
        spectrum=False,
    ),
}


def search_protocol(name: str, **replaced: Any) -> SearchProtocol:
    """The protocol of that name, with some of its values replaced.

    Args:
        name: one of :data:`PROTOCOLS`.
        replaced: values by name; None keeps the protocol's own.

    Raises:
        ValueError: an unknown name, a value out of its range, or ``spectrum`` without a line search.
    """
    check_choice("protocol", name, PROTOCOLS)
    named = PROTOCOLS[name]
    search = dataclasses.replace(named, **{key: value for key, value in replaced.items() if value is not None})
    check_positive(start_std=search.start_std, tolerance=search.tolerance)
    check_count(history_size=search.history_size, max_evaluations=search.max_evaluations)
    check_count(0, restarts=search.restarts)
    check_flag(spectrum=search.spectrum)
    if search.spectrum and not search.line_search:
        raise ValueError(f"Expected no `spectrum` with protocol={name!r}, whose L-BFGS is torch's, but got True.")
    return search
