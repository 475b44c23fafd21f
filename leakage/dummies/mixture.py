"""The weights with which clients mix their images, where they do."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.dummies.dummy import Dummy, widen
from leakage.pieces import State

# Of the logits of the start: of each image in the mixture of its place, and the standard deviation of all.
_OWN, _STD = 1.0, 0.1


class Mixture(Dummy):
    r"""Weights with which each image is in each mixture, where clients mix them: one more unknown of each victim.

    A client with :class:`~leakage.defenses.MixUp` computes with weighted means of its N images and labels and keeps the
    weights to itself. An attack searches for them by their logits,

    .. math:: \tilde x_m = \sum_n W_{mn} x_n, \qquad \tilde y_m = \sum_n W_{mn} y_n, \qquad
        W_{mn} = \frac{e^{u_{mn}}}{\sum_{n'} e^{u_{mn'}}}

    together with the images, from where each has the largest weight in one mixture on. Images of different labels are
    told apart by it; those of one label are not, as any other mixtures of them would do as well. Attacks make use of it
    by themselves, whatever their pieces are, unless they are not ``adaptive``: those find the mixtures.

    Args:
        mixes: whether the clients do.

    Example:
        >>> Mixture(True).shape(Protocol((1, 28, 28), 10, num_images=4))
        (4, 4)
    """

    def __init__(self, mixes: bool) -> None:
        self.mixes = mixes

    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """``(N, N)``, where clients mix."""
        return (protocol.num_images, protocol.num_images) if self.mixes else None

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """The weights ``(N, N)``, of which each row adds up to 1."""
        assert unknown is not None
        return unknown.softmax(1)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Near the weights of each image by itself, three times as far for each restart."""
        return widen(noise, _STD, restarts) + _OWN * torch.eye(noise.shape[-1]).to(noise)
