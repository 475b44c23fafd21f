"""Inverting Gradients."""

from __future__ import annotations

from leakage.dummies import InferredLabels, Pixels
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import CosineDistance, TotalVariation
from leakage.solvers import SignedAdam


class InvertingGradientsAttack(GradientInversion):
    r"""Inverting Gradients: the direction of the gradient, smooth images, and Adam on signs.

    .. math:: \min_{x \in [0, 1]} \; 1 - \frac{\langle \nabla_\theta \ell(f_\theta(x), y), \, g^* \rangle}
        {\lVert \nabla_\theta \ell(f_\theta(x), y) \rVert \, \lVert g^* \rVert} + \alpha \, \mathrm{TV}(x)

    The paper's values for CIFAR-10 are the defaults; on ImageNet it takes 24,000 steps.

    Pieces: :class:`~leakage.objectives.CosineDistance`, :class:`~leakage.objectives.TotalVariation`,
    :class:`~leakage.dummies.Pixels` in a box, :class:`~leakage.dummies.InferredLabels`,
    :class:`~leakage.solvers.SignedAdam`.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        total_variation: :math:`\alpha`, from 1e-4 to 1e-1 in the paper.
        lr, steps: of :class:`~leakage.solvers.SignedAdam`.
        restarts: further starts; the one of lowest objective is kept.
        start_std: of the start.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`.
        seed: of the starts, and of rules that draw.
        success_threshold: an image counts as reconstructed if its MSE is below this.

    Raises:
        ValueError: a number out of its range, and what the pieces raise.

    References:
        Geiping et al., *Inverting Gradients*, NeurIPS 2020, https://arxiv.org/abs/2003.14053.

    Example:
        >>> InvertingGradientsAttack(steps=800).objective
        CosineDistance() + 0.01 * TotalVariation(kind='anisotropic')
    """

    def __init__(
        self,
        *,
        total_variation: float = 1e-2,
        lr: float = 0.1,
        steps: int = 4800,
        restarts: int = 0,
        start_std: float = 1.0,
        rule: str = "auto",
        auxiliary: Auxiliary | None = None,
        seed: int = 0,
        success_threshold: float = 1e-3,
    ) -> None:
        super().__init__(
            objective=CosineDistance() + total_variation * TotalVariation(),
            images=Pixels(std=start_std, box=(0, 1)),
            labels=InferredLabels(rule, auxiliary, seed),
            solver=SignedAdam(lr=lr, steps=steps),
            restarts=restarts,
            seed=seed,
            success_threshold=success_threshold,
        )
