"""Laplace noise on the gradient."""

from __future__ import annotations

import torch

from leakage.defenses.gaussian_noise import Noise


class LaplaceNoise(Noise):
    r"""Adds noise to every entry of the gradient, :math:`g + \sigma \epsilon`, with more outliers than Gaussian noise.

    The density of :math:`\epsilon` is :math:`e^{-\sqrt 2 |\epsilon|} / \sqrt 2`. As in :class:`GaussianNoise`,
    :math:`\sigma` is the standard deviation; the scale of the Laplace distribution is :math:`\sigma / \sqrt 2`.

    Args:
        std, relative: as for :class:`GaussianNoise`.

    Raises:
        ValueError: ``std`` is not positive and finite, or ``relative`` is neither True nor False.

    References:
        Zhu et al., *Deep Leakage from Gradients*, NeurIPS 2019, section 5, https://arxiv.org/abs/1906.08935.

    Example:
        >>> noise = LaplaceNoise(0.5)
        >>> noise({"weight": torch.tensor([3.0, 4.0])}, torch.Generator().manual_seed(0))["weight"].shape
        torch.Size([2])
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Draw from the Laplace distribution of standard deviation 1."""
        # Uniform from -1 to below 1: it gives the sign, and an exponentially distributed magnitude.
        uniform = 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
        size = -torch.log1p(-uniform.abs().clamp(max=1 - 2**-24))
        return uniform.sign() * size / 2**0.5
