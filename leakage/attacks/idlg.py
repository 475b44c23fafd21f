"""Improved Deep Leakage from Gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import digest
from leakage.errors import check_choice
from leakage.inversion.gradient_inversion import GradientMatchingAttack
from leakage.labels import RULES, Auxiliary, check_label_rule, infer_labels

# Victims whose labels are inferred together, where that may take a rule that learns.
_INFERRED_AT_ONCE = 256


class IDLGAttack(GradientMatchingAttack):
    r"""iDLG: reads the labels off the last layer's gradient, then recovers the images.

    With cross-entropy and one image the gradient of the logits is :math:`p - y`, negative only at
    the true class, so the label is exact. For several images a rule of :func:`leakage.labels.infer_labels`
    tells how many there are of each class. The dummy images alone then minimise

    .. math:: D(x) = \sum_l \lVert \nabla_{\theta_l} \ell(f_\theta(x), y) - g^*_l \rVert_2^2

    with the labels y in ascending order, as the images of a batch have no order; all of them differ by their
    starts. Clients that take their images in turns (``local_batch_size``) are refused, as there the order
    matters. Labels that the shared gradient reveals are used as they are, in their order.

    Shapes: images ``(V, N, C, H, W)`` (searched without bounds; the truth lies in [0, 1]), labels ``(V, N)``.

    Args:
        rule: how labels are read, a key of :data:`leakage.labels.RULES` or ``"auto"``.
        auxiliary: images of the attacker's own, for the rules that learn from some. The hyper-parameter of that
            name is their digest, so that a checkpoint knows them again.
        options: see :class:`~leakage.attacks.GradientMatchingAttack`.

    Raises:
        ValueError: at construction, an unknown rule or other auxiliary images than an :class:`Auxiliary`; in
            ``fit``, where labels are not revealed, victims whose labels the rule can't read
            (:func:`leakage.labels.check_label_rule`) or that take their images in turns.

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

    def __init__(self, *, rule: str = "auto", auxiliary: Auxiliary | None = None, **options: Any) -> None:
        check_choice("rule", rule, (*RULES, "auto"))
        if auxiliary is not None and not isinstance(auxiliary, Auxiliary):
            raise ValueError(
                "Expected `auxiliary` to be a leakage.labels.Auxiliary (which no checkpoint holds: give it again), "
                f"but got {type(auxiliary).__name__}."
            )
        super().__init__(**options)
        self.auxiliary = auxiliary
        # Loggers and checkpoints take plain values.
        tensors = {} if auxiliary is None else vars(auxiliary)
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.save_hyperparameters({"auxiliary": digest(given) if given else None})

    def _check_victim(self, victim: Victim, *, labels_revealed: bool) -> None:
        if labels_revealed:
            return
        own = getattr(self._datamodule, "weights", None) == "own"
        check_label_rule(victim, self.hparams["rule"], auxiliary=self.auxiliary, own_weights=own)
        if victim.protocol.local_batch_size is not None:
            raise ValueError(
                "Expected victims that take all images in each local step, as inferred labels have no order, but got "
                f"`local_batch_size` {victim.protocol.local_batch_size}. Use DLGAttack, or reveal the labels "
                "(reveal_labels=True)."
            )

    def _begin(self, shared: SharedGradient) -> Tensor:
        labels = self._labels_of(shared) if shared.labels is None else shared.labels
        return F.one_hot(labels, self.victim.protocol.num_classes).to(self.dummy_images.dtype)

    def _labels_of(self, shared: SharedGradient) -> Tensor:
        """Inferred labels; where a rule may have to learn about the victims' network, of further victims as well."""
        if shared.own_weights or self.victim.protocol.num_images == 1:
            return self._infer(shared)
        if not self._inferred.keys() >= set(shared.ids.tolist()):
            more = max(0, _INFERRED_AT_ONCE - len(self._asked))
            further = self._datamodule.share([*self._asked, *self._queue[:more]])
            further = further.to(device=self.device, dtype=self.dummy_images.dtype)
            self._inferred |= dict(zip(further.ids.tolist(), self._infer(further), strict=True))
        return torch.stack([self._inferred.pop(victim) for victim in shared.ids.tolist()])

    def _infer(self, shared: SharedGradient) -> Tensor:
        options = {name: self.hparams[name] for name in ("rule", "seed")}
        return infer_labels(shared, self.victim, auxiliary=self.auxiliary, **options).labels

    def _reset(self) -> None:
        super()._reset()
        self._inferred: dict[int, Tensor] = {}  # labels of victims that no lane has had yet

    def _targets(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        return fixed

    def _labels(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        return fixed.argmax(dim=-1)
