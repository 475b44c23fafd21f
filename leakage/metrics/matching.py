"""One-to-one matching of reconstructions and the private images of a victim."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# The limit of the MSE in the matching.
_WORST = 10.0


@torch.no_grad()
def match(reconstructed: Tensor, images: Tensor, allowed: Tensor | None = None) -> Tensor:
    r"""Match every private image of a victim with one reconstruction, at the smallest total MSE.

    A gradient does not reveal the order of the images in its batch. So every score first finds

    .. math:: \pi_v = \arg\min_\pi \sum_n \min(\mathrm{MSE}(\hat x_{v, \pi(n)}, x_{v, n}), 10)

    over all permutations (the Hungarian method). The matching is computed once, from the MSE alone, and used for every
    score. No reconstruction is used twice.

    The MSE is limited to 10, which is also the cost of NaN and infinity. Normal noise has about 1.3, so only a
    reconstruction that has diverged reaches the limit, and it gets the image that the others leave. Without
    the limit, it would dominate the sum and take the private image of a good reconstruction.

    Args:
        reconstructed: ``(V, N, C, H, W)``, any values.
        images: ``(V, N, C, H, W)``, the private images.
        allowed: ``(V, N, N)``, whether image n may be matched with reconstruction m, by default always. Other pairs are
            matched only where it can't be avoided.

    Returns:
        ``(V, N)`` int64 on the device of ``images``: the index of the reconstruction that is matched
        with image n. If N = 1, nothing is computed.

    Raises:
        ValueError: the shapes differ or are not (V, N, C, H, W), or the images are not floating-point.

    References:
        Kuhn, *The Hungarian method for the assignment problem*, 1955,
        https://doi.org/10.1002/nav.3800020109.

    Example:
        >>> images = torch.rand(1, 3, 1, 8, 8)
        >>> match(images[:, [2, 0, 1]], images)
        tensor([[1, 2, 0]])
    """
    check_images(reconstructed, images)
    victims, per_victim = images.shape[:2]
    if per_victim == 1 or not victims:
        return torch.zeros(victims, per_victim, dtype=torch.int64, device=images.device)
    costs = _costs(reconstructed.to(images.device), images)
    if allowed is not None:
        costs = costs + 2 * per_victim * _WORST * ~allowed
    order = [linear_sum_assignment(cost)[1] for cost in costs.cpu().numpy()]
    return torch.from_numpy(np.stack(order)).to(images.device, torch.int64)


def _costs(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Compute the limited MSE ``(V, image, reconstruction)`` without (V, N, N, pixels) in memory."""
    dtype = score_dtype(reconstructed, images)
    truth, found = images.flatten(2).to(dtype), reconstructed.flatten(2).to(dtype)
    # The matrix product form of the distance is inexact for small errors, and those are the ones that matter.
    distance = torch.cdist(truth, found, compute_mode="donot_use_mm_for_euclid_dist")
    mse = distance.square() / truth.shape[-1]
    return mse.nan_to_num(nan=_WORST, posinf=_WORST).clamp(max=_WORST)


def score_dtype(reconstructed: Tensor, images: Tensor) -> torch.dtype:
    """Return the type for scores, at least single precision: small squared errors vanish in half precision."""
    return torch.promote_types(torch.promote_types(reconstructed.dtype, images.dtype), torch.float32)


def check_images(reconstructed: Tensor, images: Tensor) -> None:
    """Raise a ``ValueError`` unless both are floating-point and have the same shape ``(V, N, C, H, W)``."""
    for name, tensor in (("images", images), ("reconstructed", reconstructed)):
        if not tensor.is_floating_point():
            raise ValueError(f"Expected `{name}` as floating-point numbers, but got {tensor.dtype}.")
        if tensor.ndim != 5 or not all(tensor.shape[1:]):
            raise ValueError(f"Expected `{name}` of shape (V, N, C, H, W), but got {tuple(tensor.shape)}.")
    if reconstructed.shape != images.shape:
        raise ValueError(
            f"Expected `reconstructed` of the same shape as `images`, {tuple(images.shape)}, "
            f"but got {tuple(reconstructed.shape)}."
        )
