"""Improved Deep Leakage from Gradients (iDLG)."""

from __future__ import annotations

from typing import Any

from leakage.attacks.protocols import LBFGSAttack
from leakage.dummies import InferredLabels
from leakage.labels import Auxiliary


class IDLGAttack(LBFGSAttack):
    r"""iDLG: read the labels off the last layer's gradient, then recover the images.

    With cross-entropy and one image, the gradient with respect to the logits is :math:`p - y`. It is negative only at
    the true class, so the label is exact. For several images, a rule of :func:`leakage.labels.infer_labels` counts the
    images of each class. Then only the dummy images are searched for; they minimise

    .. math:: D(x) = \sum_l \lVert \nabla_{\theta_l} \ell(f_\theta(x), y) - g^*_l \rVert_2^2

    with the labels y in ascending order, because the order of images in a batch does not change the gradient. Images
    with equal labels differ only in their starts. If the shared gradient comes with its labels, they are used
    unchanged, in the given order.

    Pieces: :class:`~leakage.objectives.SquaredDistance`, :class:`~leakage.dummies.Pixels`,
    :class:`~leakage.dummies.InferredLabels`, :class:`~leakage.solvers.LBFGS` (:class:`~leakage.solvers.PlainLBFGS` with
    ``protocol="published"``).

    Shapes: images ``(V, N, C, H, W)`` (true images lie in [0, 1]; searched without bounds unless ``box`` is given),
    labels ``(V, N)``.

    Args:
        rule: how labels are inferred, a key of :data:`leakage.labels.RULES` or ``"auto"``.
        auxiliary: the attacker's own images, for label rules that need them.
        seed: seed of the starts, and of label rules that draw random numbers.
        options: other arguments, see :class:`~leakage.attacks.protocols.LBFGSAttack`.

    Raises:
        ValueError: if :class:`~leakage.dummies.InferredLabels` raises it.

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
