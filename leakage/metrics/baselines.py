"""Guesses that do not use the gradient, and a test whether a reconstruction identifies its image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from leakage.metrics.matching import check_images, score_dtype
from leakage.precision import full_precision


@torch.no_grad()
@full_precision()
def baseline_guesses(images: Tensor, public: Tensor | None = None) -> dict[str, Tensor]:
    r"""Make guesses that do not use the gradient; a reconstruction that scores no better has found nothing.

    =============== ============================================================================================
    name            guess for a private image x
    =============== ============================================================================================
    ``grey``        0.5 everywhere
    ``mean_colour`` the mean of each channel of x: only the colour is right, and an attacker does not know it
    ``mean_image``  the mean of the public images
    ``nearest``     the public image with the smallest MSE to x: the best choice if x were known
    =============== ============================================================================================

    ``mean_colour`` and ``nearest`` use the truth. They show how much of a score needs no detail, or none of this image.
    Score each guess with :func:`~leakage.metrics.score`, like a reconstruction.

    Args:
        images: ``(V, N, C, H, W)``, the private images, in [0, 1].
        public: ``(M, C, H, W)``, in [0, 1], images of the same kind without the private ones. If None, there is no
            ``mean_image`` and no ``nearest``.

    Returns:
        The guesses by name, each ``(V, N, C, H, W)``.

    Raises:
        ValueError: the shapes do not match, or the images are not floating-point.

    References:
        Geiping et al., *Inverting Gradients*, NeurIPS 2020, https://arxiv.org/abs/2003.14053, for the scale: a grey
        image has 11 to 14 dB on CIFAR-10.

    Example:
        >>> guesses = baseline_guesses(torch.rand(2, 1, 3, 8, 8), torch.rand(10, 3, 8, 8))
        >>> list(guesses), guesses["nearest"].shape
        (['grey', 'mean_colour', 'mean_image', 'nearest'], torch.Size([2, 1, 3, 8, 8]))
    """
    check_images(images, images)
    guesses = {
        "grey": torch.full_like(images, 0.5),
        "mean_colour": images.mean((-2, -1), keepdim=True).expand_as(images),
    }
    if public is not None:
        _check_others("public", public, images)
        public = public.to(images)
        guesses["mean_image"] = public.mean(0).expand_as(images)
        guesses["nearest"] = public[_distances(images.flatten(0, 1), public).argmin(1)].view_as(images)
    return guesses


@torch.no_grad()
@full_precision()
def identified(
    reconstructed: Tensor,
    images: Tensor,
    others: Tensor,
    features: nn.Module | None = None,
    classes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Return whether each reconstruction is closer to its own private image than to any of M other images.

    .. math:: \lVert \phi(\hat x) - \phi(x) \rVert < \min_m \lVert \phi(\hat x) - \phi(o_m) \rVert

    where :math:`\phi` are the pixels, or the features of a network. A random guess succeeds once in M + 1 times.

    Args:
        reconstructed: ``(V, N, C, H, W)``, any values, in the order of ``images`` (:func:`~leakage.metrics.match`).
        images: ``(V, N, C, H, W)``, the private images.
        others: ``(M, C, H, W)``, images of the same kind, none of which may be a private image.
        features: a module from images ``(B, C, H, W)`` to ``(B, ...)``, or None for the pixels. Its mode is not
            changed: call ``eval()`` first.
        classes: labels of the private images ``(V, N)`` and of the others ``(M,)``, to compare each image only with
            others of its class, or with all if there are none.

    Returns:
        ``(V, N)`` bool; False if the reconstruction contains NaN.

    Raises:
        ValueError: the shapes do not match, the images are not floating-point, or ``others`` is empty.

    Example:
        >>> images, others = torch.rand(2, 1, 3, 8, 8), torch.rand(100, 3, 8, 8)
        >>> identified(images + 0.1, images, others)
        tensor([[True],
                [True]])
    """
    check_images(reconstructed, images)
    _check_others("others", others, images)
    if classes is not None and (shapes := [tuple(one.shape) for one in classes]) != [
        images.shape[:2],
        others.shape[:1],
    ]:
        raise ValueError(
            f"Expected `classes` of shapes {[tuple(images.shape[:2]), (len(others),)]}, as the images have, but got "
            f"{shapes}."
        )
    dtype = score_dtype(reconstructed, images)
    found, truth, rest = (
        tensor.to(images.device, dtype) for tensor in (reconstructed.flatten(0, 1), images.flatten(0, 1), others)
    )
    finite = torch.isfinite(found).flatten(1).all(1)
    if features is not None:
        found, truth, rest = (features(tensor) for tensor in (found.nan_to_num(0, 0, 0), truth, rest))
        finite &= torch.isfinite(found).flatten(1).all(1)
    own = (found - truth).square().flatten(1).sum(1)
    apart = _distances(found, rest)
    if classes is not None:
        same = (classes[0].flatten()[:, None] == classes[1]).to(apart.device)
        apart = torch.where(same | ~same.any(1, keepdim=True), apart, torch.inf)
    return (finite & (own < apart.amin(1))).view(images.shape[:2])


def below_baseline(psnr: float, baselines: Mapping[str, float]) -> list[str]:
    """Return the names of the baselines with at least this PSNR; if there are any, the attack has shown nothing.

    Example:
        >>> below_baseline(12.5, {"grey": 11.7, "mean_colour": 12.7})
        ['mean_colour']
    """
    return [name for name, value in baselines.items() if not psnr > value]


def _distances(images: Tensor, others: Tensor) -> Tensor:
    """Compute the sums of squared differences ``(B, M)``; infinite where one is NaN."""
    # The matrix product form of the distance is inexact for small distances, and those are the ones that matter.
    apart = torch.cdist(images.flatten(1), others.flatten(1).to(images), compute_mode="donot_use_mm_for_euclid_dist")
    return apart.square().nan_to_num(nan=torch.inf)


def _check_others(name: str, others: Tensor, images: Tensor) -> None:
    if others.ndim != 4 or not len(others) or others.shape[1:] != images.shape[2:]:
        raise ValueError(
            f"Expected `{name}` of shape (M, C, H, W) = (M, {', '.join(map(str, images.shape[2:]))}) with at least one "
            f"image, but got {tuple(others.shape)}."
        )
    if not others.is_floating_point():
        raise ValueError(f"Expected `{name}` as floating-point numbers in [0, 1], but got {others.dtype}.")
