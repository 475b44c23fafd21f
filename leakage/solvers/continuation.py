"""From a smooth problem to the sharp one, for many victims at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.errors import check_count, check_not_negative, check_pair, check_positive
from leakage.pieces import State
from leakage.solvers.solver import DIVERGED, RUNNING, STEERING, Evaluated, Problem, Solver, running

_SHARPNESS, _FADING = f"{STEERING}/sharpness", f"{STEERING}/fading"


@dataclass(kw_only=True, repr=False, eq=False)
class Continuation(Solver):
    r"""Begins with a network without kinks and strong priors, and goes in levels to the network as it is and weak ones.

    ReLU hides from derivatives what lies beyond its kink, and a search ends where the signs of the units happen to be
    wrong. On the attacker's side its network is smoothed (:func:`~leakage.clients.smoothing.smoothed`), and at level k
    of K its sharpness, and what the weights of priors are multiplied by, are

    .. math:: s_k = s_0 \, (s_1 / s_0)^{k / (K - 1)}, \qquad w_k = (s_k / s_0)^{-p}

    Each victim goes to its next level when its search has ended at this one, or has had its share of the evaluations:
    what it leaves is for the levels that follow. The iterate that counts is the best one of the last level.

    Args:
        solver: how a level is searched, such as :class:`~leakage.solvers.GaussNewton` or
            :class:`~leakage.solvers.SignedAdam`; its number of evaluations is that of all levels together.
        levels: K.
        sharpness: :math:`s_0, s_1`.
        fading: p, at least 0.

    Raises:
        ValueError: an option out of its range, or more levels than evaluations; in ``fit``, what the solver raises.

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

    @property
    def evaluations(self) -> int:
        """Of all levels together."""
        found: int | None = getattr(self.solver, "steps", getattr(self.solver, "max_evaluations", None))
        if found is None:
            raise ValueError(f"Expected `solver` with `steps` or `max_evaluations`, but got {self.solver!r}.")
        return found

    def fit(self, problem: Problem) -> Continuation:
        """With a solver that is fit for it."""
        return dataclasses.replace(self, solver=self.solver.fit(problem))

    def _levelled(self, levels: Tensor, like: Tensor) -> State:
        """How the objective is steered at the victims' levels."""
        first, last = self.sharpness
        ratio = (last / first) ** (levels / max(1, self.levels - 1)).to(like)
        return {_SHARPNESS: first * ratio, _FADING: ratio**-self.fading}

    def _with_levels(self, state: State, like: Tensor) -> State:
        levels = torch.zeros(len(like), dtype=torch.long, device=like.device)
        return state | {"level": levels} | self._levelled(levels, like)

    def fresh(self, like: Tensor) -> State:
        """That of the solver, and the level, from 0 on."""
        return self._with_levels(self.solver.fresh(like), like)

    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """By the solver, or to the next level."""
        was_running = running(lanes)
        target = self.solver.move(lanes, at)
        spent = lanes["evaluations"] * self.levels >= (lanes["level"] + 1) * self.evaluations
        further = was_running & (~running(lanes) | spent) & (lanes["status"] != DIVERGED)
        further &= (lanes["level"] < self.levels - 1) & (lanes["evaluations"] < self.evaluations)
        chosen = further.nonzero().squeeze(1)
        if len(chosen):
            lanes["status"] = torch.where(further, RUNNING, lanes["status"])
            lanes["level"] = lanes["level"] + further
            lanes |= self._levelled(lanes["level"], at.point)
            target = self.solver.meet_new_objective(lanes, chosen, target)
            lanes["best_loss"] = torch.where(further, torch.inf, lanes["best_loss"])
        return target

    # The layout is the solver's.

    def largest(self, like: Tensor) -> State:
        """The state of lanes when it is largest."""
        return self._with_levels(self.solver.largest(like), like)

    def match(self, fresh: State, lanes: State) -> State:
        """Give a fresh state the shapes of the present one."""
        return self.solver.match(fresh, lanes)

    def select(self, lanes: State, kept: Tensor) -> State:
        """The state of the lanes at these indices."""
        return self.solver.select(lanes, kept)

    def renew(self, lanes: State, chosen: Tensor, fresh: State) -> None:
        """Make the state of the lanes at these indices a fresh one."""
        self.solver.renew(lanes, chosen, fresh)
