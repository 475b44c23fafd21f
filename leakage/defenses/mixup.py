"""MixUp: a client trains on mixtures of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leakage.defenses.base import Defense
from leakage.defenses.encoding import Encoding
from leakage.errors import check_positive

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.victim import Victim


class MixUp(Encoding):
    r"""Mixes each image and its label with another image of the client and its label, by a secret share.

    .. math:: \tilde x_n = \lambda x_n + (1 - \lambda) x_{\pi(n)}, \qquad
        \tilde y_n = \lambda y_n + (1 - \lambda) y_{\pi(n)}, \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with one share and one random permutation :math:`\pi` for all N images of the client.

    An attacker who knows the defense searches for the original images and for their weights in the mixtures
    (:class:`leakage.dummies.Mixture`). The gradient depends on the labels of the mixtures; where the labels of the
    client's images differ, these reveal the weights.

    Args:
        alpha: :math:`\alpha`, positive; the larger it is, the closer the share is to one half.

    Raises:
        ValueError: ``alpha`` is not positive, or the client has one image.

    References:
        Zhang et al., *mixup: Beyond Empirical Risk Minimization*, ICLR 2018, https://arxiv.org/abs/1710.09412; as a
        defense: Huang et al., *Evaluating Gradient Inversion Attacks and Defenses in Federated Learning*, NeurIPS 2021,
        https://arxiv.org/abs/2112.00059.

    Example:
        >>> from leakage import LeNet, Victim
        >>> client = Victim(LeNet(), image_shape=(1, 28, 28), num_images=4, defenses=[MixUp()])
        >>> shared = client.share(torch.rand(2, 4, 1, 28, 28), torch.tensor([[3, 1, 4, 5], [9, 2, 6, 5]]))
        >>> shared.protocol.defenses
        ({'name': 'MixUp', 'alpha': 1.0},)
    """

    mixes = True

    def __init__(self, alpha: float = 1.0) -> None:
        check_positive(alpha=alpha)
        self.alpha = alpha

    def check(self, victim: Victim, defenses: Sequence[Defense]) -> None:
        """Raise a ``ValueError`` unless clients have at least two images."""
        if victim.protocol.num_images < 2:
            raise ValueError("Expected clients of at least 2 images for MixUp, which mixes them, but got 1.")

    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the mixed images and class probabilities."""
        # Beta(a, a) is the share of one of two Gamma(a) variables, which torch can draw from a generator.
        concentration = torch.full((2,), self.alpha, dtype=torch.float64)
        draws = torch._standard_gamma(concentration, generator)
        share = float(draws[0] / draws.sum()) if float(draws.sum()) else 0.5
        order = torch.randperm(len(images), generator=generator).to(images.device)
        mixed, labels = (share * part + (1 - share) * part[order] for part in (images, targets))
        return mixed, labels
