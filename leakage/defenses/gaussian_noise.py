"""Gaussian noise on the gradient, and the base class of noise."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients, Size, mean_square, whole_norm
from leakage.errors import check_flag, check_positive


class Noise(Defense):
    """Base class of defenses that add independent noise to every entry of the gradient.

    An attacker who knows the defense still matches the shared gradient directly, because the noise has a mean of zero.
    """

    averages_out = True

    def __init__(self, std: float, relative: bool = False) -> None:
        check_positive(std=std)
        check_flag(relative=relative)
        self.std = std
        self.relative = relative

    @abstractmethod
    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw numbers of mean 0 and standard deviation 1, in single precision on the CPU."""

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradients with noise added."""
        std = self.std
        if self.relative:
            std *= whole_norm(gradients) / sum(tensor.numel() for tensor in gradients.values()) ** 0.5
        return {
            name: tensor + std * self.draw(tensor.shape, generator).to(tensor) for name, tensor in gradients.items()
        }

    def noise_variance(self, shared: Gradients, images: float) -> Tensor | float:
        """Return the variance of the noise; with ``relative``, estimated from the mean square of the noisy gradient."""
        variance = self.std**2
        return variance / (1 + variance) * mean_square(shared) if self.relative else variance

    def size(self, before: Size, gradients: Gradients) -> Size:
        """Return the size of all entries: noise undoes savings of earlier defenses."""
        return Size.of(gradients)


class GaussianNoise(Noise):
    r"""Adds noise to every entry of the gradient, :math:`g + \sigma \epsilon` with :math:`\epsilon \sim N(0, 1)`.

    With ``relative`` the standard deviation is :math:`\sigma \cdot \mathrm{rms}(g)`, with the root mean square over all
    D entries of the whole gradient, :math:`\mathrm{rms}(g) = \lVert g \rVert_2 / \sqrt{D}`.

    The noise depends on the generator, which :meth:`leakage.Victim.share` seeds by its ``seed`` and the victim's id.
    Rounds that are shared with the same seed have the same noise, which cancels in their difference: use a different
    seed for each round.

    Args:
        std: :math:`\sigma`, positive.
        relative: whether ``std`` is in units of the gradient's root mean square.

    Raises:
        ValueError: ``std`` is not positive and finite, or ``relative`` is neither True nor False.

    References:
        Zhu et al., *Deep Leakage from Gradients*, NeurIPS 2019, section 5, https://arxiv.org/abs/1906.08935.

    Example:
        >>> noise = GaussianNoise(0.5, relative=True)
        >>> noise({"weight": torch.tensor([3.0, 4.0])}, torch.Generator().manual_seed(0))
        {'weight': tensor([5.7240, 3.4814])}
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw from the standard normal distribution."""
        return torch.randn(shape, generator=generator, dtype=torch.float32)
