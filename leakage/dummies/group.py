"""Several coupled sets of images for one victim."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.dummies.dummy import Images, Target
from leakage.dummies.pixels import Pixels
from leakage.errors import check_count, check_not_negative
from leakage.pieces import State


class Group(Images):
    r"""Several sets of images for each victim, each pulled towards their mean.

    From S starts at once, the images :math:`x_s` of a victim minimise

    .. math:: \frac{1}{S} \sum_s \bigl( L(x_s) + \alpha \, \mathrm{mean}\,(x_s - \bar x)^2 \bigr), \qquad
        \bar x = \frac{1}{S} \sum_s T_s x_s

    with L the objective of the attack and :math:`T_s` the shift (:func:`registered`) after which :math:`x_s` is
    nearest to the plain mean. :math:`\bar x` counts as a constant in derivatives. At the iterate with the lowest total,
    the result for the victim is the set with the lowest L. One evaluation costs as much as S evaluations of a single
    set.

    The paper registers by RANSAC-flow, a learnt dense flow. Here each image is shifted by whole pixels. This works
    because with known labels, the n-th images of all sets have the same label. Several images with the same label may
    be in a different order in each set, and then the mean blurs them.

    Args:
        images: the images of one set, searched for pixel by pixel.
        seeds: number of sets S, at least 2.
        weight: :math:`\alpha`; with 0 the sets are independent.

    Raises:
        ValueError: ``images`` is not a ``Pixels``, there are fewer than two sets, or the weight is negative; in
            ``fit``, ``images`` can't be used on the victims, or the solver needs a sum of squares.

    References:
        Yin et al., *See through Gradients* (GradInversion), CVPR 2021, https://arxiv.org/abs/2104.07586.

    Example:
        >>> Group(Pixels(box=(0, 1)), seeds=4).shape(Protocol((3, 32, 32), 10, num_images=2))
        (4, 2, 3, 32, 32)
    """

    def __init__(self, images: Pixels, seeds: int, weight: float = 0.01) -> None:
        if not isinstance(images, Pixels):
            raise ValueError(f"Expected `images` to be leakage.dummies.Pixels, but got {images!r}.")
        check_count(2, seeds=seeds)
        check_not_negative(weight=weight)
        self.images, self.seeds, self.weight = images, seeds, weight

    def shape(self, protocol: Protocol) -> tuple[int, ...]:
        """Return the shape ``(S, N, C, H, W)``."""
        return (self.seeds, *self.images.shape(protocol))

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the images of one set."""
        return self.images.write(unknown, kept)

    def joint(self, unknown: Tensor) -> Tensor:
        """Return the weight times the mean squared distance of ``(S, N, C, H, W)`` to the registered mean."""
        return self.weight * (unknown - registered(unknown.detach()).mean(0)).square().mean()

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Return the starts of ``images`` for each set."""
        return self.images.starts(noise, restarts)

    def first_starts(
        self, starts: Tensor, shared: SharedGradient, victim: Victim, labels: Tensor | None, seed: int
    ) -> Tensor:
        """Return the first starts of ``images`` for the first set; the other sets start from noise."""
        first = self.images.first_starts(starts[:, 0], shared, victim, labels, seed)
        return torch.cat([first[:, None], starts[:, 1:]], dim=1)

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if ``images`` can't be used on such victims."""
        self.images.check(target)

    def project(self) -> Any:
        """Return the projection into the box of ``images``, or None if there is none."""
        return self.images.project()


def registered(images: Tensor) -> Tensor:
    """Shift several versions of the same images so that each is nearest to the mean of all.

    The shift is cyclic, by whole pixels, and the same for all channels. It changes no norm, so the nearest shift is the
    one with the largest inner product with the mean. This is the peak of the cross-correlation, which Fourier
    transforms compute for all shifts at once.

    Args:
        images: ``(S, N, C, H, W)``, S versions of N images.

    Returns:
        The shifted images, of the same shape.

    Example:
        >>> image = torch.rand(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> versions = torch.cat([image, image, image, image.roll((1, -2), (-2, -1))])
        >>> torch.equal(registered(versions)[3], image[0])
        True
    """
    height, width = images.shape[-2:]
    spectra = torch.fft.rfft2(images)
    products = (spectra.mean(0) * torch.complex(spectra.real, -spectra.imag)).sum(2)
    best = torch.fft.irfft2(products, s=(height, width)).flatten(2).argmax(-1)  # (S, N)
    rows, columns = (
        (torch.arange(size, device=images.device) - shift[..., None]) % size
        for size, shift in ((height, best // width), (width, best % width))
    )
    images = images.gather(-2, rows[:, :, None, :, None].expand_as(images))
    return images.gather(-1, columns[:, :, None, None, :].expand_as(images))
