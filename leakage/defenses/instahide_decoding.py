"""The images behind many encodings of InstaHide."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.errors import check_count, show_shape

# Steps of one start, after which hardly any pixel still changes.
_STEPS = 40
# Ridge of the weights' normal equations, and of the covariance of the public images in units of their mean variance.
# Without the latter, the covariance of 4,000 images of FashionMNIST determines too few signs.
_RIDGE, _PRIOR_RIDGE = 1e-4, 0.1
# Steps of the annealing, and its last temperature in units of the first.
_ANNEALED, _COLDEST = 300, 1e-4


@torch.no_grad()
def decode_instahide(encodings: Tensor, weights: Tensor, public: Tensor, *, starts: int = 30, seed: int = 0) -> Tensor:
    r"""Recover M images from N encodings of :class:`InstaHide`, given their weights in each.

    The signs are secret, but :math:`a_n = |\tilde x_n - \tfrac12|` does not depend on them. With :math:`u_m = x_m -
    \tfrac12`, each pixel p gives N equations for M unknowns:

    .. math:: \Bigl| \sum_m \lambda_{nm} u_m(p) \Bigr| = a_n(p)

    They are solved by guessing the signs of the left sides, solving for u by least squares, and repeating; the best of
    a few random starts is kept for each pixel. The solution is exact if N is large enough (about 5 M on images of
    FashionMNIST, M from 5 to 20), except for one sign for each pixel, which mirrors this pixel in all M images around
    mid-grey. These signs are chosen such that the images are as probable as possible under the normal distribution of
    the ``public`` images, by annealed mean-field updates.

    Limits: all mixed images must be among the M images (``private=mixed``), because unknown public images are an error
    as large as the signal. The weights must be known. If every private image has its own class, the labels of the
    encodings are the weights. Otherwise the encodings must first be clustered by the images that they share; Carlini et
    al. train a network for this, which is not part of this library.

    Args:
        encodings: ``(N, C, H, W)``, values in [0, 1], as a client computes with them.
        weights: ``(N, M)``, rows that add up to 1: the weight of each image in each encoding.
        public: ``(P, C, H, W)``, values in [0, 1], P of at least 2: the attacker's own images of the same kind.
        starts: number of starts.
        seed: seed of the random starts.

    Returns:
        The images ``(M, C, H, W)``, in the order of the columns of ``weights``, values in [0, 1].

    Raises:
        ValueError: shapes do not fit, there are fewer encodings than images, or rows of weights do not add up to 1.

    References:
        Carlini et al., *Is Private Learning Possible with Instance Encoding?*, IEEE S&P 2021, section 4,
        https://arxiv.org/abs/2011.05315.

    Example:
        >>> from leakage.defenses import InstaHide
        >>> _ = torch.manual_seed(0)
        >>> smooth = torch.nn.Upsample(scale_factor=3, mode="bilinear")
        >>> images, public = smooth(torch.rand(3, 1, 4, 4) ** 2), smooth(torch.rand(500, 1, 4, 4) ** 2)
        >>> labels = torch.eye(3)
        >>> rounds = [InstaHide(mixed=3, private=3).encode(images, labels, torch.Generator().manual_seed(seed))
        ...           for seed in range(10)]
        >>> encodings, weights = (torch.cat(parts) for parts in zip(*rounds))
        >>> found = decode_instahide(encodings, weights, public)
        >>> (found - images).square().mean() < 1e-6
        tensor(True)
    """
    _check(encodings, weights, public)
    check_count(starts=starts)
    check_count(0, seed=seed)
    amplitudes = (encodings - 0.5).abs().flatten(1)
    others = public.to(encodings).flatten(1) - 0.5
    centred = _solve(amplitudes, weights.to(amplitudes), others.mean(0), starts, seed)
    centred = centred * _signs(centred, others)
    return (centred + 0.5).clamp(0, 1).view(-1, *encodings.shape[1:])


def _solve(amplitudes: Tensor, weights: Tensor, mean: Tensor, starts: int, seed: int) -> Tensor:
    """Return ``(M, pixels)`` with the amplitudes ``(N, pixels)``, up to one sign per pixel."""
    generator = torch.Generator().manual_seed(seed)
    images = weights.shape[1]
    ridge = _RIDGE * torch.eye(images).to(weights)
    inverse = torch.linalg.solve(weights.mT @ weights + ridge, weights.mT)
    best, least = mean.expand(images, -1), torch.full_like(mean, torch.inf)
    for start in range(starts):
        found = mean.expand(images, -1)
        if start:
            found = (torch.rand(images, len(mean), generator=generator) - 0.5).to(amplitudes)
        for _ in range(_STEPS):
            found = (inverse @ ((weights @ found).sign() * amplitudes)).clamp(-0.5, 0.5)
        error = ((weights @ found).abs() - amplitudes).square().sum(0)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best


def _signs(centred: Tensor, others: Tensor) -> Tensor:
    r"""Return ``(pixels,)``, the signs for which images ``(M, pixels)`` fit the distribution of others ``(P, pixels)``.

    The sum of :math:`(s u_m - \mu)^T \Sigma^{-1} (s u_m - \mu)` over the images is minimised.
    """
    mean = others.mean(0).double()
    covariance = others.double().T.cov()
    covariance.diagonal().add_(_PRIOR_RIDGE * covariance.diagonal().mean() + torch.finfo(others.dtype).eps)
    precision = torch.linalg.inv(covariance)
    couplings = precision * (centred.double().mT @ centred.double())
    couplings.fill_diagonal_(0)
    field = (precision @ mean) * centred.double().sum(0)
    hottest = (couplings.norm(dim=1) + field.abs()).max().clamp(min=torch.finfo(torch.float64).tiny)
    spins = torch.zeros_like(field)
    for step in range(_ANNEALED):
        temperature = hottest * _COLDEST ** (step / _ANNEALED)
        spins = 0.7 * spins + 0.3 * torch.tanh((field - couplings @ spins) / temperature)
    return torch.where(spins < 0, -1.0, 1.0).to(centred)


def _check(encodings: Tensor, weights: Tensor, public: Tensor) -> None:
    if encodings.ndim != 4:
        raise ValueError(f"Expected `encodings` of shape (N, C, H, W), but got {show_shape(*encodings.shape)}.")
    if weights.ndim != 2 or len(weights) != len(encodings) or not 1 <= weights.shape[1] <= len(encodings):
        raise ValueError(
            f"Expected `weights` of shape (N, M) with N = {len(encodings)} encodings and M from 1 to N, but got "
            f"{show_shape(*weights.shape)}."
        )
    if not torch.allclose(weights.sum(1), torch.ones(()).to(weights), atol=1e-2):
        raise ValueError(
            "Expected rows of `weights` that add up to 1, as all mixed images must be decoded together, but got sums "
            f"from {float(weights.sum(1).min()):g} to {float(weights.sum(1).max()):g}."
        )
    if public.shape[1:] != encodings.shape[1:] or len(public) < 2:
        raise ValueError(
            f"Expected `public` with at least 2 images of shape {show_shape(*encodings.shape[1:])}, but got "
            f"{show_shape(*public.shape)}."
        )
