"""Inverting Gradients: cosine distance, total variation, and Adam on the sign of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

from leakage.attacks.protocols import chosen_values
from leakage.dummies import InferredLabels, Pixels
from leakage.errors import check_not_negative, check_positive
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import CosineDistance, FeatureDistance, Sum, TotalVariation
from leakage.solvers import SignedAdam


@dataclass(frozen=True)
class InvertingGradientsProtocol:
    """Values of a protocol of :class:`InvertingGradientsAttack`; arguments with the same names override them."""

    total_variation: float
    features: float
    lr: float
    steps: int
    start_std: float

    def __post_init__(self) -> None:
        check_not_negative(total_variation=self.total_variation, features=self.features)
        check_positive(start_std=self.start_std)


# For CIFAR-10.
INVERTING_GRADIENTS = {
    "published": InvertingGradientsProtocol(total_variation=1e-2, features=0.0, lr=0.1, steps=4800, start_std=1.0),
}


class InvertingGradientsAttack(GradientInversion):
    r"""Inverting Gradients: match the direction of the gradient with smooth images.

    .. math:: \min_{x \in [0, 1]} \; 1 - \frac{\langle \nabla_\theta \ell(f_\theta(x), y), \, g^* \rangle}
        {\lVert \nabla_\theta \ell(f_\theta(x), y) \rVert \, \lVert g^* \rVert} + \alpha \, \mathrm{TV}(x)

    ``protocol="published"`` is the paper's protocol for CIFAR-10, with :class:`~leakage.solvers.SignedAdam`; for
    ImageNet the paper takes 24,000 steps. :class:`ContinuationAttack` goes on from there, and finds more on networks
    with ReLU.

    Pieces: :class:`~leakage.objectives.CosineDistance`, :class:`~leakage.objectives.TotalVariation`,
    :class:`~leakage.dummies.Pixels` in a box, :class:`~leakage.dummies.InferredLabels`,
    :class:`~leakage.solvers.SignedAdam`.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        protocol: ``"published"``.
        total_variation: :math:`\alpha`, from 1e-4 to 1e-1 in the paper.
        features: weight of :class:`~leakage.objectives.FeatureDistance`, which keeps the images of a batch apart; the
            paper has none. About 1 is good.
        lr: learning rate of :class:`~leakage.solvers.SignedAdam`.
        steps: evaluations of the objective.
        restarts: additional starts; the one with the lowest objective is kept.
        start_std: standard deviation of the initial noise, whose mean is 0. If given, ``start_std``,
            ``total_variation``, ``features``, ``lr`` and ``steps`` override the protocol's values.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`.
        seed: seed of the starts, and of label rules that draw random numbers.
        success_threshold: an image counts as reconstructed if its MSE is below this value.
        adaptive: see :class:`~leakage.attacks.GradientInversion`.

    Raises:
        ValueError: if the protocol is unknown, a number is out of range, or a piece raises it.

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
        features: float | None = None,
        lr: float | None = None,
        steps: int | None = None,
        start_std: float | None = None,
        restarts: int = 0,
        rule: str = "auto",
        auxiliary: Auxiliary | None = None,
        seed: int = 0,
        success_threshold: float = 1e-3,
        adaptive: bool = True,
    ) -> None:
        options = {"total_variation": total_variation, "features": features, "lr": lr, "steps": steps}
        values = chosen_values(INVERTING_GRADIENTS, protocol, **options, start_std=start_std)
        super().__init__(
            objective=Sum(
                [CosineDistance(), FeatureDistance(required=False), TotalVariation()],
                [1.0, values.features, values.total_variation],
            ),
            images=Pixels(std=values.start_std, box=(0, 1)),
            labels=InferredLabels(rule, auxiliary, seed),
            solver=SignedAdam(lr=values.lr, steps=values.steps),
            restarts=restarts,
            seed=seed,
            success_threshold=success_threshold,
            adaptive=adaptive,
        )
