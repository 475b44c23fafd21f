"""Labels: revealed, inferred before the search, or searched for together with the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form import check_separable
from leakage.dummies.dummy import Labels, Target, widen
from leakage.errors import check_flag, check_positive
from leakage.labels import Auxiliary, LabelReader, correct_labels, infer_soft_labels
from leakage.labels.soft import check_soft_labels
from leakage.pieces import State


class _FixedLabels(Labels):
    """Labels that are known before the search, as the targets of the loss: 0 or 1 without label smoothing."""

    writes_all = True

    def shape(self, protocol: Protocol) -> None:
        """Return None, because nothing is searched for."""

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the class probabilities of the known labels."""
        return kept["probabilities"]

    def state(self, protocol: Protocol, dtype: torch.dtype) -> State:
        """Return an empty ``probabilities``."""
        return {"probabilities": torch.empty(0, protocol.num_images, protocol.num_classes, dtype=dtype)}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """Return ``probabilities``, the targets of the loss for these labels."""
        labels = self._labels(shared, victim) if shared.labels is None else shared.labels
        like = next(iter(shared.gradients.values()))
        return {"probabilities": victim.protocol.targets(labels, like.dtype)}

    def _labels(self, shared: SharedGradient, victim: Victim) -> Tensor:
        raise NotImplementedError


class RevealedLabels(_FixedLabels):
    """Labels that the victims share: the attacker knows them, or inferred them elsewhere.

    Raises:
        ValueError: in ``fit``, the victims do not reveal their labels.

    Example:
        >>> RevealedLabels()
        RevealedLabels()
    """

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if the victims do not reveal their labels."""
        if not target.labels_revealed:
            raise ValueError(
                "Expected victims that reveal their labels (reveal_labels=True) for RevealedLabels, but got victims "
                "that don't. Use InferredLabels or JointLabels."
            )


class InferredLabels(_FixedLabels):
    """Labels that are inferred from the last layer's gradient before the search, unless they are revealed.

    Inferred labels are in ascending order, because the images of a batch have no order. A rule learns about a network
    once, and checkpoints keep what it learnt. The soft label of a single image is read without a rule
    (:func:`leakage.labels.infer_soft_labels`).

    Args:
        rule: a key of :data:`leakage.labels.RULES` or ``"auto"``.
        auxiliary: the attacker's own images, for the rules that learn from them.
        seed: seed of the rules that draw random numbers.
        correct: whether the gradient verifies the labels, and one wrong label of a victim is replaced before images are
            searched for (:func:`leakage.labels.correct_labels`).

    Raises:
        ValueError: the rule is unknown, ``auxiliary`` is not an :class:`~leakage.labels.Auxiliary`, or ``correct`` is
            not True or False; in ``fit``, if labels are not revealed, the rule can't infer the victims' labels, the
            last layer's gradient can't verify them, or the order of the images matters because each local step takes
            different images (``local_batch_size`` without ``shuffle``).

    References:
        Zhao, Mopuri and Bilen, *iDLG: Improved Deep Leakage from Gradients*, 2020,
        https://arxiv.org/abs/2001.02610; :func:`leakage.labels.infer_labels` has the other rules.

    Example:
        >>> InferredLabels("ilrg")
        InferredLabels(rule='ilrg', auxiliary=None, seed=0, correct=False)
    """

    def __init__(
        self, rule: str = "auto", auxiliary: Auxiliary | None = None, seed: int = 0, correct: bool = False
    ) -> None:
        check_flag(correct=correct)
        self.rule, self.auxiliary, self.seed, self.correct = rule, auxiliary, seed, correct
        self._reader = LabelReader(rule, auxiliary=auxiliary, seed=seed)

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if labels are not revealed and the rule can't infer them."""
        if target.labels_revealed:
            return
        if target.victim.protocol.label_kind == "probabilities":
            check_soft_labels(target.victim)
            return
        self._reader.check(target.victim, own_weights=target.own_weights)
        if self.correct:
            check_separable(target.victim)
        # If clients shuffle their images, their order does not matter.
        if target.victim.protocol.local_batch_size is not None and not target.victim.protocol.shuffle:
            raise ValueError(
                "Expected victims that use all images in each local step, since inferred labels have no order, but got "
                f"`local_batch_size` {target.victim.protocol.local_batch_size}. Use DLGAttack, or reveal the labels "
                "(reveal_labels=True)."
            )

    def _labels(self, shared: SharedGradient, victim: Victim) -> Tensor:
        if victim.protocol.label_kind == "probabilities":
            return infer_soft_labels(shared, victim)
        labels = self._reader(shared, victim).labels
        return correct_labels(shared, victim, labels, seed=self.seed).labels if self.correct else labels

    def learnt(self) -> dict[str, Any]:
        """Return the chosen rule and what it learnt."""
        return self._reader.state_dict()

    def load_learnt(self, learnt: dict[str, Any]) -> None:
        """Load the chosen rule and what it learnt."""
        self._reader.load_state_dict(learnt)


class JointLabels(Labels):
    """Labels that are searched for together with the images, as the softmax of unknown logits.

    The label of an image is its most probable class.

    Args:
        std: standard deviation of the normally distributed initial logits, multiplied by three for each restart.

    Raises:
        ValueError: ``std`` is not positive; in ``fit``, if the loss has class weights, which labels decide, or if
            labels are values, which need not be probabilities.

    References:
        Zhu, Liu and Han, *Deep Leakage from Gradients*, NeurIPS 2019, https://arxiv.org/abs/1906.08935.

    Example:
        >>> JointLabels().write(torch.zeros(1, 4), {})
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    writes_all = True

    def __init__(self, std: float = 0.01) -> None:
        check_positive(std=std)
        self.std = std

    @property
    def known(self) -> bool:
        """False, because labels are not known before the search."""
        return False

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if the loss has class weights or labels are values."""
        if target.victim.protocol.label_kind == "values":
            raise ValueError(
                "Expected labels that are classes or probabilities for JointLabels, but got 'values'. Reveal the "
                "labels (reveal_labels=True)."
            )
        if target.victim.protocol.class_weights is not None:
            raise ValueError(
                "Expected a loss without `class_weights` for JointLabels, as labels decide how much each image weighs, "
                "but got class weights. Use InferredLabels, or reveal the labels (reveal_labels=True)."
            )

    def shape(self, protocol: Protocol) -> tuple[int, ...]:
        """Return the shape ``(N, K)``."""
        return (protocol.num_images, protocol.num_classes)

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the softmax over classes."""
        assert unknown is not None
        return unknown.softmax(dim=-1)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Return noise, three times as wide for each restart."""
        return widen(noise, self.std, restarts)
