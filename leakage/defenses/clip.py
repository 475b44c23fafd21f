"""Clipping of the gradient's norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leakage.clients.examples import shortened
from leakage.defenses.base import Defense, Gradients, whole_norm
from leakage.errors import check_positive


class Clip(Defense):
    r"""Shortens the whole gradient to the Euclidean norm C, :math:`g \cdot \min(1, C / \lVert g \rVert_2)`.

    The norm is that of all tensors together, of what the client would share: of its gradient over all its images, with
    local steps of their average. A gradient that is no longer than C stays as it is.

    An attacker who knows C does the same to the gradients of the dummies.

    Args:
        norm: C, positive.

    Raises:
        ValueError: ``norm`` is not positive and finite.

    References:
        McMahan et al., *Learning Differentially Private Recurrent Language Models*, ICLR 2018,
        https://arxiv.org/abs/1710.06963.

    Example:
        >>> Clip(1.0)({"weight": torch.tensor([3.0, 4.0])}, torch.Generator())
        {'weight': tensor([0.6000, 0.8000])}
    """

    keeps_zeros = True
    shortens = True

    def __init__(self, norm: float) -> None:
        check_positive(norm=norm)
        self.norm = norm

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """The gradients, of norm C at most."""
        norm = whole_norm(gradients)
        return {name: tensor * (self.norm / norm) if norm > self.norm else tensor for name, tensor in gradients.items()}

    def can_be_seen_after(self, later: Sequence[Defense]) -> bool:
        """Always: it is done, not read off."""
        return True

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """The gradients, of norm C at most."""
        return shortened(gradients, self.norm)
