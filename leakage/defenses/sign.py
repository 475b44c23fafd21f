"""Only the signs of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients, Size, interval_variance
from leakage.errors import check_flag


class Sign(Defense):
    r"""Shares the sign of every entry: 1, -1, or 0 where it is zero.

    With ``scaled`` the signs of each tensor are multiplied by the mean magnitude of its entries.

    An attacker who knows of it asks for gradients of the same signs, by how much entries are on the wrong side of zero
    in units of their tensor's root mean square.

    Args:
        scaled: whether the size of the entries is shared.

    Raises:
        ValueError: ``scaled`` is neither True nor False.

    References:
        Bernstein et al., *signSGD: Compressed Optimisation for Non-Convex Problems*, ICML 2018,
        https://arxiv.org/abs/1802.04434; scaled: Karimireddy et al., *Error Feedback Fixes SignSGD*, ICML 2019,
        https://arxiv.org/abs/1901.09847.

    Example:
        >>> Sign(scaled=True)({"weight": torch.tensor([3.0, -1.0])}, torch.Generator())
        {'weight': tensor([ 2., -2.])}
    """

    keeps_zeros = True

    def __init__(self, scaled: bool = False) -> None:
        check_flag(scaled=scaled)
        self.scaled = scaled

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """The signs."""
        sizes = {name: tensor.abs().mean() if self.scaled else 1.0 for name, tensor in gradients.items()}
        return {name: sizes[name] * tensor.sign() for name, tensor in gradients.items()}

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """What was shared, plus by how much gradients are on the wrong side of zero."""
        found = {}
        for name, tensor in gradients.items():
            squares = tensor.square().mean()
            signs = shared[name].sign()
            # A tensor of zeros has none of them right.
            units = torch.where(squares > 0, tensor / torch.where(squares > 0, squares, 1.0).sqrt(), -signs)
            wrong = torch.where(signs == 0, units, (signs * units).clamp(max=0) * signs)
            size = shared[name].abs().amax()
            found[name] = shared[name] + wrong * torch.where(size > 0, size, 1.0)
        return found

    def noise_variance(self, shared: Gradients, images: int) -> Tensor | float:
        """Little, as nothing is known but on which side of zero an entry is."""
        return interval_variance(shared)

    def size(self, before: Size, gradients: Gradients) -> Size:
        """And the scale of each tensor."""
        return Size(before.numbers, 1, before.more + 32 * len(gradients) * self.scaled)
