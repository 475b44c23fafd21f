"""Levenberg-Marquardt for many victims at once, each with its own damping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leakage.errors import check_choice, check_count, check_positive
from leakage.solvers.normal_equations import Equations, cholesky_steps, conjugate_gradients, dense_bytes
from leakage.solvers.per_victim import CONVERGED, DIVERGED, EXHAUSTED, STALLED, PerVictimOptimizer
from leakage.solvers.spectrum import ImageSpectrum

SOLVERS = ("auto", "cholesky", "cg")
# A step that decreases the loss by more (less) than these shares of what it promised lowers (raises) the damping.
_BOLD, _FIRM = 0.75, 0.25
_BOLDER, _FIRMER = 0.1, 4.0
# Conjugate gradients go on until the share that is left has fallen to the root of the loss' fall, within these bounds.
_LOOSEST, _TIGHTEST = 0.1, 1e-4
# Steps in a row that leave more than this share of the loss, after which a victim has stalled.
_SLOW_SHARE, _SLOW_STEPS = 0.9, 6
# So has one whose steps are taken back at this damping.
_HOPELESS = 1e4
# At rounding, where the loss has fallen to so many squares of its unit, so has one whose step leaves half of it.
_NEAR, _NEAR_SHARE = 1e3, 0.5


class GaussNewton(PerVictimOptimizer):
    r"""Levenberg-Marquardt: solves nonlinear least squares by linear ones, with a damping per victim.

    The loss of each victim is :math:`\lVert r(x) \rVert^2`, and at every :meth:`step` it moves by the d of

    .. math:: \bigl(J^\top J + \lambda \, m \, P^{-1}\bigr) \, d = -J^\top r, \qquad J = \partial r / \partial x

    with m the mean eigenvalue of :math:`T^\top J^\top J T`, :math:`P = T T^\top`. The damping :math:`\lambda` falls
    where the loss decreases as the linear equations promised, and grows where it does not; a step that does not
    decrease the loss is taken back. Where r can be made zero, the number of right digits about doubles with
    each step near the solution.

    ``"cholesky"`` forms each victim's Jacobian (forward mode) and lets it serve further steps while they pay;
    ``"cg"`` takes products with J alone, for all victims together; ``"auto"`` begins with those and changes to
    Cholesky for a victim whose equations need more than ``max_products``, if its Jacobian fits into ``memory``.

    Args:
        params: parameters ``(V, ...)``, a leading victims' dimension each.
        equations: gives the residuals r ``(L, M)`` of L lanes for their flattened parameters ``(L, D)`` and the
            lanes' numbers ``(L,)``; differentiable twice by ``torch.func``, each row by its own lane alone. The
            closure's loss is their squared norm. Not part of the state.
        tolerance: a victim has converged when its loss is at most this.
        max_evaluations: evaluations of the closure, so steps and one more, after which a victim is exhausted.
        damping: the first :math:`\lambda`.
        max_step: no unknown changes by more than this in one step.
        solver: ``"auto"``, ``"cholesky"`` or ``"cg"``.
        max_products: products with J, and as many with its transpose, of one step of conjugate gradients.
        reference_loss: what rounding and the exactness of the linear equations are measured by; by default each
            victim's first loss, which says nothing where the start is near the solution.
        memory: bytes that the Jacobian and the normal equations of one victim may take; the activations of some
            hundred directions come on top.
        spectrum: P; None is the identity. Not part of the state.

    Attributes:
        products: ``(V,)``, products with the Jacobian, or columns of it, that each victim has taken.

    Raises:
        ValueError: an option out of its range, or an unknown solver; at the first step, a Jacobian that does not
            fit into ``memory`` with ``solver="cholesky"``.

    References:
        Levenberg, *A method for the solution of certain non-linear problems in least squares*, 1944,
        https://doi.org/10.1090/qam/10666; Marquardt, *An algorithm for least-squares estimation of nonlinear
        parameters*, 1963, https://doi.org/10.1137/0111030; Dembo, Eisenstat and Steihaug, *Inexact Newton
        methods*, 1982, https://doi.org/10.1137/0719025.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([[3.0, -1.0], [5.0, 2.0]]))
        >>> optimizer = GaussNewton([x], equations=lambda x, lanes: x.exp() - 1, tolerance=1e-10)
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

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        equations: Equations,
        tolerance: float = 0.0,
        max_evaluations: int = 100,
        damping: float = 1e-2,
        max_step: float = math.inf,
        solver: str = "auto",
        max_products: int = 200,
        memory: int = 2**32,
        reference_loss: float | None = None,
        spectrum: ImageSpectrum | None = None,
    ) -> None:
        check_positive(damping=damping)
        if not max_step > 0:
            raise ValueError(f"Expected `max_step` to be positive, but got {max_step!r}.")
        if not tolerance >= 0:
            raise ValueError(f"Expected `tolerance` of at least 0, but got {tolerance!r}.")
        check_count(max_evaluations=max_evaluations, max_products=max_products, memory=memory)
        if reference_loss is not None:
            check_positive(reference_loss=reference_loss)
        check_choice("solver", solver, SOLVERS)
        self._equations, self._spectrum = equations, spectrum
        self._rows: int | None = None  # of the Jacobian of one victim
        super().__init__(
            params,
            {
                "tolerance": tolerance,
                "max_evaluations": max_evaluations,
                "damping": damping,
                "max_step": max_step,
                "solver": solver,
                "max_products": max_products,
                "memory": memory,
                "reference_loss": reference_loss,
            },
        )

    products = property(lambda self: self.lanes["products"])

    def _fresh(self, victims: int) -> dict[str, Tensor]:
        fresh = super()._fresh(victims)
        like = fresh["best"]
        return fresh | {
            "point": like.clone(),  # the last accepted point, its loss and the first of all losses
            "loss": fresh["best_loss"].clone(),
            "first_loss": fresh["best_loss"].clone(),
            "promised": fresh["best_loss"].clone(),
            "damping": torch.full_like(fresh["best_loss"], self._options["damping"]),
            "slow": torch.zeros_like(fresh["evaluations"]),
            "dense": torch.full_like(fresh["status"], self._options["solver"] == "cholesky", dtype=torch.bool),
            "products": torch.zeros_like(fresh["evaluations"]),
        }

    def _move(self, point: Tensor, losses: Tensor, gradient: Tensor, finite: Tensor) -> Tensor:
        lanes = self.lanes
        running, new = self.running, torch.isinf(lanes["loss"])
        self._set_status(running & new & ~finite, DIVERGED)
        accepted = running & finite & (new | (losses < lanes["loss"]))
        ratio = (lanes["loss"] - losses) / lanes["promised"]
        factor = torch.where(ratio > _BOLD, _BOLDER, torch.where(ratio < _FIRM, _FIRMER, 1.0))
        factor = torch.where(accepted, factor, _FIRMER)
        tried = running & ~new
        least = torch.finfo(losses.dtype).eps / 100
        hopeless = tried & ~accepted & (lanes["damping"] > _HOPELESS)
        lanes["damping"] = torch.where(tried, (lanes["damping"] * factor).clamp(min=least), lanes["damping"])
        slow = accepted & (losses > _SLOW_SHARE * lanes["loss"])
        count = torch.where(slow, lanes["slow"] + 1, torch.where(accepted, 0, lanes["slow"]))
        lanes["slow"] = torch.where(tried, count, lanes["slow"])
        near = lanes["loss"] <= _NEAR * torch.finfo(losses.dtype).eps ** 2 * self._reference(lanes["first_loss"])
        useless = tried & near & (~accepted | (losses > _NEAR_SHARE * lanes["loss"]))
        lanes["iterations"] += accepted & ~new
        lanes["point"] = torch.where(accepted[:, None], point, lanes["point"])
        lanes["loss"] = torch.where(accepted, losses, lanes["loss"])
        lanes["first_loss"] = torch.where(accepted & new, losses, lanes["first_loss"])
        self._judge(gradient, accepted)
        self._set_status(hopeless | useless | (lanes["slow"] >= _SLOW_STEPS), STALLED)
        target = point.clone()
        moving = self.running.nonzero().squeeze(1)
        if len(moving):
            target[moving] = lanes["point"][moving] + self._steps(moving)
        return target

    def _judge(self, gradient: Tensor, accepted: Tensor) -> None:
        """Converged, stalled or out of budget?"""
        lanes, options = self.lanes, self._options
        self._set_status(lanes["loss"] <= options["tolerance"], CONVERGED)
        self._set_status(accepted & (gradient.abs().amax(1) == 0), STALLED)
        self._set_status(lanes["evaluations"] >= options["max_evaluations"], EXHAUSTED)

    def _steps(self, moving: Tensor) -> Tensor:
        """Steps of the lanes at the given indices."""
        lanes, options = self.lanes, self._options
        steps = torch.empty_like(lanes["point"][moving])
        dense = lanes["dense"][moving]
        matrix_free = (~dense).nonzero().squeeze(1)
        if len(matrix_free):
            chosen = moving[matrix_free]
            fallen = (lanes["loss"][chosen] / self._reference(lanes["first_loss"][chosen])).sqrt()
            found = conjugate_gradients(
                self._equations,
                lanes["point"][chosen],
                chosen,
                lanes["damping"][chosen],
                forcing=fallen.clamp(_TIGHTEST, _LOOSEST),
                max_products=options["max_products"],
                max_step=options["max_step"],
                spectrum=self._spectrum,
            )
            steps[matrix_free] = found.step
            lanes["promised"][chosen] = found.promised
            lanes["products"][chosen] += found.products
            if options["solver"] == "auto" and not bool(found.solved.all()) and self._fits(chosen[:1]):
                lanes["dense"][chosen] = ~found.solved
        for place in dense.nonzero().squeeze(1).tolist():
            chosen = moving[place : place + 1]
            if options["solver"] == "cholesky" and not self._fits(chosen):
                raise ValueError(
                    f"Expected `memory` for the Jacobian of one victim, {self._needed(chosen)} bytes, but got "
                    f"{options['memory']}. Use solver='cg', which forms none, or more `memory`."
                )
            one = cholesky_steps(
                self._equations,
                lanes["point"][chosen],
                chosen,
                lanes["damping"][chosen],
                max_step=options["max_step"],
                spectrum=self._spectrum,
                max_chords=4,
            )
            steps[place] = one.step[0]
            lanes["promised"][chosen] = one.promised
            lanes["damping"][chosen] = one.damping
            lanes["products"][chosen] += one.products
        return steps

    def _reference(self, first_loss: Tensor) -> Tensor:
        """The loss that others are measured by, ``(V,)``."""
        given = self._options["reference_loss"]
        return first_loss if given is None else torch.full_like(first_loss, given)

    def _needed(self, lane: Tensor) -> int:
        """Bytes of the dense step of one lane."""
        if self._rows is None:
            self._rows = self._equations(self.lanes["point"][lane], lane).shape[1]
        return dense_bytes(self._rows, sum(self._sizes), self.lanes["point"].element_size())

    def _fits(self, lane: Tensor) -> bool:
        return self._needed(lane) <= int(self._options["memory"])
