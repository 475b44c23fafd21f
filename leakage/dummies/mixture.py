"""The unknown weights with which clients mix their images."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.dummies.dummy import Dummy, widen
from leakage.pieces import State

# Initial logits: the value for each image in the mixture at its own position, and the standard deviation of all logits.
_OWN, _STD = 1.0, 0.1


class Mixture(Dummy):
    r"""The weight of each image in each mixture if clients mix their images, as another unknown of each victim.

    A client with :class:`~leakage.defenses.MixUp` trains on weighted means of its N images and labels, with secret
    weights. An attack searches for the logits of the weights,

    .. math:: \tilde x_m = \sum_n W_{mn} x_n, \qquad \tilde y_m = \sum_n W_{mn} y_n, \qquad
        W_{mn} = \frac{e^{u_{mn}}}{\sum_{n'} e^{u_{mn'}}}

    together with the images. At the start, each image has the largest weight in one mixture. The search can separate
    images with different labels, but not images with the same label, because any mixtures of them fit equally well.
    Attacks use this class automatically, whatever their pieces are. Attacks that are not ``adaptive`` treat the
    mixtures as images with a single label.

    Args:
        mixes: whether the clients mix their images.

    Example:
        >>> Mixture(True).shape(Protocol((1, 28, 28), 10, num_images=4))
        (4, 4)
    """

    def __init__(self, mixes: bool) -> None:
        self.mixes = mixes

    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """Return ``(N, N)`` if clients mix their images, else None."""
        return (protocol.num_images, protocol.num_images) if self.mixes else None

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the weights ``(N, N)``; each row adds up to 1."""
        assert unknown is not None
        return unknown.softmax(1)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Return logits near those of one image per mixture, with noise three times as wide for each restart."""
        return widen(noise, _STD, restarts) + _OWN * torch.eye(noise.shape[-1]).to(noise)
