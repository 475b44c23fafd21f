"""A preconditioner for searches over images: the typical power spectrum of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leakage.errors import check_count

# Amplitude at spatial frequency f (cycles per two pixels): (f + _KNEE) ** -_DECAY. Natural images have a decay of about
# 1, drawings and digits less. Chosen for the fewest evaluations on victims of MNIST, FashionMNIST and CIFAR-10.
_DECAY, _KNEE = 0.7, 0.05
# Amplitude of the two opponent colours (red-green, yellow-blue) relative to that of brightness.
_COLOUR = 0.4
# Amplitude of label logits relative to that of pixels: logits move by about ten, pixels by less than one. For DLG on
# victims of MNIST, FashionMNIST and CIFAR-10, a ratio of variances of 100 to 300 needs the fewest evaluations.
_LOGIT = 10.0
# Brightness, red-green and yellow-blue, orthonormal.
_OPPONENT = ((3**-0.5, 3**-0.5, 3**-0.5), (2**-0.5, -(2**-0.5), 0.0), (6**-0.5, 6**-0.5, -2 * 6**-0.5))


class ImageSpectrum:
    r"""Multiply by the typical covariance of images: smooth brightness varies most, fine colour least.

    .. math:: P = T T^\top, \quad T = M^\top F^\top \mathrm{diag}(a),
        \quad a(f) \propto (f + 0.05)^{-0.7}

    where F is the two-dimensional cosine transform and M the rotation to opponent colours, whose two colours have 0.4
    times the amplitude (for images with three channels; otherwise M is the identity). Using P as the initial inverse
    Hessian of L-BFGS is equivalent to searching for :math:`T^{-1} x` instead of x: the objective and its minima do not
    change, but the search first moves in the directions in which images differ most. Label logits, which follow the
    pixels among the unknowns, have ten times the amplitude of pixels.

    Args:
        num_images: N, the number of images of a victim.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: if a count or size is below 1.

    References:
        Field, *Relations between the statistics of natural images and the response properties of cortical
        cells*, 1987, https://doi.org/10.1364/JOSAA.4.002379; Ruderman, Cronin and Chiao, *Statistics of cone
        responses to natural images*, 1998, https://doi.org/10.1364/JOSAA.15.002036.

    Example:
        >>> smooth, rough = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
        >>> rough[..., 1::2, ::2] = rough[..., ::2, 1::2] = -1
        >>> product = ImageSpectrum(1, (1, 8, 8))(torch.cat([smooth, rough]).flatten(1))
        >>> bool(product[0].norm() > 20 * product[1].norm())
        True
    """

    def __init__(self, num_images: int, image_shape: tuple[int, ...]) -> None:
        channels, height, width = image_shape
        check_count(num_images=num_images, channels=channels, image_height=height, image_width=width)
        self.shape = (num_images, channels, height, width)
        rows, columns = torch.arange(height) / height, torch.arange(width) / width
        amplitude = (torch.hypot(rows[:, None], columns) + _KNEE).pow(-_DECAY).double()
        amplitudes = (amplitude / amplitude.mean()).repeat(channels, 1, 1)
        if channels == 3:
            amplitudes[1:] *= _COLOUR
        mixing = torch.tensor(_OPPONENT, dtype=torch.float64)
        self._exact = [_cosines(height), _cosines(width), amplitudes.square(), mixing]
        self._used = self._exact  # with the dtype and on the device of the last vectors

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return :math:`P v` for vectors ``(V, D)`` whose first N*C*H*W entries are pixels."""
        rows, columns, power, mixing = self._matrices(vectors)
        size = math.prod(self.shape)
        images = rows @ vectors[:, :size].reshape(-1, *self.shape) @ columns.mT
        if self.shape[1] == 3:
            mixed = torch.einsum("ij,vnjhw->vnihw", mixing, images) * power
            images = torch.einsum("ij,vnihw->vnjhw", mixing, mixed)
        else:
            images = images * power
        images = rows.mT @ images @ columns
        return torch.cat([images.flatten(1), _LOGIT**2 * vectors[:, size:]], dim=1)

    def root(self, vectors: Tensor) -> Tensor:
        r"""Return :math:`T v` for vectors ``(V, D)``, from frequencies to pixels; :math:`T T^\top` is P."""
        rows, columns, power, mixing = self._matrices(vectors)
        size = math.prod(self.shape)
        images = vectors[:, :size].reshape(-1, *self.shape) * power.sqrt()
        if self.shape[1] == 3:
            images = torch.einsum("ij,vnihw->vnjhw", mixing, images)
        images = rows.mT @ images @ columns
        return torch.cat([images.flatten(1), _LOGIT * vectors[:, size:]], dim=1)

    def _matrices(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cosines of rows and columns, powers and mixing, with the dtype and on the device of ``like``."""
        if (self._used[0].dtype, self._used[0].device) != (like.dtype, like.device):
            self._used = [tensor.to(like) for tensor in self._exact]
        rows, columns, power, mixing = self._used
        return rows, columns, power, mixing


def _cosines(size: int) -> Tensor:
    """Return the orthonormal cosine transform (DCT-II) of ``size`` values, ``(frequencies, values)``."""
    frequencies, values = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    transform = torch.cos(torch.pi * frequencies * (values + 0.5) / size) * math.sqrt(2 / size)
    transform[0] /= math.sqrt(2)
    return transform
