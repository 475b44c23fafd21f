"""Continuation from a smoothed problem to the original one, for many victims at once."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leakage.errors import check_choice, check_count, check_not_negative, check_pair, check_positive
from leakage.pieces import State
from leakage.solvers.adam import Adam
from leakage.solvers.gauss_newton import GaussNewton
from leakage.solvers.solver import DIVERGED, EXHAUSTED, RUNNING, STEERING, Evaluated, Problem, Solver, running

UNSMOOTHED = ("keep", "refuse")
"""Values of ``unsmoothed=``: what becomes of kinks that can't be smoothed."""
_SHARPNESS, _FADING = f"{STEERING}/sharpness", f"{STEERING}/fading"


@dataclass(kw_only=True, repr=False, eq=False)
class Continuation(Solver):
    r"""Start from a smoothed network with strong priors, and move in levels to a sharp network with weak priors.

    The derivative of a ReLU carries no information from beyond its kink, so a search can get stuck where units have the
    wrong sign. Therefore the attacker smooths the network (:func:`~leakage.clients.smoothing.smoothed`). At level k of
    K, the sharpness :math:`s_k` and the factor :math:`w_k` on the weights of priors are

    .. math:: s_k = s_0 \, (s_1 / s_0)^{k / (K - 1)}, \qquad w_k = (s_k / s_0)^{-p}

    A victim moves to the next level when its search at the current one has ended or has used its share of the
    evaluations; unused evaluations are left to later levels. With ``finish``, one more level follows, searched by
    another solver: the network as it is, without priors. There is no finish if a defense has changed the gradients,
    because a search without a prior would fit the defense. A network without kinks needs no level but the finish. The
    result is the best iterate of the last level.

    With ``start``, the levels begin at the best iterate of another search: on the network as it is, with the full
    weights of priors. Where least squares from noise end in a poor minimum, as on networks with normalisation, Adam
    leads near enough to the solution.

    Args:
        solver: the solver for each level, such as :class:`~leakage.solvers.GaussNewton` or
            :class:`~leakage.solvers.SignedAdam`. Its number of evaluations is the total over all levels.
        levels: K, the number of levels.
        sharpness: :math:`(s_0, s_1)`, the first and the last sharpness.
        fading: p, at least 0.
        finish: the solver of the finish, a :class:`~leakage.solvers.GaussNewton` as ``solver`` is; None for no finish.
            Its evaluations come on top of those of the levels. ``"auto"`` forms Jacobians only if there are no kinks.
        start: the solver of the search before the levels, an :class:`~leakage.solvers.Adam` if ``solver`` is a
            :class:`~leakage.solvers.GaussNewton`; None for no such search. Its steps come on top, too.
        unsmoothed: what to do with kinks that can't be smoothed, such as those of ``nn.Softshrink``: ``"keep"`` them,
            with a warning that names them, or ``"refuse"`` the network.
        strengths: a factor on the weights of priors for each start of a victim, in turn. Without the finish, objectives
            with different priors can't be compared, so all starts have the largest.

    Raises:
        ValueError: if an option is out of range, or if there are more levels than evaluations; in ``fit``, if the
            solver raises it, or if kinks can't be smoothed and ``unsmoothed`` is ``"refuse"``.

    References:
        Allgower and Georg, *Numerical Continuation Methods*, 1990, https://doi.org/10.1007/978-3-642-61257-2.

    Example:
        >>> from leakage.solvers import GaussNewton, SignedAdam
        >>> Continuation(solver=SignedAdam(steps=1200), levels=20).evaluations
        1200
        >>> Continuation(solver=GaussNewton(max_evaluations=5))
        Traceback (most recent call last):
        ValueError: Expected `levels` of at most 5, the solver's evaluations, but got 14.
    """

    solver: Solver
    levels: int = 14
    sharpness: tuple[float, float] = (2.0, 200.0)
    fading: float = 1.3
    finish: GaussNewton | None = None
    start: Adam | None = None
    unsmoothed: str = "keep"
    strengths: tuple[float, ...] = (1.0,)
    _first: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver) or isinstance(self.solver, Continuation):
            raise ValueError(f"Expected `solver` to be another solver, but got {self.solver!r}.")
        check_count(levels=self.levels)
        self.sharpness = check_pair(sharpness=self.sharpness)
        check_positive(**dict(zip(("sharpness[0]", "sharpness[1]"), self.sharpness, strict=True)))
        check_not_negative(fading=self.fading)
        if self.levels > self.evaluations:
            raise ValueError(
                f"Expected `levels` of at most {self.evaluations}, the solver's evaluations, but got {self.levels}."
            )
        check_choice("unsmoothed", self.unsmoothed, UNSMOOTHED)
        self.strengths = tuple(self.strengths)
        if not self.strengths:
            raise ValueError("Expected `strengths` with at least one factor, but got ().")
        check_not_negative(**{f"strengths[{place}]": factor for place, factor in enumerate(self.strengths)})
        if self.finish is not None and not (type(self.finish) is type(self.solver) is GaussNewton):
            raise ValueError(
                f"Expected `finish` and `solver` to be GaussNewton, but got {self.finish!r} and {self.solver!r}."
            )
        if self.start is not None and not (isinstance(self.start, Adam) and type(self.solver) is GaussNewton):
            raise ValueError(
                "Expected `start` to be Adam or SignedAdam, and `solver` to be GaussNewton, but got "
                f"{self.start!r} and {self.solver!r}."
            )

    @property
    def evaluations(self) -> int:
        """Number of evaluations of all levels together, in a fitted copy with those of the start."""
        found: int | None = getattr(self.solver, "steps", getattr(self.solver, "max_evaluations", None))
        if found is None:
            raise ValueError(f"Expected `solver` with `steps` or `max_evaluations`, but got {self.solver!r}.")
        return found

    def fit(self, problem: Problem) -> Continuation:
        """Return a copy that is fitted to the problem, and runs only the levels that the problem needs."""
        if problem.kinks_left:
            names = ", ".join(problem.kinks_left)
            if self.unsmoothed == "refuse":
                raise ValueError(
                    f"Expected a network whose kinks can be smoothed, but got one with {names}. Pass "
                    "unsmoothed='keep' to search with these kinks as they are."
                )
            warnings.warn(
                f"The kinks of {names} can't be smoothed. They stay as they are, and the search may get stuck there.",
                stacklevel=1,
            )
        finish = self.finish if problem.exact else None
        direct = finish is not None and not problem.kinked
        # It takes all its steps, after which the levels are counted.
        start = None if direct or self.start is None else dataclasses.replace(self.start, tolerance=0.0)
        before = start.steps if start else 0
        solver = self.solver
        if start and isinstance(solver, GaussNewton):
            solver = dataclasses.replace(solver, max_evaluations=before + solver.max_evaluations)
        if finish is not None:
            # A Jacobian ends the search of a network without kinks. With kinks it holds for too short steps.
            kind = "cg" if problem.kinked and finish.solver == "auto" else finish.solver
            total = before + self.evaluations + finish.max_evaluations
            finish = dataclasses.replace(finish, solver=kind, max_evaluations=total).fit(problem)
        strengths = self.strengths if finish is not None else (max(self.strengths),)
        fitted = dataclasses.replace(self, solver=solver.fit(problem), finish=finish, start=start, strengths=strengths)
        fitted._first = self.levels if direct else -1 if start else 0
        return fitted

    def _with_level(self, state: State, like: Tensor) -> State:
        """Add the start's state and the entries of the first level to the solver's state."""
        level = torch.full((len(like),), self._first, device=like.device)
        lanes = (self.start.fresh(like) if self.start else {}) | state
        lanes |= {"level": level, "restart": torch.zeros_like(level)}
        self._level(lanes, like)
        return lanes

    def _level(self, lanes: State, like: Tensor) -> None:
        """Set the entries that steer the objective to those of the lanes' levels and starts."""
        levels, (first, last) = lanes["level"], self.sharpness
        ratio = (last / first) ** (levels / max(1, self.levels - 1)).to(like)
        smooth, starting = levels < self.levels, levels < 0
        lanes[_SHARPNESS] = torch.where(smooth & ~starting, first * ratio, torch.inf)
        lanes[_FADING] = torch.where(starting, 1.0, torch.where(smooth, ratio**-self.fading, 0.0))
        lanes[_FADING] *= like.new_tensor(self.strengths)[lanes["restart"] % len(self.strengths)]

    def fresh(self, like: Tensor) -> State:
        """Return the solvers' fresh state, the number of the start, and the level: the first one, or -1."""
        return self._with_level(self.solver.fresh(like), like)

    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """Move by the solver of the level, or to the next level."""
        was_running, level, before = running(lanes), lanes["level"], self.start.steps if self.start else 0
        starting, finishing = level < 0, level == self.levels
        target = _moved(self.solver, lanes, at, ~starting & ~finishing)
        for other, chosen in ((self.start, starting), (self.finish, finishing)):
            if other is not None:
                target = torch.where(chosen[:, None], _moved(other, lanes, at, chosen), target)
        spent = (lanes["evaluations"] - before) * self.levels >= (level + 1) * (self.evaluations - before)
        further = was_running & (~running(lanes) | spent) & (lanes["status"] != DIVERGED)
        further &= lanes["level"] < (self.levels - 1 if self.finish is None else self.levels)
        chosen = further.nonzero().squeeze(1)
        if len(chosen):
            lanes["status"] = torch.where(further, RUNNING, lanes["status"])
            lanes["level"] = lanes["level"] + further
            self._level(lanes, at.point)
            target = self.solver.meet_new_objective(lanes, chosen, target)
            lanes["outdated"] = lanes["outdated"] | further
        return target

    # The solver determines the layout of the state.

    def largest(self, like: Tensor) -> State:
        """Return the state of lanes at its largest size."""
        return self._with_level(self.solver.largest(like), like)

    def match(self, fresh: State, lanes: State) -> State:
        """Give a fresh state the shapes of the present one."""
        return self.solver.match(fresh, lanes)

    def select(self, lanes: State, kept: Tensor) -> State:
        """Return the state of the lanes at these indices."""
        return self.solver.select(lanes, kept)

    def renew(self, lanes: State, chosen: Tensor, fresh: State) -> None:
        """Replace the state of the lanes at these indices by a fresh one."""
        self.solver.renew(lanes, chosen, fresh)
        self._level(lanes, lanes["best"])


def _moved(solver: Solver, lanes: State, at: Evaluated, chosen: Tensor) -> Tensor:
    """Return the next points, of which only those of the chosen lanes count; other lanes stay as they are."""
    if not bool(chosen.any()):
        return at.point
    status = lanes["status"]
    lanes["status"] = torch.where(chosen, status, EXHAUSTED)
    target = solver.move(lanes, at)
    lanes["status"] = torch.where(chosen, lanes["status"], status)
    return target
