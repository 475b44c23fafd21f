"""Signs of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients, Size, interval_variance
from leakage.errors import check_flag


class Sign(Defense):
    r"""Shares the sign of every entry: 1, -1, or 0 where it is zero.

    With ``scaled`` the signs of each tensor are multiplied by the mean magnitude of its entries.

    An attacker who knows the defense searches for gradients of the same signs. The error of an entry is its distance
    from the right side of zero, in units of its tensor's root mean square.

    Args:
        scaled: whether to share the mean magnitude of each tensor.

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
        """Return the signs, multiplied by the mean magnitude of their tensor if ``scaled``."""
        sizes = {name: tensor.abs().mean() if self.scaled else 1.0 for name, tensor in gradients.items()}
        return {name: sizes[name] * tensor.sign() for name, tensor in gradients.items()}

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """Return what was shared, plus the distance by which ``gradients`` are on the wrong side of zero."""
        found = {}
        for name, tensor in gradients.items():
            squares = tensor.square().mean()
            signs = shared[name].sign()
            # A tensor of zeros counts as wrong in every sign.
            units = torch.where(squares > 0, tensor / torch.where(squares > 0, squares, 1.0).sqrt(), -signs)
            wrong = torch.where(signs == 0, units, (signs * units).clamp(max=0) * signs)
            size = shared[name].abs().amax()
            found[name] = shared[name] + wrong * torch.where(size > 0, size, 1.0)
        return found

    def noise_variance(self, shared: Gradients, images: float) -> Tensor | float:
        """Return a small variance, because only the side of zero is known for each entry."""
        return interval_variance(shared)

    def size(self, before: Size, gradients: Gradients) -> Size:
        """Return the size with one bit for each entry, and the scale of each tensor if ``scaled``."""
        return Size(before.numbers, 1, before.more + 32 * len(gradients) * self.scaled)
