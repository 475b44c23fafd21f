"""Images that are searched for pixel by pixel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form import check_layers, images_by_layers
from leakage.dummies.dummy import Images, Target, widen
from leakage.errors import check_choice, check_pair, check_positive
from leakage.pieces import Piece, State
from leakage.solvers.spectrum import ImageSpectrum

STARTS = ("noise", "grey", "rgap", "auto")
# With more images, computing the features would take longer than the search, so "auto" does not do it.
_MOST_SEPARATED = 16


class Start(Piece, ABC):
    """Base class for where the search for new victims begins."""

    def check(self, victim: Victim) -> None:
        """Raise a ``ValueError`` if this start can't be used on such victims."""

    @abstractmethod
    def __call__(self, shared: SharedGradient, victim: Victim, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        """Return the initial images, ``(V, N, C, H, W)``.

        Args:
            shared: what V victims shared.
            victim: the victims' network and protocol.
            labels: labels of the images, ``(V, N)``.
            noise: ``(V, N, C, H, W)``, the default start that this one replaces.
            seed: seed of the attack.
        """


class RGAPStart(Start):
    """R-GAP: images computed layer by layer from linear equations, clamped to [0, 1].

    If the equations of a victim have no finite solution, the start is noise. See
    :func:`leakage.closed_form.invert_layers`.

    References:
        Zhu and Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, https://arxiv.org/abs/2010.07733.
    """

    def check(self, victim: Victim) -> None:
        """Raise a ``ValueError`` if the network is no plain chain of layers, or there are too many images for it."""
        check_layers(victim)

    def __call__(self, shared: SharedGradient, victim: Victim, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        """Return the images in closed form, or the noise for victims without a solution."""
        images, usable = images_by_layers(shared, victim, labels, seed=seed)
        return images.to(noise).where(usable[:, None, None, None, None], noise)


class Pixels(Images):
    r"""Dummy images with one unknown for each pixel.

    Args:
        start: ``"noise"`` is :math:`N(0, \mathrm{std}^2)`; ``"grey"`` is 0.5 plus this noise; ``"rgap"`` is
            :class:`RGAPStart`; ``"auto"`` is ``"rgap"`` where it can be used, for up to 16 images with known labels and
            without a defense, else ``"noise"``. You can also pass your own :class:`Start`. Restarts begin at noise
            (around 0.5 for ``"grey"``) that is three times as wide each time.
        std: standard deviation of the noise.
        box: smallest and largest value of a pixel; pixels are clamped to it after each step. None for no limits.
            Images are in [0, 1].

    Raises:
        ValueError: the start is unknown, ``std`` is not positive, or ``box`` is not two numbers in ascending order; in
            ``fit``, the start can't be used on the victims.

    Example:
        >>> Pixels(box=(0, 1))
        Pixels(start='noise', std=0.01, box=(0, 1))
    """

    writes_all = True

    def __init__(self, start: str | Start = "noise", std: float = 0.01, box: tuple[float, float] | None = None) -> None:
        if not isinstance(start, Start):
            check_choice("start", start, STARTS)
        check_positive(std=std)
        if box is not None:
            box = check_pair(box=box)
            if not box[0] < box[1]:
                raise ValueError(f"Expected `box` as the smallest and largest value of a pixel, but got {box}.")
        self.start, self.std, self.box = start, std, box

    def shape(self, protocol: Protocol) -> tuple[int, ...]:
        """Return the shape ``(N, C, H, W)``."""
        return (protocol.num_images, *protocol.image_shape)

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the unknown itself."""
        assert unknown is not None
        return unknown

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Return noise, around 0.5 for ``"grey"``, three times as wide for each restart."""
        noise = widen(noise, self.std, restarts)
        return 0.5 + noise if self.start == "grey" else noise

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if the start can't be used on such victims."""
        if self.start in ("noise", "grey", "auto"):
            return
        if not target.labels_known:
            raise ValueError(
                f"Expected start='auto', 'noise' or 'grey' with labels that are searched for, but got {self.start!r}, "
                "which needs labels."
            )
        self._chosen().check(target.victim)

    def _chosen(self) -> Start:
        return self.start if isinstance(self.start, Start) else RGAPStart()

    def first_starts(
        self, starts: Tensor, shared: SharedGradient, victim: Victim, labels: Tensor | None, seed: int
    ) -> Tensor:
        """Return the first starts according to ``start``."""
        if self.start in ("noise", "grey") or labels is None:
            return starts
        if self.start == "auto":
            if victim.protocol.num_images > _MOST_SEPARATED or victim.protocol.defenses:
                return starts
            try:
                self._chosen().check(victim)
            except ValueError:
                return starts
        return self._chosen()(shared, victim, labels, starts, seed)

    def project(self) -> Callable[[Tensor], Tensor] | None:
        """Return the projection into the box, or None without a box."""
        return None if self.box is None else partial(torch.clamp, min=self.box[0], max=self.box[1])

    def preconditioner(self, protocol: Protocol) -> ImageSpectrum:
        """Return the power spectrum of natural images."""
        return ImageSpectrum(protocol.num_images, protocol.image_shape)
