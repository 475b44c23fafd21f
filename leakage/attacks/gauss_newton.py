"""The second-order attack: Levenberg-Marquardt on the gradient equations."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from leakage.attacks.idlg import IDLGAttack
from leakage.attacks.rgap import check_layers, layers_start
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_choice, check_count, check_flag, check_positive
from leakage.labels import Auxiliary
from leakage.solvers import SOLVERS, GaussNewton, ImageSpectrum, PerVictimOptimizer
from leakage.solvers.normal_equations import dense_bytes

STARTS = ("auto", "rgap", "noise")
# Of more images the features take longer than all the rest, so "auto" does without.
_MOST_SEPARATED = 16
_TOLERANCE, _TOLERANCE_OF_BATCHES = 1e-11, 1e-13


class GaussNewtonAttack(IDLGAttack):
    r"""Solves the gradient equations by Levenberg-Marquardt: to float precision, in a handful of steps.

    Matching a gradient is nonlinear least squares, with as many equations as the network has parameters and as
    many unknowns as the images have pixels,

    .. math:: r(x) = \bigl(\nabla_\theta \ell(f_\theta(x), y) - g^*\bigr) / \lVert g^* \rVert = 0, \qquad
        \bigl(J^\top J + \lambda \, m \, P^{-1}\bigr) \, d = -J^\top r

    with J the Jacobian of r, :math:`\lambda` a damping of each victim's own, and P the covariance that images have
    (:class:`~leakage.solvers.ImageSpectrum`; :class:`~leakage.solvers.GaussNewton` has the details). The objective is
    :math:`\lVert r \rVert^2`, that of iDLG. One training step is one step of this kind for every victim in the lanes.

    Labels are those of iDLG: revealed, or inferred by ``rule``. With ``joint_labels`` the label distribution is
    searched for together with the images, as in DLG.

    Shapes: images ``(V, N, C, H, W)`` (searched without bounds; the truth lies in [0, 1]), labels ``(V, N)``.

    Args:
        start: ``"rgap"``: what :class:`RGAPAttack` finds, for networks that it can invert; ``"noise"``: random, as
            for all restarts; ``"auto"``: the first where it can be had, for up to 16 images.
        solver: of the linear equations, see :class:`~leakage.solvers.GaussNewton`.
        joint_labels: search for the labels too.
        damping: the first :math:`\lambda`.
        max_products: products with J of one step, before ``"auto"`` forms the Jacobian.
        memory: bytes that the Jacobian and the normal equations of one victim may take. Where they need more,
            ``"cg"`` is used, with a warning.
        underdetermined: go on where there are more unknowns than equations.
        tolerance: the objective at which a victim has converged; by default 1e-11 for one image, and 1e-13, near the
            rounding of single precision, for several, which depend more on the last digits.
        max_evaluations: steps (and one) per start.
        restarts: further starts for a victim that ended above ``restart_above``.
        restart_above: a victim that ends above this objective may start again. Noisy or rounded gradients never fall
            below it: choose their noise's share, or ``restarts=0``.
        start_std, spectrum, seed, success_threshold, rule, auxiliary: see :class:`IDLGAttack`.

    Raises:
        ValueError: at construction, an unknown choice or a number out of its range; in ``fit``, more unknowns than
            equations, ``start="rgap"`` with a network that has no such start, and what :class:`IDLGAttack` raises.

    Example:
        >>> from lightning import Trainer
        >>> from leakage.datamodules import Victims
        >>> attack = GaussNewtonAttack()
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
        ...                   enable_checkpointing=False, enable_model_summary=False)
        >>> trainer.fit(attack, datamodule=Victims("sample", victims=2))
        >>> all(score.mse < 1e-6 for score in attack.scores.values())
        True
    """

    def __init__(
        self,
        *,
        start: str = "auto",
        solver: str = "auto",
        joint_labels: bool = False,
        damping: float = 1e-2,
        max_products: int = 100,
        memory: int = 2**32,
        underdetermined: bool = False,
        rule: str = "auto",
        auxiliary: Auxiliary | None = None,
        seed: int = 0,
        success_threshold: float = 1e-3,
        restart_above: float = 1e-9,
        start_std: float = 0.01,
        tolerance: float | None = None,
        max_evaluations: int = 60,
        restarts: int = 3,
        spectrum: bool = True,
    ) -> None:
        check_choice("start", start, STARTS)
        check_choice("solver", solver, SOLVERS)
        check_flag(joint_labels=joint_labels, underdetermined=underdetermined)
        check_positive(damping=damping)
        check_count(max_products=max_products, memory=memory)
        if joint_labels and start == "rgap":
            raise ValueError(
                "Expected start='auto' or 'noise' with `joint_labels`, but got 'rgap', which needs labels."
            )
        if joint_labels and (rule != "auto" or auxiliary is not None):
            raise ValueError(
                "Expected no `rule` and no `auxiliary` with `joint_labels`, which infers no labels, but got one."
            )
        super().__init__(
            rule=rule,
            auxiliary=auxiliary,
            seed=seed,
            success_threshold=success_threshold,
            restart_above=restart_above,
            start_std=start_std,
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            restarts=restarts,
            spectrum=spectrum,
        )

    def setup(self, stage: str) -> None:
        """Make dummy label logits too, where they are searched for, and choose the tolerance."""
        super().setup(stage)
        protocol = self.victim.protocol
        if self.hparams["tolerance"] is None:
            default = _TOLERANCE if protocol.num_images == 1 else _TOLERANCE_OF_BATCHES
            self.search = dataclasses.replace(self.search, tolerance=default)
        if self.hparams["joint_labels"]:
            self.dummy_labels = nn.Parameter(
                torch.empty(0, protocol.num_images, protocol.num_classes, dtype=self.dummy_images.dtype)
            )

    def _check_victim(self, victim: Victim, *, labels_revealed: bool) -> None:
        if not self.hparams["joint_labels"]:
            super()._check_victim(victim, labels_revealed=labels_revealed)
        equations, unknowns = self._size(victim)
        if unknowns > equations and not self.hparams["underdetermined"]:
            raise ValueError(
                f"Expected at most as many unknowns as equations, but got {unknowns:,} unknowns "
                f"({self._written(victim)}) and {equations:,} equations (the network's parameters). Pass "
                "underdetermined=True to go on all the same."
            )
        if self.hparams["start"] == "rgap":
            check_layers(victim)

    def _starts_with_layers(self) -> bool:
        """Whether the first start is that of R-GAP."""
        if self.hparams["start"] != "auto":
            return bool(self.hparams["start"] == "rgap")
        if self.hparams["joint_labels"] or self.victim.protocol.num_images > _MOST_SEPARATED:
            return False
        try:
            check_layers(self.victim)
        except ValueError:
            return False
        return True

    def _size(self, victim: Victim) -> tuple[int, int]:
        """Equations and unknowns of one victim."""
        state, protocol = victim.state, victim.protocol
        unknowns = protocol.num_images * math.prod(protocol.image_shape)
        if self.hparams["joint_labels"]:
            unknowns += protocol.num_images * protocol.num_classes
        return sum(state[name].numel() for name in victim.trainable), unknowns

    def _written(self, victim: Victim) -> str:
        protocol = victim.protocol
        number = "an image" if protocol.num_images == 1 else f"{protocol.num_images} images"
        labels = " and their labels" if self.hparams["joint_labels"] else ""
        return f"{number} of {protocol.image_shape}{labels}"

    def configure_optimizers(self) -> PerVictimOptimizer:
        """Levenberg-Marquardt, without the Jacobian where it has no room."""
        protocol, solver = self.victim.protocol, self.hparams["solver"]
        needed = dense_bytes(*self._size(self.victim), self.dummy_images.element_size())
        if solver != "cg" and needed > self.hparams["memory"]:
            warnings.warn(
                f"The Jacobian and normal equations of one victim need {needed:,} bytes, `memory` is "
                f"{self.hparams['memory']:,}: the attack takes products with the Jacobian alone (solver='cg').",
                stacklevel=1,  # of this module: the command line silences those of Lightning's
            )
            solver = "cg"
        return GaussNewton(
            self._unknowns,
            equations=self._equations,
            tolerance=self.search.tolerance,
            max_evaluations=self.search.max_evaluations,
            damping=self.hparams["damping"],
            max_step=self.search.max_step,
            solver=solver,
            max_products=self.hparams["max_products"],
            memory=self.hparams["memory"],
            reference_loss=1.0,  # residuals are relative to the shared gradient, unless that is zero
            spectrum=ImageSpectrum(protocol.num_images, protocol.image_shape) if self.search.spectrum else None,
        )

    @property
    def _unknowns(self) -> list[nn.Parameter]:
        return [self.dummy_images, self.dummy_labels] if self.hparams["joint_labels"] else [self.dummy_images]

    def _begin(self, shared: SharedGradient) -> Tensor:
        return (
            torch.zeros(len(shared), 0, device=self.device) if self.hparams["joint_labels"] else super()._begin(shared)
        )

    def _targets(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        return unknowns[0].softmax(dim=-1) if unknowns else fixed

    def _labels(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        return (unknowns[0] if unknowns else fixed).argmax(dim=-1)

    def _first_starts(self, shared: SharedGradient, fixed: Tensor) -> list[Tensor]:
        starts = super()._first_starts(shared, fixed)
        if self._starts_with_layers():
            starts[0] = layers_start(shared, self.victim, fixed.argmax(dim=-1), starts[0], seed=self.hparams["seed"])
        return starts

    def _equations(self, points: Tensor, lanes: Tensor) -> Tensor:
        """Residuals ``(L, M)`` of some lanes at their unknowns ``(L, D)``."""
        assert self._shared is not None  # there are lanes
        shared = self._shared
        own = shared.own_weights
        state = {name: tensor[lanes] for name, tensor in shared.state.items()} if own else shared.state
        gradients = {name: tensor[lanes] for name, tensor in shared.gradients.items()}
        shapes = [unknown.shape[1:] for unknown in self._unknowns]

        def residuals(point: Tensor, fixed: Tensor, scale: Tensor, state: Any, shared: Any) -> Tensor:
            parts = torch.split(point, [shape.numel() for shape in shapes])
            images, *others = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
            found = self.victim.gradients(state, images, self._targets(fixed, *others))
            return scale.sqrt() * torch.cat([(found[name] - shared[name]).flatten() for name in shared])

        evaluate = vmap(residuals, in_dims=(0, 0, 0, 0 if own else None, 0))
        return evaluate(points, self._lanes["fixed"][lanes], self._lanes["scale"][lanes], state, gradients)
