"""Clipping of the gradient to a norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leakage.clients.examples import shortened
from leakage.defenses.base import Defense, Gradients, whole_norm
from leakage.errors import check_positive


class Clip(Defense):
    r"""Clips the whole gradient to the Euclidean norm C, :math:`g \cdot \min(1, C / \lVert g \rVert_2)`.

    The norm is taken over all tensors of what the client would share: its gradient over all its images or, with local
    steps, the average over the steps. A gradient with a norm of at most C does not change.

    An attacker who knows C clips the gradients of the dummy images in the same way.

    Args:
        norm: C, the largest norm, positive.

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
        """Return the gradients, clipped to norm C."""
        norm = whole_norm(gradients)
        return {name: tensor * (self.norm / norm) if norm > self.norm else tensor for name, tensor in gradients.items()}

    def can_be_seen_after(self, later: Sequence[Defense]) -> bool:
        """Return True: clipping is repeated, not inferred from what was shared."""
        return True

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """Return the gradients, clipped to norm C."""
        return shortened(gradients, self.norm)
