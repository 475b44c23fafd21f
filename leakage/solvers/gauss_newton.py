"""Levenberg-Marquardt for many victims at once, with a separate damping for each."""

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
# Conjugate gradients stop when the relative residual is the square root of the loss' decrease, within these bounds.
_LOOSEST, _TIGHTEST = 0.1, 1e-4
# A victim has stalled after so many steps in a row that each leave more than this share of the loss.
_SLOW_SHARE, _SLOW_STEPS = 0.9, 6
# Near rounding (a loss of this many squared units), it has also stalled if a step leaves more than this share.
_NEAR, _NEAR_SHARE = 1e3, 0.5
# Maximum number of additional steps with the same Jacobian.
_CHORDS = 4


@dataclass(kw_only=True, repr=False, eq=False)
class GaussNewton(Solver):
    r"""Levenberg-Marquardt: nonlinear least squares as a series of linear ones, with a damping per victim.

    The loss of each victim is :math:`\lVert r(x) \rVert^2`. Each step d solves

    .. math:: \bigl(J^\top J + \lambda \, m \, P^{-1}\bigr) \, d = -J^\top r, \qquad J = \partial r / \partial x

    where m is the mean eigenvalue of :math:`T^\top J^\top J T`, and :math:`P = T T^\top`. The damping :math:`\lambda`
    falls if the loss decreases as the linear equations predict, and grows if it does not. A step that does not decrease
    the loss is undone. If r has a zero, each step near it about doubles the number of correct digits.

    ``"cholesky"`` forms each victim's Jacobian (in forward mode) and reuses it for further steps while these are
    effective. ``"cg"`` uses only products with J, for all victims together. ``"auto"`` starts with ``"cg"``, and
    switches to ``"cholesky"`` for each victim whose equations need more than ``max_products``.

    Args:
        tolerance: a victim has converged when its loss is at most this; by default 1e-11 for one image, and 1e-13, near
            the rounding of single precision, for several images, which depend more on the last digits.
        max_evaluations: evaluations of the objective (the number of steps plus one) after which a victim is exhausted.
        damping: initial :math:`\lambda`.
        max_step: no unknown changes by more than this in one step.
        solver: ``"auto"``, ``"cholesky"`` or ``"cg"``.
        max_products: maximum number of products with J, and equally with its transpose, in one step of ``"cg"``.
        reference_loss: loss relative to which rounding and the accuracy of the linear equations are measured. Use 1
            for distances relative to the shared gradient. None means each victim's first loss, which is unsuitable if
            the start is near the solution.
        memory: bytes that the Jacobian and the normal equations of one victim may take, without the activations of some
            hundred directions. If they need more, ``"cg"`` is used, with a warning.
        spectrum: whether P is the typical covariance of images (:class:`~leakage.solvers.ImageSpectrum`) if unknowns
            are pixels; otherwise P is the identity.
        underdetermined: whether to search even if there are more unknowns than equations.

    Raises:
        ValueError: if an option is out of range or the solver is unknown; in ``fit``, if the objective is not a sum of
            squares, or if there are more unknowns than equations and not ``underdetermined``.

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
        """Return a copy with the default tolerance for the problem, and with ``"cg"`` if J does not fit into memory."""
        if problem.equations is None:
            raise ValueError(
                "Expected an objective that is a sum of squares for GaussNewton, such as SquaredDistance, but got one "
                "with a term that is not."
            )
        if problem.num_unknowns > problem.num_equations and not self.underdetermined:
            raise ValueError(
                f"Expected at most as many unknowns as equations, but got {problem.num_unknowns:,} unknowns "
                f"({problem.written}) and {problem.num_equations:,} equations (the network's parameters). Pass "
                "underdetermined=True to search anyway."
            )
        solver = self.solver
        needed = dense_bytes(problem.num_equations, problem.num_unknowns, problem.element_size)
        if solver != "cg" and needed > self.memory:
            warnings.warn(
                f"The Jacobian and normal equations of one victim need {needed:,} bytes, but `memory` is "
                f"{self.memory:,}. The attack uses only products with the Jacobian (solver='cg').",
                stacklevel=1,  # reported for this module, as the command line silences Lightning's warnings
            )
            solver = "cg"
        tolerance = _TOLERANCE if problem.num_images == 1 else _TOLERANCE_OF_BATCHES
        return dataclasses.replace(
            self, solver=solver, tolerance=tolerance if self.tolerance is None else self.tolerance
        )

    def fresh(self, like: Tensor) -> State:
        """Return the last accepted point, its loss, the first loss, the predicted decrease, damping and counts."""
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
        """Accept or undo the last step, and make the next one."""
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
        """Restart at the best points with the present damping."""
        damping = lanes["damping"][chosen].clone()
        target = super().meet_new_objective(lanes, chosen, target)
        lanes["damping"][chosen] = damping
        return target

    def _steps(self, lanes: State, moving: Tensor, problem: Problem) -> Tensor:
        """Return the steps of the lanes at the given indices."""
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
        """Return the loss relative to which others are measured, ``(V,)``."""
        given = self.reference_loss
        return first_loss if given is None else torch.full_like(first_loss, given)
