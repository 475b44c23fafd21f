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
# Of more images the features take longer than all the rest, so "auto" does without.
_MOST_SEPARATED = 16


class Start(Piece, ABC):
    """Where the search for new victims begins."""

    def check(self, victim: Victim) -> None:
        """Raise a ``ValueError`` if it can't be used on such victims."""

    @abstractmethod
    def __call__(self, shared: SharedGradient, victim: Victim, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        """Images ``(V, N, C, H, W)``.

        Args:
            shared: what V victims shared.
            victim: their network and protocol.
            labels: ``(V, N)``.
            noise: ``(V, N, C, H, W)``, the start without this one.
            seed: of the attack.
        """


class RGAPStart(Start):
    """R-GAP: the images that follow layer by layer from linear equations, clamped to [0, 1].

    Where the equations of a victim give no numbers it is the noise. See :func:`leakage.closed_form.invert_layers`.

    References:
        Zhu and Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, https://arxiv.org/abs/2010.07733.
    """

    def check(self, victim: Victim) -> None:
        """A plain chain of layers, and no more images than the last layer's gradient can hold."""
        check_layers(victim)

    def __call__(self, shared: SharedGradient, victim: Victim, labels: Tensor, noise: Tensor, seed: int) -> Tensor:
        """In closed form."""
        images, usable = images_by_layers(shared, victim, labels, seed=seed)
        return images.to(noise).where(usable[:, None, None, None, None], noise)


class Pixels(Images):
    r"""Dummy images as they are, one unknown for each pixel.

    Args:
        start: ``"noise"``: :math:`N(0, \mathrm{std}^2)`, as for all restarts, whose noise is three times as wide each
            time; ``"grey"``: the same around 0.5; ``"rgap"``: :class:`RGAPStart`; ``"auto"``: that where it can be had,
            for up to 16 images whose labels are known and whose gradient nothing has changed; or a :class:`Start` of
            your own.
        std: of the noise.
        box: least and largest value; after each step pixels outside are put on its border. None: anywhere. Images
            lie in [0, 1].

    Raises:
        ValueError: another start, a ``std`` that is not positive, a box that is not two numbers or has no room; in
            ``fit``, a start that such networks don't have.

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
                raise ValueError(f"Expected `box` as the least and the largest value of a pixel, but got {box}.")
        self.start, self.std, self.box = start, std, box

    def shape(self, protocol: Protocol) -> tuple[int, ...]:
        """``(N, C, H, W)``."""
        return (protocol.num_images, *protocol.image_shape)

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """The unknown itself."""
        assert unknown is not None
        return unknown

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Noise, three times as wide for each restart."""
        noise = widen(noise, self.std, restarts)
        return 0.5 + noise if self.start == "grey" else noise

    def check(self, target: Target) -> None:
        """The start must be one that such networks have."""
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
        """As ``start`` says."""
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
        """Into the box."""
        return None if self.box is None else partial(torch.clamp, min=self.box[0], max=self.box[1])

    def preconditioner(self, protocol: Protocol) -> ImageSpectrum:
        """The power spectrum that images have."""
        return ImageSpectrum(protocol.num_images, protocol.image_shape)
