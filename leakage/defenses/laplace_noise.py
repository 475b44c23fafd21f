"""Laplace noise on the gradient."""

from __future__ import annotations

import torch

from leakage.defenses.gaussian_noise import Noise


class LaplaceNoise(Noise):
    r"""Adds noise to every entry of the gradient, :math:`g + \sigma \epsilon`, with more outliers than Gaussian noise.

    The density of :math:`\epsilon` is :math:`e^{-\sqrt 2 |\epsilon|} / \sqrt 2`: :math:`\sigma` is the standard
    deviation, so that it compares with :class:`GaussianNoise`, and Laplace's scale :math:`\sigma / \sqrt 2`.

    Args:
        std, relative: as for :class:`GaussianNoise`.

    Raises:
        ValueError: ``std`` is not positive and finite, or ``relative`` neither True nor False.

    References:
        Zhu et al., *Deep Leakage from Gradients*, NeurIPS 2019, section 5, https://arxiv.org/abs/1906.08935.

    Example:
        >>> noise = LaplaceNoise(0.5)
        >>> noise({"weight": torch.tensor([3.0, 4.0])}, torch.Generator().manual_seed(0))["weight"].shape
        torch.Size([2])
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Of standard deviation 1."""
        # From -1 to below 1. The sign of a number whose size is exponentially distributed.
        uniform = 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
        size = -torch.log1p(-uniform.abs().clamp(max=1 - 2**-24))
        return uniform.sign() * size / 2**0.5
