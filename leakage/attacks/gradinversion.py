"""GradInversion: batch recovery with BatchNorm statistics and group consistency."""

from __future__ import annotations

from dataclasses import dataclass

from leakage.attacks.protocols import chosen_values
from leakage.dummies import Group, InferredLabels, Pixels
from leakage.errors import check_count, check_not_negative, check_positive
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import L2, BatchNormStatistics, SquaredDistance, TotalVariation
from leakage.solvers import Adam


@dataclass(frozen=True)
class GradInversionProtocol:
    """Values of a protocol of :class:`GradInversionAttack`; arguments with the same names override them."""

    total_variation: float
    l2: float
    batch_norm: float
    consistency: float
    seeds: int
    noise: float
    lr: float
    steps: int
    start_std: float

    def __post_init__(self) -> None:
        check_not_negative(total_variation=self.total_variation, l2=self.l2, batch_norm=self.batch_norm)
        check_not_negative(consistency=self.consistency)
        check_count(seeds=self.seeds)
        check_positive(start_std=self.start_std)


GRAD_INVERSION = {
    "published": GradInversionProtocol(
        total_variation=1e-4,
        l2=1e-6,
        batch_norm=0.1,
        consistency=0.01,
        seeds=8,
        noise=0.2,
        lr=0.1,
        steps=20_000,
        start_std=1.0,
    ),
}


class GradInversionAttack(GradientInversion):
    r"""GradInversion: match gradient and BatchNorm statistics, from several seeds kept close to one another.

    For S seeds, the sets of images :math:`x_s` of each victim together minimise the mean over s of

    .. math:: \sum_l \lVert \nabla_{\theta_l} \ell(f_\theta(x), y) - g^*_l \rVert_2^2 + \alpha_{tv} \mathrm{TV}(x) +
        \alpha_2 \, \mathrm{mean}\,x^2 + \alpha_{bn} \sum_l \bigl( \lVert \mu_l(x) - \hat\mu_l \rVert_2 +
        \lVert \sigma^2_l(x) - \hat\sigma^2_l \rVert_2 \bigr) + \alpha_g \, \mathrm{mean}\,(x - \bar x)^2

    where :math:`\mu_l` and :math:`\sigma^2_l` are the statistics of each BatchNorm layer, and :math:`\bar x` is the
    registered mean of all seeds. Adam's steps are noisy. The result is the seed with the lowest objective. A step costs
    S evaluations of the network.

    Differences from the paper: priors are means over pixels, not sums or norms, so that their weights do not depend on
    the image size; the search is over images in [0, 1], not over normalised images; seeds are registered by whole
    pixels, not by RANSAC-flow (:class:`~leakage.dummies.Group`). The number of seeds is this library's choice.

    Pieces: :class:`~leakage.objectives.SquaredDistance`, :class:`~leakage.objectives.TotalVariation`,
    :class:`~leakage.objectives.L2`, :class:`~leakage.objectives.BatchNormStatistics`, a
    :class:`~leakage.dummies.Group` of :class:`~leakage.dummies.Pixels` in a box,
    :class:`~leakage.dummies.InferredLabels`, :class:`~leakage.solvers.Adam`.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        protocol: ``"published"``.
        total_variation, l2, batch_norm: the weights :math:`\alpha_{tv}, \alpha_2, \alpha_{bn}`; 0 leaves a term out.
            Networks without BatchNorm in evaluation mode need ``batch_norm=0``.
        consistency: :math:`\alpha_g`.
        seeds: S, the number of seeds.
        noise, lr, steps: see :class:`~leakage.solvers.Adam`; the learning rate has the schedule ``"cosine"``.
        start_std: standard deviation of the initial images.
        restarts: additional starts of all seeds; the one with the lowest objective is kept.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`; by default the paper's rule.
        seed: seed of the starts, of the noise, and of label rules that draw random numbers.
        success_threshold: an image counts as reconstructed if its MSE is below this value.
        adaptive: see :class:`~leakage.attacks.GradientInversion`.

    Raises:
        ValueError: if the protocol is unknown, a number is out of range, or a piece raises it; in ``fit``, if the
            network has no running statistics, or if there are more images than classes with the paper's label rule.

    References:
        Yin et al., *See through Gradients: Image Batch Recovery via GradInversion*, CVPR 2021,
        https://arxiv.org/abs/2104.07586.

    Example:
        >>> GradInversionAttack(seeds=4).images
        Group(images=Pixels(start='noise', std=1.0, box=(0, 1)), seeds=4, weight=0.01)
    """

    def __init__(
        self,
        *,
        protocol: str = "published",
        total_variation: float | None = None,
        l2: float | None = None,
        batch_norm: float | None = None,
        consistency: float | None = None,
        seeds: int | None = None,
        noise: float | None = None,
        lr: float | None = None,
        steps: int | None = None,
        start_std: float | None = None,
        restarts: int = 0,
        rule: str = "row_minimum",
        auxiliary: Auxiliary | None = None,
        seed: int = 0,
        success_threshold: float = 1e-3,
        adaptive: bool = True,
    ) -> None:
        weights = {"total_variation": total_variation, "l2": l2, "batch_norm": batch_norm, "consistency": consistency}
        search = {"seeds": seeds, "noise": noise, "lr": lr, "steps": steps, "start_std": start_std}
        values = chosen_values(GRAD_INVERSION, protocol, **weights, **search)
        pixels = Pixels(std=values.start_std, box=(0, 1))
        super().__init__(
            objective=SquaredDistance(relative=False)
            + values.total_variation * TotalVariation()
            + values.l2 * L2()
            + values.batch_norm * BatchNormStatistics(),
            images=pixels if values.seeds == 1 else Group(pixels, values.seeds, values.consistency),
            labels=InferredLabels(rule, auxiliary, seed),
            solver=Adam(lr=values.lr, steps=values.steps, schedule="cosine", noise=values.noise),
            restarts=restarts,
            seed=seed,
            success_threshold=success_threshold,
            adaptive=adaptive,
        )
