"""Improved Deep Leakage from Gradients."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from leakage.attacks.base import GradientMatchingAttack
from leakage.labels import check_label_rule, infer_labels
from leakage.shared_gradient import SharedGradient
from leakage.victim import Victim


class IDLGAttack(GradientMatchingAttack):
    r"""iDLG: reads the labels off the last layer's gradient, then recovers the images.

    With cross-entropy and one image the gradient of the logits is :math:`p - y`, negative only at
    the true class, so the label is exact (:func:`leakage.labels.infer_labels`). The dummy images
    alone then minimise

    .. math:: D(x) = \sum_l \lVert \nabla_{\theta_l} \ell(f_\theta(x), y) - g^*_l \rVert_2^2

    For several images per victim the labels are estimated by a greedy rule, unless the shared
    gradient reveals them, in which case they are used as they are.

    Shapes: images ``(V, N, C, H, W)`` (searched without bounds; the truth lies in [0, 1]).

    Args:
        options: see :class:`~leakage.attacks.GradientMatchingAttack`.

    Raises:
        ValueError: in ``fit``, a loss that is not cross-entropy or logits that are not the output of
            a linear layer, where labels are not revealed.

    References:
        Zhao, Mopuri and Bilen, *iDLG: Improved Deep Leakage from Gradients*, 2020,
        https://arxiv.org/abs/2001.02610.

    Example:
        >>> from lightning import Trainer
        >>> from leakage.datamodules import SampleVictims
        >>> attack = IDLGAttack(max_evaluations=3, restarts=0)
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
        ...                   enable_checkpointing=False, enable_model_summary=False)
        >>> trainer.fit(attack, datamodule=SampleVictims(victims=2))
        >>> [score.label_accuracy for score in attack.scores.values()]
        [1.0, 1.0]
    """

    def _check_victim(self, victim: Victim, *, labels_revealed: bool) -> None:
        if not labels_revealed:
            check_label_rule(victim)

    def _begin(self, shared: SharedGradient) -> Tensor:
        labels = shared.labels if shared.labels is not None else infer_labels(shared, self.victim).labels
        return F.one_hot(labels, self.victim.protocol.num_classes).to(self.dummy_images.dtype)

    def _targets(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        return fixed

    def _labels(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        return fixed.argmax(dim=-1)
