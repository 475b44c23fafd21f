"""Labels: revealed, inferred before the search, or searched for together with the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.dummies.dummy import Labels, Target, widen
from leakage.errors import check_positive
from leakage.labels import Auxiliary, LabelReader
from leakage.pieces import State


class _FixedLabels(Labels):
    """Labels that are known before the search, as class probabilities of 0 and 1."""

    writes_all = True

    def shape(self, protocol: Protocol) -> None:
        """Nothing is searched for."""

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """As they are known."""
        return kept["probabilities"]

    def state(self, protocol: Protocol, dtype: torch.dtype) -> State:
        """``probabilities``."""
        return {"probabilities": torch.empty(0, protocol.num_images, protocol.num_classes, dtype=dtype)}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """One for the label of each image."""
        labels = self._labels(shared, victim) if shared.labels is None else shared.labels
        like = next(iter(shared.gradients.values()))
        return {"probabilities": F.one_hot(labels.long(), victim.protocol.num_classes).to(like.dtype)}

    def _labels(self, shared: SharedGradient, victim: Victim) -> Tensor:
        raise NotImplementedError


class RevealedLabels(_FixedLabels):
    """The labels that the shared gradient tells: an attacker who knows them, or who inferred them elsewhere.

    Raises:
        ValueError: in ``fit``, victims that don't tell them.

    Example:
        >>> RevealedLabels()
        RevealedLabels()
    """

    def check(self, target: Target) -> None:
        """They must be told."""
        if not target.labels_revealed:
            raise ValueError(
                "Expected victims that reveal their labels (reveal_labels=True) for RevealedLabels, but got some that "
                "don't. Use InferredLabels or JointLabels."
            )


class InferredLabels(_FixedLabels):
    """Labels that are read off the last layer's gradient before the search; those that are revealed are used.

    They are in ascending order, as the images of a batch have no order. What a rule learns about a network is learnt
    once, and kept in checkpoints.

    Args:
        rule: a key of :data:`leakage.labels.RULES` or ``"auto"``.
        auxiliary: images of the attacker's own, for the rules that learn from some.
        seed: of the rules that draw.

    Raises:
        ValueError: an unknown rule, other auxiliary images than an :class:`~leakage.labels.Auxiliary`; in ``fit``,
            where labels are not revealed, victims whose labels the rule can't read, or that take their images in turns
            (``local_batch_size`` without ``shuffle``), where the order matters.

    References:
        Zhao, Mopuri and Bilen, *iDLG: Improved Deep Leakage from Gradients*, 2020,
        https://arxiv.org/abs/2001.02610; :func:`leakage.labels.infer_labels` has the other rules.

    Example:
        >>> InferredLabels("ilrg")
        InferredLabels(rule='ilrg', auxiliary=None, seed=0)
    """

    def __init__(self, rule: str = "auto", auxiliary: Auxiliary | None = None, seed: int = 0) -> None:
        self.rule, self.auxiliary, self.seed = rule, auxiliary, seed
        self._reader = LabelReader(rule, auxiliary=auxiliary, seed=seed)

    def check(self, target: Target) -> None:
        """The rule must be able to read them."""
        if target.labels_revealed:
            return
        self._reader.check(target.victim, own_weights=target.own_weights)
        # Where clients shuffle their images there is no order to know.
        if target.victim.protocol.local_batch_size is not None and not target.victim.protocol.shuffle:
            raise ValueError(
                "Expected victims that take all images in each local step, as inferred labels have no order, but got "
                f"`local_batch_size` {target.victim.protocol.local_batch_size}. Use DLGAttack, or reveal the labels "
                "(reveal_labels=True)."
            )

    def _labels(self, shared: SharedGradient, victim: Victim) -> Tensor:
        return self._reader(shared, victim).labels

    def learnt(self) -> dict[str, Any]:
        """The rule that was chosen, and what it learnt."""
        return self._reader.state_dict()

    def load_learnt(self, learnt: dict[str, Any]) -> None:
        """Go on with it."""
        self._reader.load_state_dict(learnt)


class JointLabels(Labels):
    """Labels that are searched for together with the images: class probabilities are a softmax of unknown logits.

    The label of an image is the largest entry.

    Args:
        std: of the normally distributed start of the logits, three times as wide for each restart.

    Raises:
        ValueError: a ``std`` that is not positive.

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
        """Not before the search."""
        return False

    def shape(self, protocol: Protocol) -> tuple[int, ...]:
        """``(N, K)``."""
        return (protocol.num_images, protocol.num_classes)

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """The softmax over classes."""
        assert unknown is not None
        return unknown.softmax(dim=-1)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Noise, three times as wide for each restart."""
        return widen(noise, self.std, restarts)
