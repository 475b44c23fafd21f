"""Continuation: least squares on a smoothed network that becomes the real one, and a finish without priors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from leakage.dummies import InferredLabels, Pixels
from leakage.errors import check_count, check_not_negative
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import CosineDistance, FeatureDistance, Sum, TotalVariation
from leakage.solvers import Continuation, GaussNewton, SignedAdam

# Chosen on training images of CIFAR-10, see docs/real_networks.md.
TOTAL_VARIATION, FEATURES, START_STD, START_STEPS, EVALUATIONS = (0.02, 0.2), 0.1, 0.1, 600, 56
# First and last sharpness, evaluations of a level, and pairs of products with the Jacobian in one of its steps.
_SHARPNESS, _LEVEL, _PRODUCTS = (5.0, 200.0), 4, 30
# The finish: evaluations, products after which a Jacobian is formed if there are no kinks, the bytes that it may take,
# and the objective at which the search ends.
_FINISH: dict[str, Any] = {"max_evaluations": 40, "max_products": 60, "memory": 2**30, "tolerance": 1e-13}
# A victim that ends below this objective is not restarted.
_SOLVED = 1e-10


class ContinuationAttack(GradientInversion):
    r"""Continuation: solve the gradient equations of a smoothed network, and follow the solution to the real one.

    .. math:: \min_{x \in [0, 1]} \; 1 - \cos\bigl(\nabla_\theta \ell(f_\theta^{(s)}(x), y), \, g^*\bigr)
        + \gamma \, d\bigl(h(x), \hat h\bigr) + \alpha \, w(s) \, \mathrm{TV}(x)

    Gradients of networks with ReLU or max pooling do not show how far a unit is from its kink, so searches get stuck
    where units have the wrong sign. Here the attacker smooths the kinks (:func:`~leakage.clients.smoothing.smoothed`).
    The sharpness s grows in levels from 5 to 200, while the weight :math:`\alpha \, w(s)` of the prior fades
    (:class:`~leakage.solvers.Continuation`). Each level takes a few steps of Levenberg-Marquardt
    (:class:`~leakage.solvers.GaussNewton`), with up to 30 products with the Jacobian. Before them, the *start* takes
    600 steps of :class:`InvertingGradientsAttack` on the network as it is, with the full prior. After them, the
    *finish* takes further steps of least squares on the network as it is, without the prior, and keeps an image only
    if it matches the gradient better.

    Trained networks need a stronger prior than untrained ones. So each victim is searched for twice, with two weights.
    The result is the mean of what both find, in which the image that matches the gradient better at the end has the
    larger weight (``combine``). If a defense has changed the gradients, there is no finish, and both searches have the
    larger weight of the prior.

    Every image of a batch also matches its own features :math:`\hat h`, which the gradient of the last layer gives away
    (:class:`~leakage.objectives.FeatureDistance`). Without them, images of a batch blend into one another. Victims
    whose features can't be separated are searched for without this term.

    A network without kinks needs no continuation: all steps are those of the finish, which end at float precision if
    the gradient determines the image well enough.

    On a small ResNet, searches get stuck at other images, and the mean of several is mostly better than each.
    Batches on networks without kinks are better attacked by :class:`GaussNewtonAttack`, which can start layer by layer.

    Pieces: :class:`~leakage.objectives.CosineDistance`, :class:`~leakage.objectives.FeatureDistance`,
    :class:`~leakage.objectives.TotalVariation`, :class:`~leakage.dummies.Pixels` in a box,
    :class:`~leakage.dummies.InferredLabels`, :class:`~leakage.solvers.Continuation`.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        total_variation: :math:`\alpha`, the weight of the prior in the start and at the first level. With several
            weights there are as many searches.
        features: :math:`\gamma`, the weight of the features; 0 leaves them out.
        start_steps: steps of the start; 0 for none.
        max_evaluations: evaluations of the objective at the levels; the finish takes up to 40 more, and all of them if
            there are no kinks.
        start_std: standard deviation of the noise around grey that the search starts from.
        unsmoothed: see :class:`~leakage.solvers.Continuation`: ``"keep"`` or ``"refuse"``.
        restarts: additional searches, which take the weights in turn; by default one search for each weight; 0
            for the first weight alone. Victims that are solved are not restarted. On a small ResNet,
            ``restarts=3`` finds more.
        combine: see :class:`~leakage.attacks.GradientInversion`: ``"mean"`` or ``"best"``.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`.
        seed: seed of the starts, and of label rules that draw random numbers.
        success_threshold: an image counts as reconstructed if its MSE is below this value.
        adaptive: see :class:`~leakage.attacks.GradientInversion`.

    Raises:
        ValueError: if a number is out of range, or a piece raises it.

    References:
        Allgower and Georg, *Numerical Continuation Methods*, 1990, https://doi.org/10.1007/978-3-642-61257-2; Geiping
        et al., *Inverting Gradients*, NeurIPS 2020, https://arxiv.org/abs/2003.14053, for the objective.

    Example:
        >>> ContinuationAttack(max_evaluations=70).solver.levels
        17
    """

    def __init__(
        self,
        *,
        total_variation: float | Sequence[float] = TOTAL_VARIATION,
        features: float = FEATURES,
        start_std: float = START_STD,
        start_steps: int = START_STEPS,
        max_evaluations: int = EVALUATIONS,
        unsmoothed: str = "keep",
        restarts: int | None = None,
        combine: str = "mean",
        rule: str = "auto",
        auxiliary: Auxiliary | None = None,
        seed: int = 0,
        success_threshold: float = 1e-3,
        adaptive: bool = True,
    ) -> None:
        weights = (total_variation,) if isinstance(total_variation, int | float) else tuple(total_variation)
        if not weights:
            raise ValueError("Expected `total_variation` with at least one weight, but got none.")
        for weight in weights:
            check_not_negative(total_variation=weight)
        check_not_negative(features=features)
        check_count(0, start_steps=start_steps)
        newton = partial(GaussNewton, spectrum=False, underdetermined=True)
        strongest = max(weights)
        super().__init__(
            objective=Sum(
                [CosineDistance(), FeatureDistance(required=False), TotalVariation("smooth")],
                [1.0, features, strongest],
            ),
            images=Pixels("grey", std=start_std, box=(0, 1)),
            labels=InferredLabels(rule, auxiliary, seed),
            solver=Continuation(
                solver=newton(solver="cg", max_evaluations=max_evaluations, max_products=_PRODUCTS),
                levels=max(1, max_evaluations // _LEVEL),
                sharpness=_SHARPNESS,
                finish=newton(**_FINISH),
                start=SignedAdam(steps=start_steps) if start_steps else None,
                unsmoothed=unsmoothed,
                strengths=tuple(weight / strongest for weight in weights) if strongest else (1.0,),
            ),
            restarts=len(weights) - 1 if restarts is None else restarts,
            restart_above=_SOLVED,
            combine=combine,
            seed=seed,
            success_threshold=success_threshold,
            adaptive=adaptive,
        )
