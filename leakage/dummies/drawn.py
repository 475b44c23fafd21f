"""The random numbers that a network draws, in dropout and the like, where only the client knows them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.dummies.dummy import Dummy
from leakage.models.drawing import Draw
from leakage.pieces import State


class Drawn(Dummy):
    r"""What modules of the clients' network draw for each image: one more unknown of each victim.

    A client whose network has dropout in training mode drops units of each image by a mask that nobody is told; one
    with :class:`~leakage.defenses.PRECODE` adds noise to features. The gradient depends on both, so an attack searches
    for them together with the images: for noise as it is, and for a mask :math:`m` of units that are kept with
    probability q by its logits,

    .. math:: m = \sigma(u + \log \tfrac{q}{1 - q}),

    from about q on. Attacks make use of it by themselves, whatever their pieces are, unless they are not ``adaptive``:
    those take the network as it is in evaluation mode.

    Args:
        draws: what modules draw, by name.

    References:
        Scheliga, Mäder and Seeland, *Dropout is NOT All You Need to Prevent Gradient Leakage*, AAAI 2023,
        https://arxiv.org/abs/2208.06163, who search for masks and images together.

    Example:
        >>> from leakage import Victim
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(64, 10))
        >>> victim = Victim(model, image_shape=(1, 8, 8), num_images=2)
        >>> Drawn(victim.draws).shape(victim.protocol)
        (2, 64)
    """

    def __init__(self, draws: Mapping[str, Draw]) -> None:
        self.draws = dict(draws)

    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """``(images of all steps, D)``, where modules draw D numbers for each."""
        if not self.draws:
            return None
        # Where images are shuffled, every step is supposed to take all of them.
        size = None if protocol.shuffle else protocol.local_batch_size
        return protocol.local_steps * (size or protocol.num_images), sum(own.size for own in self.draws.values())

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """The numbers, those of masks from 0 to 1."""
        assert unknown is not None
        parts = torch.split(unknown, [own.size for own in self.draws.values()], dim=1)
        return torch.cat(
            [
                part if own.keep is None else (part + math.log(own.keep / (1 - own.keep))).sigmoid()
                for own, part in zip(self.draws.values(), parts, strict=True)
            ],
            dim=1,
        )
