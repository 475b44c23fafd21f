"""Improved Deep Leakage from Gradients."""

from __future__ import annotations

from typing import Any

from leakage.attacks.protocols import LBFGSAttack
from leakage.dummies import InferredLabels
from leakage.labels import Auxiliary


class IDLGAttack(LBFGSAttack):
    r"""iDLG: reads the labels off the last layer's gradient, then recovers the images.

    With cross-entropy and one image the gradient of the logits is :math:`p - y`, negative only at
    the true class, so the label is exact. For several images a rule of :func:`leakage.labels.infer_labels`
    tells how many there are of each class. The dummy images alone then minimise

    .. math:: D(x) = \sum_l \lVert \nabla_{\theta_l} \ell(f_\theta(x), y) - g^*_l \rVert_2^2

    with the labels y in ascending order, as the images of a batch have no order; all of them differ by their
    starts. Labels that the shared gradient reveals are used as they are, in their order.

    Pieces: :class:`~leakage.objectives.SquaredDistance`, :class:`~leakage.dummies.Pixels`,
    :class:`~leakage.dummies.InferredLabels`, :class:`~leakage.solvers.LBFGS` (:class:`~leakage.solvers.PlainLBFGS` as
    published).

    Shapes: images ``(V, N, C, H, W)`` (searched without bounds; the truth lies in [0, 1]), labels ``(V, N)``.

    Args:
        rule: how labels are read, a key of :data:`leakage.labels.RULES` or ``"auto"``.
        auxiliary: images of the attacker's own, for the rules that learn from some.
        seed: of the starts, and of rules that draw.
        options: see :class:`~leakage.attacks.protocols.LBFGSAttack`.

    Raises:
        ValueError: what :class:`~leakage.dummies.InferredLabels` raises.

    References:
        Zhao, Mopuri and Bilen, *iDLG: Improved Deep Leakage from Gradients*, 2020,
        https://arxiv.org/abs/2001.02610.

    Example:
        >>> from lightning import Trainer
        >>> from leakage.datamodules import Victims
        >>> attack = IDLGAttack(max_evaluations=3, restarts=0)
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
        ...                   enable_checkpointing=False, enable_model_summary=False)
        >>> trainer.fit(attack, datamodule=Victims("sample", victims=2))
        >>> [score.label_accuracy for score in attack.scores.values()]
        [1.0, 1.0]
    """

    def __init__(
        self, *, rule: str = "auto", auxiliary: Auxiliary | None = None, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(labels=InferredLabels(rule, auxiliary, seed), seed=seed, **options)
