"""Levenberg-Marquardt for many victims at once, each with its own damping."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from leakage.errors import check_choice, check_count, check_flag, check_limit, check_not_negative, check_positive
from leakage.pieces import State
from leakage.solvers.normal_equations import cholesky_steps, conjugate_gradients, dense_bytes, judge_steps
from leakage.solvers.solver import (
    CONVERGED,
    DIVERGED,
    EXHAUSTED,
    STALLED,
    Equations,
    Evaluated,
    Problem,
    Solver,
    running,
    settle,
)
from leakage.solvers.spectrum import ImageSpectrum

SOLVERS = ("auto", "cholesky", "cg")
"""Values of ``solver=``: how the linear equations of a step are solved."""
_TOLERANCE, _TOLERANCE_OF_BATCHES = 1e-11, 1e-13
# Conjugate gradients go on until the share that is left has fallen to the root of the loss' fall, within these bounds.
_LOOSEST, _TIGHTEST = 0.1, 1e-4
# Steps in a row that leave more than this share of the loss, after which a victim has stalled.
_SLOW_SHARE, _SLOW_STEPS = 0.9, 6
# At rounding, where the loss has fallen to so many squares of its unit, so has one whose step leaves half of it.
_NEAR, _NEAR_SHARE = 1e3, 0.5
# Further steps with one Jacobian, at most.
_CHORDS = 4


@dataclass(kw_only=True, repr=False, eq=False)
class GaussNewton(Solver):
    r"""Levenberg-Marquardt: solves nonlinear least squares by linear ones, with a damping per victim.

    The loss of each victim is :math:`\lVert r(x) \rVert^2`, and at every step it moves by the d of

    .. math:: \bigl(J^\top J + \lambda \, m \, P^{-1}\bigr) \, d = -J^\top r, \qquad J = \partial r / \partial x

    with m the mean eigenvalue of :math:`T^\top J^\top J T`, :math:`P = T T^\top`. The damping :math:`\lambda` falls
    where the loss decreases as the linear equations promised, and grows where it does not; a step that does not
    decrease the loss is taken back. Where r can be made zero, the number of right digits about doubles with
    each step near the solution.

    ``"cholesky"`` forms each victim's Jacobian (forward mode) and lets it serve further steps while they pay;
    ``"cg"`` takes products with J alone, for all victims together; ``"auto"`` begins with those and changes to
    Cholesky for a victim whose equations need more than ``max_products``.

    Args:
        tolerance: a victim has converged when its loss is at most this; by default 1e-11 for one image, and 1e-13, near
            the rounding of single precision, for several, which depend more on the last digits.
        max_evaluations: evaluations of the objective, so steps and one more, after which a victim is exhausted.
        damping: the first :math:`\lambda`.
        max_step: no unknown changes by more than this in one step.
        solver: ``"auto"``, ``"cholesky"`` or ``"cg"``.
        max_products: products with J, and as many with its transpose, of one step of conjugate gradients.
        reference_loss: what rounding and the exactness of the linear equations are measured by; None for each victim's
            first loss, which says nothing where the start is near the solution. 1 is right for distances that are
            relative to the shared gradient.
        memory: bytes that the Jacobian and the normal equations of one victim may take; the activations of some
            hundred directions come on top. Where they need more, ``"cg"`` is used, with a warning.
        spectrum: P is the covariance that images have (:class:`~leakage.solvers.ImageSpectrum`), where unknowns are
            pixels; else the identity.
        underdetermined: go on where there are more unknowns than equations.

    Raises:
        ValueError: an option out of its range, or an unknown solver; in ``fit``, an objective that is no sum of
            squares, or more unknowns than equations.

    References:
        Levenberg, *A method for the solution of certain non-linear problems in least squares*, 1944,
        https://doi.org/10.1090/qam/10666; Marquardt, *An algorithm for least-squares estimation of nonlinear
        parameters*, 1963, https://doi.org/10.1137/0111030; Dembo, Eisenstat and Steihaug, *Inexact Newton
        methods*, 1982, https://doi.org/10.1137/0719025.

    Example:
        >>> from leakage.solvers import PerVictimOptimizer, Problem
        >>> x = torch.nn.Parameter(torch.tensor([[3.0, -1.0], [5.0, 2.0]]))
        >>> problem = Problem(equations=lambda x, lanes: x.exp() - 1, num_equations=2, num_unknowns=2)
        >>> optimizer = PerVictimOptimizer([x], GaussNewton(tolerance=1e-10), problem)
        >>> def closure():
        ...     losses = (x.exp() - 1).square().sum(1)
        ...     x.grad = torch.autograd.grad(losses.sum(), x)[0]
        ...     return losses
        >>> while optimizer.running.any():
        ...     _ = optimizer.step(closure)
        >>> x.detach().abs() < 1e-5
        tensor([[True, True],
                [True, True]])
    """

    tolerance: float | None = None
    max_evaluations: int = 60
    damping: float = 1e-2
    max_step: float = math.inf
    solver: str = "auto"
    max_products: int = 100
    reference_loss: float | None = 1.0
    memory: int = 2**32
    spectrum: bool = True
    underdetermined: bool = False

    def __post_init__(self) -> None:
        check_positive(damping=self.damping)
        check_limit(max_step=self.max_step)
        if self.tolerance is not None:
            check_not_negative(tolerance=self.tolerance)
        check_count(max_evaluations=self.max_evaluations, max_products=self.max_products, memory=self.memory)
        if self.reference_loss is not None:
            check_positive(reference_loss=self.reference_loss)
        check_choice("solver", self.solver, SOLVERS)
        check_flag(spectrum=self.spectrum, underdetermined=self.underdetermined)

    def fit(self, problem: Problem) -> GaussNewton:
        """With the tolerance for so many images, and without the Jacobian where it has no room."""
        if problem.equations is None:
            raise ValueError(
                "Expected an objective that is a sum of squares for GaussNewton, such as SquaredDistance, but got one "
                "with a term that is none."
            )
        if problem.num_unknowns > problem.num_equations and not self.underdetermined:
            raise ValueError(
                f"Expected at most as many unknowns as equations, but got {problem.num_unknowns:,} unknowns "
                f"({problem.written}) and {problem.num_equations:,} equations (the network's parameters). Pass "
                "underdetermined=True to go on all the same."
            )
        solver = self.solver
        needed = dense_bytes(problem.num_equations, problem.num_unknowns, problem.element_size)
        if solver != "cg" and needed > self.memory:
            warnings.warn(
                f"The Jacobian and normal equations of one victim need {needed:,} bytes, `memory` is "
                f"{self.memory:,}: the attack takes products with the Jacobian alone (solver='cg').",
                stacklevel=1,  # of this module: the command line silences those of Lightning's
            )
            solver = "cg"
        tolerance = _TOLERANCE if problem.num_images == 1 else _TOLERANCE_OF_BATCHES
        return dataclasses.replace(
            self, solver=solver, tolerance=tolerance if self.tolerance is None else self.tolerance
        )

    def fresh(self, like: Tensor) -> State:
        """The last accepted point, its loss and the first of all, what the step promised, damping, slow steps."""
        losses = like.new_full((len(like),), torch.inf)
        count = torch.zeros(len(like), dtype=torch.long, device=like.device)
        return {
            "point": torch.zeros_like(like),
            "loss": losses,
            "first_loss": losses.clone(),
            "promised": losses.clone(),
            "damping": torch.full_like(losses, self.damping),
            "slow": count,
            "dense": torch.full_like(count, self.solver == "cholesky", dtype=torch.bool),
            "products": count.clone(),
        }

    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """Accept the points or take them back, and step from there."""
        point, losses, gradient, finite = at.point, at.losses, at.gradient, at.finite
        searching, new = running(lanes), torch.isinf(lanes["loss"])
        settle(lanes, searching & new & ~finite, DIVERGED)
        reached = torch.where(finite, losses, torch.inf)
        before = lanes["loss"], reached, lanes["promised"], lanes["damping"], lanes["slow"]
        judged = judge_steps(*before, slow_share=_SLOW_SHARE)
        accepted, tried = searching & judged.accepted, searching & ~new
        hopeless = tried & judged.hopeless
        for name in ("damping", "slow"):
            lanes[name] = torch.where(tried, getattr(judged, name), lanes[name])
        near = lanes["loss"] <= _NEAR * torch.finfo(losses.dtype).eps ** 2 * self._reference(lanes["first_loss"])
        useless = tried & near & (~accepted | (losses > _NEAR_SHARE * lanes["loss"]))
        lanes["iterations"] += accepted & ~new
        lanes["point"] = torch.where(accepted[:, None], point, lanes["point"])
        lanes["loss"] = torch.where(accepted, losses, lanes["loss"])
        lanes["first_loss"] = torch.where(accepted & new, losses, lanes["first_loss"])
        settle(lanes, lanes["loss"] <= cast(float, self.tolerance), CONVERGED)
        settle(lanes, accepted & (gradient.abs().amax(1) == 0), STALLED)
        settle(lanes, lanes["evaluations"] >= self.max_evaluations, EXHAUSTED)
        settle(lanes, hopeless | useless | (lanes["slow"] >= _SLOW_STEPS), STALLED)
        target = point.clone()
        moving = running(lanes).nonzero().squeeze(1)
        if len(moving):
            target[moving] = lanes["point"][moving] + self._steps(lanes, moving, at.problem)
        return target

    def meet_new_objective(self, lanes: State, chosen: Tensor, target: Tensor) -> Tensor:
        """Begin anew at the best points, with the damping that is right."""
        damping = lanes["damping"][chosen].clone()
        target = super().meet_new_objective(lanes, chosen, target)
        lanes["damping"][chosen] = damping
        return target

    def _steps(self, lanes: State, moving: Tensor, problem: Problem) -> Tensor:
        """Of the lanes at the given indices."""
        equations = cast(Equations, problem.equations)
        spectrum = cast(ImageSpectrum | None, problem.preconditioner) if self.spectrum else None
        steps = torch.empty_like(lanes["point"][moving])
        dense = lanes["dense"][moving]
        if not bool(dense.all()):
            chosen = moving[~dense]
            fallen = (lanes["loss"][chosen] / self._reference(lanes["first_loss"][chosen])).sqrt()
            at = lanes["point"][chosen], chosen, lanes["damping"][chosen]
            found = conjugate_gradients(
                equations,
                *at,
                forcing=fallen.clamp(_TIGHTEST, _LOOSEST),
                max_products=self.max_products,
                max_step=self.max_step,
                spectrum=spectrum,
            )
            steps[~dense] = found.step
            lanes["promised"][chosen] = found.promised
            lanes["products"][chosen] += found.products
            if self.solver == "auto" and not bool(found.solved.all()):
                lanes["dense"][chosen] = ~found.solved
        for place in dense.nonzero().squeeze(1).tolist():
            chosen = moving[place : place + 1]
            at = lanes["point"][chosen], chosen, lanes["damping"][chosen]
            one = cholesky_steps(equations, *at, max_step=self.max_step, spectrum=spectrum, max_chords=_CHORDS)
            steps[place] = one.step[0]
            lanes["promised"][chosen] = one.promised
            lanes["damping"][chosen] = one.damping
            lanes["products"][chosen] += one.products
        return steps

    def _reference(self, first_loss: Tensor) -> Tensor:
        """The loss that others are measured by, ``(V,)``."""
        given = self.reference_loss
        return first_loss if given is None else torch.full_like(first_loss, given)
