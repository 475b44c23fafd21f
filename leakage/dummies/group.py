"""Several sets of images for one victim, which help one another."""

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
    r"""Several sets of images for each victim, each pulled to what all have in common.

    From S starts, all at once, the images :math:`x_s` of a victim lower

    .. math:: \frac{1}{S} \sum_s \bigl( L(x_s) + \alpha \, \mathrm{mean}\,(x_s - \bar x)^2 \bigr), \qquad
        \bar x = \frac{1}{S} \sum_s T_s x_s

    with L the objective of the attack and :math:`T_s` the shift (:func:`registered`) after which :math:`x_s` lies
    nearest to the plain mean. :math:`\bar x` is a goal: nothing is differentiated through it. Of the iterate
    where the whole is lowest, the set of the lowest L is the victim's. One evaluation costs S of a single set.

    The paper registers by RANSAC-flow, a learnt dense flow. Here images are shifted by whole pixels, image by image:
    with labels given, the n-th images of all sets have the same label. Several images of one label may stand in
    another order in each set, where the mean blurs them.

    Args:
        images: how the images of one set are written; searched for pixel by pixel.
        seeds: S, at least 2.
        weight: :math:`\alpha`; 0 for sets that do not know one another.

    Raises:
        ValueError: something else than pixels, fewer than two sets, or a negative weight; in ``fit``, what ``images``
            says, and solvers that need an objective that is a sum of squares.

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
        """``(S, N, C, H, W)``."""
        return (self.seeds, *self.images.shape(protocol))

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """The images of one set."""
        return self.images.write(unknown, kept)

    def joint(self, unknown: Tensor) -> Tensor:
        """The weight times the mean square distance of ``(S, N, C, H, W)`` to the registered mean."""
        return self.weight * (unknown - registered(unknown.detach()).mean(0)).square().mean()

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Those of the images, a set at a time."""
        return self.images.starts(noise, restarts)

    def first_starts(
        self, starts: Tensor, shared: SharedGradient, victim: Victim, labels: Tensor | None, seed: int
    ) -> Tensor:
        """What the images say for the first set; the others start from noise."""
        first = self.images.first_starts(starts[:, 0], shared, victim, labels, seed)
        return torch.cat([first[:, None], starts[:, 1:]], dim=1)

    def check(self, target: Target) -> None:
        """As the images do."""
        self.images.check(target)

    def project(self) -> Any:
        """Into the box of the images."""
        return self.images.project()


def registered(images: Tensor) -> Tensor:
    """Several versions of some images, each shifted to where it lies nearest to the mean of all.

    The shift is by whole pixels, the same for all channels; what leaves on one side comes in on the other. As it
    changes no norm, the nearest is that of the largest inner product with the mean: the peak of the
    cross-correlation, which Fourier transforms give for all shifts at once.

    Args:
        images: ``(S, N, C, H, W)``, S versions of N images.

    Returns:
        The same shape.

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
