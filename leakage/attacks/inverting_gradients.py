"""Inverting Gradients."""

from __future__ import annotations

from dataclasses import dataclass

from leakage.attacks.protocols import chosen_values
from leakage.dummies import InferredLabels, Pixels
from leakage.errors import check_not_negative, check_positive
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import CosineDistance, TotalVariation
from leakage.solvers import SignedAdam


@dataclass(frozen=True)
class InvertingGradientsProtocol:
    """The values of a protocol of :class:`InvertingGradientsAttack`, whose arguments of the same names replace them."""

    total_variation: float
    lr: float
    steps: int
    start_std: float

    def __post_init__(self) -> None:
        check_not_negative(total_variation=self.total_variation)
        check_positive(start_std=self.start_std)


# On CIFAR-10. No robust protocol: of starts, schedules, rates, weights, distances and solvers none found clearly more
# in as many steps.
INVERTING_GRADIENTS = {"published": InvertingGradientsProtocol(total_variation=1e-2, lr=0.1, steps=4800, start_std=1.0)}


class InvertingGradientsAttack(GradientInversion):
    r"""Inverting Gradients: the direction of the gradient, smooth images, and Adam on signs.

    .. math:: \min_{x \in [0, 1]} \; 1 - \frac{\langle \nabla_\theta \ell(f_\theta(x), y), \, g^* \rangle}
        {\lVert \nabla_\theta \ell(f_\theta(x), y) \rVert \, \lVert g^* \rVert} + \alpha \, \mathrm{TV}(x)

    The published protocol is the paper's for CIFAR-10; on ImageNet it takes 24,000 steps.

    Pieces: :class:`~leakage.objectives.CosineDistance`, :class:`~leakage.objectives.TotalVariation`,
    :class:`~leakage.dummies.Pixels` in a box, :class:`~leakage.dummies.InferredLabels`,
    :class:`~leakage.solvers.SignedAdam`.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        protocol: ``"published"``.
        total_variation: :math:`\alpha`, from 1e-4 to 1e-1 in the paper.
        lr, steps: of :class:`~leakage.solvers.SignedAdam`.
        restarts: further starts; the one of lowest objective is kept.
        start_std: of the start; this, weight, rate and steps replace the protocol's values.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`.
        seed: of the starts, and of rules that draw.
        success_threshold: an image counts as reconstructed if its MSE is below this.

    Raises:
        ValueError: an unknown protocol, a number out of its range, and what the pieces raise.

    References:
        Geiping et al., *Inverting Gradients*, NeurIPS 2020, https://arxiv.org/abs/2003.14053.

    Example:
        >>> InvertingGradientsAttack(steps=800).objective
        CosineDistance() + 0.01 * TotalVariation(kind='anisotropic')
    """

    def __init__(
        self,
        *,
        protocol: str = "published",
        total_variation: float | None = None,
        lr: float | None = None,
        steps: int | None = None,
        start_std: float | None = None,
        restarts: int = 0,
        rule: str = "auto",
        auxiliary: Auxiliary | None = None,
        seed: int = 0,
        success_threshold: float = 1e-3,
    ) -> None:
        options = {"total_variation": total_variation, "lr": lr, "steps": steps, "start_std": start_std}
        values = chosen_values(INVERTING_GRADIENTS, protocol, **options)
        super().__init__(
            objective=CosineDistance() + values.total_variation * TotalVariation(),
            images=Pixels(std=values.start_std, box=(0, 1)),
            labels=InferredLabels(rule, auxiliary, seed),
            solver=SignedAdam(lr=values.lr, steps=values.steps),
            restarts=restarts,
            seed=seed,
            success_threshold=success_threshold,
        )
