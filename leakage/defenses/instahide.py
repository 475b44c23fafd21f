"""InstaHide: a client trains on mixtures of images with secret signs of the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leakage.defenses.base import Defense
from leakage.defenses.encoding import Encoding
from leakage.errors import check_count, check_kept

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.victim import Victim


class InstaHide(Encoding):
    r"""Mixes each image with others and flips the sign of random pixels, counted from mid-grey.

    .. math:: \tilde x_n = \tfrac12 + s_n \odot \Bigl( \sum_{i=1}^{k} \lambda_{ni} x_{ni} - \tfrac12 \Bigr), \qquad
        \sum_i \lambda_{ni} = 1, \quad s_n \in \{-1, 1\}^{CHW}

    Here :math:`x_{n1}` is the client's image n, the next ones are further private images of the client, drawn at
    random, and the rest are random ``public`` images. The label is the mean of the private labels with these weights.
    In the paper, images are normalised before their signs are flipped; here they stay in [0, 1], around 1/2.

    An attacker who knows the defense searches for the encoded images and their mixed labels (``joint_labels=True`` of
    :class:`leakage.attacks.GaussNewtonAttack`). Scores compare these with the *original* images and are low;
    :func:`leakage.defenses.encoded` returns the encoded images, for scores against these. From many encodings of the
    same images, :func:`leakage.defenses.decode_instahide` recovers the originals.

    Args:
        public: ``(M, C, H, W)``, values in [0, 1], images that are mixed with the private ones; not needed if
            ``private`` is ``mixed``. It is not part of what attackers know.
        mixed: k, the number of images in a mixture, at least 2.
        private: how many of these are private.
        largest: the largest weight, above 1/k; larger ones are moved towards 1/k, with the others of their mixture.

    Raises:
        ValueError: an argument is out of its range; the client has fewer than ``private`` images; or there are no
            public images of their shape.

    References:
        Huang et al., *InstaHide: Instance-hiding Schemes for Private Distributed Learning*, ICML 2020,
        https://arxiv.org/abs/2010.02772; broken: Carlini et al., *Is Private Learning Possible with Instance
        Encoding?*, IEEE S&P 2021, https://arxiv.org/abs/2011.05315.

    Example:
        >>> hide = InstaHide(torch.rand(100, 1, 8, 8))
        >>> images, labels = hide.encode(torch.rand(2, 1, 8, 8), torch.eye(2), torch.Generator().manual_seed(0))
        >>> images.shape, labels.sum(1)
        (torch.Size([2, 1, 8, 8]), tensor([1., 1.]))
    """

    def __init__(
        self, public: Tensor | None = None, *, mixed: int = 4, private: int = 2, largest: float = 0.65
    ) -> None:
        check_count(2, mixed=mixed)
        check_count(private=private)
        check_kept(largest=largest)
        if private > mixed:
            raise ValueError(f"Expected `private` of at most `mixed` = {mixed}, but got {private}.")
        if largest * mixed <= 1:
            raise ValueError(f"Expected `largest` above 1 / `mixed` = {1 / mixed:g}, but got {largest}.")
        self.public = public
        self.mixed = mixed
        self.private = private
        self.largest = largest

    def describe(self) -> dict[str, Any]:
        """Return the description known to the attacker, which does not contain the public images."""
        return {name: value for name, value in super().describe().items() if name != "public"}

    def check(self, victim: Victim, defenses: Sequence[Defense]) -> None:
        """Raise a ``ValueError`` unless clients have enough images."""
        if victim.protocol.num_images < self.private:
            raise ValueError(
                f"Expected clients of at least {self.private} images for InstaHide, which mixes `private` = "
                f"{self.private} of them, but got {victim.protocol.num_images}."
            )

    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the encoded images and the class probabilities of their private parts."""
        others, public = self.mixed - self.private, self.public
        if others and (public is None or public.shape[1:] != images.shape[1:] or not len(public)):
            got = "none" if public is None else f"a tensor of shape {tuple(public.shape)}"
            raise ValueError(
                f"Expected `public` images (M, {', '.join(map(str, images.shape[1:]))}) for InstaHide, which mixes "
                f"{others} of them into each image, but got {got}. Pass some, or set `private` to `mixed`."
            )
        encodings, labels = [], []
        for number, image in enumerate(images):
            weights = torch.rand(self.mixed, generator=generator, dtype=torch.float64)
            excess = weights / weights.sum() - 1 / self.mixed
            excess *= min(1.0, (self.largest - 1 / self.mixed) / max(float(excess.max()), 1e-12))
            weights = (excess + 1 / self.mixed).to(images)
            order = torch.randperm(len(images), generator=generator)
            chosen = torch.cat([torch.tensor([number]), order[order != number]])[: self.private].to(images.device)
            parts = [images[chosen]]
            if others and public is not None:
                parts.append(public[torch.randint(len(public), (others,), generator=generator)].to(images))
            signs = 2 * torch.randint(2, image.shape, generator=generator).to(images) - 1
            encodings.append(0.5 + signs * (torch.tensordot(weights, torch.cat(parts), 1) - 0.5))
            own = weights[: self.private]
            labels.append(own / own.sum() @ targets[chosen])
        return torch.stack(encodings), torch.stack(labels)
