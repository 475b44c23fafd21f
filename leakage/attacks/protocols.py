"""The published and the robust search of DLG and iDLG, both by L-BFGS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from leakage.dummies import Labels, Pixels
from leakage.errors import check_choice, check_count, check_flag, check_positive
from leakage.inversion import GradientInversion
from leakage.objectives import DISTANCES, SquaredDistance
from leakage.solvers import LBFGS, PlainLBFGS, Solver

# Iterations in each call of the published protocol; an iteration is one evaluation.
ITERATIONS_PER_CALL = 20

Values = TypeVar("Values")


@dataclass(frozen=True)
class SearchProtocol:
    """Settings of a search by L-BFGS, such as those of ``protocol="robust"`` and ``protocol="published"``.

    Attributes:
        start_std: standard deviation of the normal distribution that dummies start from; it triples with each
            restart.
        history_size: number of pairs that L-BFGS remembers.
        tolerance: objective below which a victim has converged.
        max_evaluations: evaluations of the objective per start.
        restarts: additional starts for a victim that ended above ``restart_above``.
        spectrum: whether the power spectrum of images is the initial inverse Hessian of L-BFGS
            (:class:`~leakage.solvers.ImageSpectrum`).
        relative: whether the objective is divided by the squared norm of the shared gradient.
        line_search: whether each victim shortens its own steps. If so, no unknown changes by more than 1 in one step:
            images lie in [0, 1], and far outside this range the network saturates and the search cannot return.
    """

    start_std: float
    history_size: int
    tolerance: float
    max_evaluations: int
    restarts: int
    spectrum: bool
    relative: bool
    line_search: bool

    def __post_init__(self) -> None:
        check_positive(start_std=self.start_std)
        check_count(max_evaluations=self.max_evaluations)
        check_flag(spectrum=self.spectrum)
        if self.spectrum and not self.line_search:
            raise ValueError("Expected no `spectrum` with protocol='published', whose L-BFGS is torch's, but got True.")

    def solver(self) -> Solver:
        """Return the L-BFGS solver with these settings."""
        if self.line_search:
            return LBFGS(
                history_size=self.history_size,
                tolerance=self.tolerance,
                max_evaluations=self.max_evaluations,
                max_step=1.0,
                spectrum=self.spectrum,
            )
        return PlainLBFGS(
            history_size=self.history_size,
            tolerance=self.tolerance,
            max_iterations=ITERATIONS_PER_CALL,
            max_calls=-(-self.max_evaluations // ITERATIONS_PER_CALL),
        )


PROTOCOLS = {
    "robust": SearchProtocol(
        start_std=0.01,
        history_size=200,
        tolerance=1e-8,
        max_evaluations=6000,
        restarts=3,
        spectrum=True,
        relative=True,
        line_search=True,
    ),
    "published": SearchProtocol(
        start_std=1.0,
        history_size=100,
        tolerance=1e-6,
        max_evaluations=300 * ITERATIONS_PER_CALL,
        restarts=0,
        spectrum=False,
        relative=False,
        line_search=False,
    ),
}
"""Values of ``protocol=`` of DLG and iDLG: this library's (``"robust"``) and the papers' (``"published"``)."""


class LBFGSAttack(GradientInversion):
    """Base class of DLG and iDLG: L-BFGS over pixels, which lowers the distance between gradients.

    Args:
        labels: where labels come from.
        protocol: ``"robust"`` (a line search per victim, restarts) or ``"published"`` (the search of the papers: full
            steps, a start from N(0, 1), 300 calls of 20 iterations).
        seed: seed of the starts. Each victim and restart has its own random stream, however victims are grouped.
        success_threshold: an image counts as reconstructed if its MSE is below this value.
        adaptive: see :class:`~leakage.attacks.GradientInversion`.
        restart_above: a victim that ends above this objective may start again, within ``restarts``.
        distance: a key of :data:`leakage.objectives.DISTANCES`; ``"squared"`` is the papers' distance, and the
            only choice with ``protocol="published"``.
        box: smallest and largest value of a pixel, ``(0, 1)`` for images, to which pixels are clamped after each step;
            None for no limits, as in the papers. Where little is known of the gradient, as behind signs, it helps.
        start_std, history_size, tolerance, max_evaluations, restarts, spectrum: override the protocol's
            value, see :class:`SearchProtocol`.

    Raises:
        ValueError: if the protocol or distance is unknown, ``protocol="published"`` is given a box or another distance
            than the papers', or a number is out of range; in ``fit``, if :class:`~leakage.attacks.GradientInversion`
            raises it.
    """

    def __init__(
        self,
        *,
        labels: Labels,
        protocol: str = "robust",
        seed: int = 0,
        success_threshold: float = 1e-3,
        restart_above: float = 1e-5,
        distance: str = "squared",
        box: tuple[float, float] | None = None,
        start_std: float | None = None,
        history_size: int | None = None,
        tolerance: float | None = None,
        max_evaluations: int | None = None,
        restarts: int | None = None,
        spectrum: bool | None = None,
        adaptive: bool = True,
    ) -> None:
        check_positive(restart_above=restart_above)
        check_choice("distance", distance, DISTANCES)
        if protocol == "published" and distance != "squared":
            raise ValueError(
                f"Expected distance='squared' with protocol='published', as in the papers, but got {distance!r}. Use "
                "protocol='robust'."
            )
        if protocol == "published" and box is not None:
            raise ValueError(
                f"Expected no `box` with protocol='published', as in the papers, but got {box!r}. Use "
                "protocol='robust'."
            )
        options = {"history_size": history_size, "tolerance": tolerance, "max_evaluations": max_evaluations}
        self.search = search_protocol(protocol, start_std=start_std, restarts=restarts, spectrum=spectrum, **options)
        super().__init__(
            objective=SquaredDistance(self.search.relative) if distance == "squared" else DISTANCES[distance](),
            images=Pixels(std=self.search.start_std, box=box),
            labels=labels,
            solver=self.search.solver(),
            restarts=self.search.restarts,
            restart_above=restart_above,
            seed=seed,
            success_threshold=success_threshold,
            adaptive=adaptive,
        )


def search_protocol(name: str, **replaced: Any) -> SearchProtocol:
    """Return the protocol ``name`` with all values in ``replaced`` that are not None.

    Raises:
        ValueError: if the name is unknown or a value is out of range.
    """
    return chosen_values(PROTOCOLS, name, **replaced)


def chosen_values(protocols: Mapping[str, Values], name: str, **replaced: Any) -> Values:
    """Return the values of the protocol ``name``, with all values in ``replaced`` that are not None."""
    check_choice("protocol", name, protocols)
    given = {key: value for key, value in replaced.items() if value is not None}
    return dataclasses.replace(cast(Any, protocols[name]), **given)  # type: ignore[no-any-return]
