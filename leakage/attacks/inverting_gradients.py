"""Inverting Gradients: cosine distance, total variation, and Adam on the sign of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

from leakage.attacks.protocols import chosen_values
from leakage.dummies import InferredLabels, Pixels
from leakage.errors import check_not_negative, check_positive
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import CosineDistance, TotalVariation
from leakage.solvers import Continuation, GaussNewton, SignedAdam, Solver


@dataclass(frozen=True)
class InvertingGradientsProtocol:
    """Values of a protocol of :class:`InvertingGradientsAttack`; arguments with the same names override them.

    ``lr`` is None for a search by least squares, which has no learning rate.
    """

    total_variation: float
    lr: float | None
    steps: int
    start_std: float

    def __post_init__(self) -> None:
        check_not_negative(total_variation=self.total_variation)
        check_positive(start_std=self.start_std)


# For CIFAR-10. The robust values were chosen on training images, see docs/real_networks.md.
INVERTING_GRADIENTS = {
    "published": InvertingGradientsProtocol(total_variation=1e-2, lr=0.1, steps=4800, start_std=1.0),
    "robust": InvertingGradientsProtocol(total_variation=2e-1, lr=None, steps=112, start_std=0.1),
}
# Evaluations per level, and pairs of products with the Jacobian per step.
_STEPS_OF_A_LEVEL, _PRODUCTS = 4, 40


class InvertingGradientsAttack(GradientInversion):
    r"""Inverting Gradients: match the direction of the gradient with smooth images.

    .. math:: \min_{x \in [0, 1]} \; 1 - \frac{\langle \nabla_\theta \ell(f_\theta(x), y), \, g^* \rangle}
        {\lVert \nabla_\theta \ell(f_\theta(x), y) \rVert \, \lVert g^* \rVert} + \alpha \, \mathrm{TV}(x)

    ``protocol="published"`` is the paper's protocol for CIFAR-10, with :class:`~leakage.solvers.SignedAdam`; for
    ImageNet the paper takes 24,000 steps. ``"robust"`` minimises the same sum, with a differentiable total variation,
    by least squares: it runs :class:`~leakage.solvers.GaussNewton` on a smoothed network that becomes sharper in
    levels, while :math:`\alpha` decreases (:class:`~leakage.solvers.Continuation`). Each evaluation then comes with up
    to 40 products with the Jacobian; 112 such evaluations take as long as the 4,800 published ones.

    Pieces: :class:`~leakage.objectives.CosineDistance`, :class:`~leakage.objectives.TotalVariation`,
    :class:`~leakage.dummies.Pixels` in a box, :class:`~leakage.dummies.InferredLabels`, and the solver of the protocol.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        protocol: ``"published"`` or ``"robust"``.
        total_variation: :math:`\alpha`, from 1e-4 to 1e-1 in the paper; with ``"robust"`` its value at the first level.
        lr: learning rate of :class:`~leakage.solvers.SignedAdam`; ``"robust"`` has none.
        steps: evaluations of the objective.
        restarts: additional starts; the one with the lowest objective is kept.
        start_std: standard deviation of the initial noise, whose mean is 0, or grey with ``"robust"``. If given,
            ``start_std``, ``total_variation``, ``lr`` and ``steps`` override the protocol's values.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`.
        seed: seed of the starts, and of label rules that draw random numbers.
        success_threshold: an image counts as reconstructed if its MSE is below this value.
        adaptive: see :class:`~leakage.attacks.GradientInversion`.

    Raises:
        ValueError: if the protocol is unknown, a number is out of range, ``lr`` is given with ``"robust"``, or a piece
            raises it.

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
        adaptive: bool = True,
    ) -> None:
        options = {"total_variation": total_variation, "lr": lr, "steps": steps, "start_std": start_std}
        values = chosen_values(INVERTING_GRADIENTS, protocol, **options)
        if protocol == "robust" and lr is not None:
            raise ValueError(f"Expected no `lr` with protocol='robust', which has no learning rate, but got {lr!r}.")
        solver: Solver
        if values.lr is None:
            newton = GaussNewton(
                max_evaluations=values.steps, solver="cg", max_products=_PRODUCTS, spectrum=False, underdetermined=True
            )
            solver = Continuation(solver=newton, levels=max(1, values.steps // _STEPS_OF_A_LEVEL))
        else:
            solver = SignedAdam(lr=values.lr, steps=values.steps)
        super().__init__(
            objective=CosineDistance()
            + values.total_variation * TotalVariation("anisotropic" if protocol == "published" else "smooth"),
            images=Pixels("noise" if protocol == "published" else "grey", std=values.start_std, box=(0, 1)),
            labels=InferredLabels(rule, auxiliary, seed),
            solver=solver,
            restarts=restarts,
            seed=seed,
            success_threshold=success_threshold,
            adaptive=adaptive,
        )
