"""The second-order attack: Levenberg-Marquardt on the gradient equations."""

from __future__ import annotations

from leakage.dummies import InferredLabels, JointLabels, Labels, Pixels
from leakage.errors import check_flag, check_positive
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import SquaredDistance, Term
from leakage.solvers import GaussNewton


class GaussNewtonAttack(GradientInversion):
    r"""Solve the gradient equations by Levenberg-Marquardt, to float precision in a handful of steps.

    Matching a gradient is a nonlinear least-squares problem. It has one equation for each parameter of the network and
    one unknown for each pixel of the images:

    .. math:: r(x) = \bigl(\nabla_\theta \ell(f_\theta(x), y) - g^*\bigr) / \lVert g^* \rVert = 0, \qquad
        \bigl(J^\top J + \lambda \, m \, P^{-1}\bigr) \, d = -J^\top r

    where J is the Jacobian of r, :math:`\lambda` is a separate damping for each victim, and P is the typical covariance
    of images (:class:`~leakage.solvers.ImageSpectrum`). See :class:`~leakage.solvers.GaussNewton` for details. The
    objective is :math:`\lVert r \rVert^2`, as in iDLG. Each training step makes one such step for every victim in the
    lanes.

    As in iDLG, labels are either revealed or inferred by ``rule``. With ``joint_labels``, the attack searches for the
    label distribution together with the images, as in DLG.

    If a gradient is noisy or carries too little information, ``prior=GaussianPrior(...)`` adds knowledge of what such
    images look like.

    Pieces: :class:`~leakage.objectives.SquaredDistance`, the ``prior`` if there is one,
    :class:`~leakage.dummies.Pixels` that start at the layer-by-layer solution,
    :class:`~leakage.dummies.InferredLabels` or :class:`~leakage.dummies.JointLabels`,
    :class:`~leakage.solvers.GaussNewton`.

    Shapes: images ``(V, N, C, H, W)`` (searched without bounds; true images lie in [0, 1]), labels ``(V, N)``.

    Args:
        start: ``"rgap"`` starts from the result of :class:`RGAPAttack`, for networks that it can invert; ``"noise"``
            starts from random images, as all restarts do; ``"auto"`` uses ``"rgap"`` where possible, for up to 16
            images, and otherwise ``"noise"``.
        joint_labels: whether to search for the labels too.
        prior: a sum of squares to add to the objective, such as :class:`~leakage.objectives.GaussianPrior`.
        restarts: additional starts for a victim that ended above ``restart_above``. The default is 3, or 0 with a
            ``prior``, whose value never falls to zero.
        restart_above: a victim that ends above this objective may start again. With noisy or rounded gradients the
            objective never falls below the default: set it to the noise's share of the squared gradient norm, or use
            ``restarts=0``.
        start_std: standard deviation of the random starts.
        solver, damping, max_products, memory, underdetermined, tolerance, max_evaluations, spectrum: see
            :class:`~leakage.solvers.GaussNewton`.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`.
        seed: seed of the starts, and of label rules that draw random numbers.
        success_threshold: an image counts as reconstructed if its MSE is below this value.
        adaptive: see :class:`~leakage.attacks.GradientInversion`.

    Raises:
        ValueError: at construction, if a choice is unknown or a number is out of range; in ``fit``, if there are more
            unknowns than equations, if ``start="rgap"`` cannot be used with the network, or if
            :class:`~leakage.dummies.InferredLabels` raises it.

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
        prior: Term | None = None,
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
        restarts: int | None = None,
        spectrum: bool = True,
        adaptive: bool = True,
    ) -> None:
        check_flag(joint_labels=joint_labels)
        check_positive(restart_above=restart_above, start_std=start_std)
        if joint_labels and (rule != "auto" or auxiliary is not None):
            raise ValueError(
                "Expected no `rule` and no `auxiliary` with `joint_labels`, which infers no labels, but got one."
            )
        if joint_labels and start == "rgap":
            raise ValueError(
                "Expected start='auto' or 'noise' with `joint_labels`, but got 'rgap', which needs labels."
            )
        labels: Labels = JointLabels(start_std) if joint_labels else InferredLabels(rule, auxiliary, seed)
        if prior is not None and not isinstance(prior, Term):
            raise ValueError(
                "Expected `prior` to be a term of leakage.objectives, such as a GaussianPrior, but got "
                f"{type(prior).__name__}."
            )
        super().__init__(
            objective=SquaredDistance() if prior is None else SquaredDistance() + prior,
            images=Pixels(start=start, std=start_std),
            labels=labels,
            solver=GaussNewton(
                solver=solver,
                damping=damping,
                max_products=max_products,
                memory=memory,
                underdetermined=underdetermined,
                tolerance=tolerance,
                max_evaluations=max_evaluations,
                spectrum=spectrum,
                max_step=1.0,
            ),
            restarts=restarts if restarts is not None else 3 if prior is None else 0,
            restart_above=restart_above,
            seed=seed,
            success_threshold=success_threshold,
            adaptive=adaptive,
        )
