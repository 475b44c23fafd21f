"""The second-order attack: Levenberg-Marquardt on the gradient equations."""

from __future__ import annotations

from leakage.dummies import InferredLabels, JointLabels, Labels, Pixels
from leakage.errors import check_flag, check_positive
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import SquaredDistance, Term
from leakage.solvers import GaussNewton


class GaussNewtonAttack(GradientInversion):
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

    Where a gradient is noisy or says too little, ``prior=GaussianPrior(...)`` adds what images of this kind look like.

    Pieces: :class:`~leakage.objectives.SquaredDistance`, the ``prior`` if there is one,
    :class:`~leakage.dummies.Pixels` that start where the layers lead, :class:`~leakage.dummies.InferredLabels` or
    :class:`~leakage.dummies.JointLabels`, :class:`~leakage.solvers.GaussNewton`.

    Shapes: images ``(V, N, C, H, W)`` (searched without bounds; the truth lies in [0, 1]), labels ``(V, N)``.

    Args:
        start: ``"rgap"``: what :class:`RGAPAttack` finds, for networks that it can invert; ``"noise"``: random, as
            for all restarts; ``"auto"``: the first where it can be had, for up to 16 images.
        joint_labels: search for the labels too.
        prior: a sum of squares that is added to the objective, such as :class:`~leakage.objectives.GaussianPrior`.
        restarts: further starts for a victim that ended above ``restart_above``; by default 3, and none with a
            ``prior``, of which something is always left.
        restart_above: a victim that ends above this objective may start again. Noisy or rounded gradients never fall
            below it: choose their noise's share, or ``restarts=0``.
        start_std: of the random starts.
        solver, damping, max_products, memory, underdetermined, tolerance, max_evaluations, spectrum: see
            :class:`~leakage.solvers.GaussNewton`.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`.
        seed: of the starts, and of rules that draw.
        success_threshold: an image counts as reconstructed if its MSE is below this.
        adaptive: see :class:`~leakage.attacks.GradientInversion`.

    Raises:
        ValueError: at construction, an unknown choice or a number out of its range; in ``fit``, more unknowns than
            equations, ``start="rgap"`` with a network that has no such start, and what
            :class:`~leakage.dummies.InferredLabels` raises.

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
