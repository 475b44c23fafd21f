"""The random numbers that a client's network draws, in dropout for example, and that only the client knows."""

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
    r"""The random numbers that the client's network draws for each image, as another unknown of each victim.

    A client whose network has dropout in training mode drops units of each image by a secret mask. A client with
    :class:`~leakage.defenses.PRECODE` adds noise to features. The gradient depends on mask and noise, so an attack
    searches for them together with the images. The unknown is the noise itself. For a mask :math:`m` of units that are
    kept with probability q, the unknown u holds shifted logits,

    .. math:: m = \sigma(u + \log \tfrac{q}{1 - q}),

    so that the search starts near q. Attacks use this class automatically, whatever their pieces are. Attacks that are
    not ``adaptive`` use the network in evaluation mode instead.

    Args:
        draws: what the modules draw, by module name.

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
        """Return ``(images of all steps, D)`` if modules draw D numbers per image, or None if they draw none."""
        if not self.draws:
            return None
        # If images are shuffled, every step is assumed to take all of them.
        size = None if protocol.shuffle else protocol.local_batch_size
        return protocol.local_steps * (size or protocol.num_images), sum(own.size for own in self.draws.values())

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the drawn numbers; entries of masks are from 0 to 1."""
        assert unknown is not None
        parts = torch.split(unknown, [own.size for own in self.draws.values()], dim=1)
        return torch.cat(
            [
                part if own.keep is None else (part + math.log(own.keep / (1 - own.keep))).sigmoid()
                for own, part in zip(self.draws.values(), parts, strict=True)
            ],
            dim=1,
        )
