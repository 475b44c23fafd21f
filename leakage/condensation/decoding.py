"""Several small images stored in one: more variety from the same number of pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from leakage.errors import check_count


def check_factor(factor: int, image_shape: Sequence[int]) -> None:
    """Raise a ``ValueError`` unless images ``(C, H, W)`` can be cut into ``factor`` by ``factor`` equal tiles."""
    check_count(factor=factor)
    if any(side % factor for side in image_shape[1:]):
        height, width = image_shape[1:]
        choices = [number for number in range(1, min(height, width) + 1) if not height % number and not width % number]
        raise ValueError(
            f"Expected `factor` to divide the size of the images, {height} x {width}, but got {factor}. Choose one of "
            f"{', '.join(map(str, choices))}."
        )


def decode(images: Tensor, factor: int) -> Tensor:
    r"""Decode stored images: each is cut into ``factor`` x ``factor`` tiles, which are enlarged to whole images.

    The same storage holds :math:`f^2` times as many images, at :math:`1 / f` of the resolution. Decoding is linear and
    therefore differentiable, so a condensation can learn the stored pixels.

    Args:
        images: ``(M, C, H, W)``.
        factor: f, a divisor of H and W.

    Returns:
        ``(M f^2, C, H, W)``: the tiles of each stored image in turn, row by row, enlarged bilinearly.

    Raises:
        ValueError: ``factor`` is below 1 or does not divide the size.

    References:
        Kim et al., *Dataset Condensation via Efficient Synthetic-Data Parameterization* (IDC), ICML 2022,
        https://arxiv.org/abs/2205.14959.

    Example:
        >>> import torch
        >>> decode(torch.rand(10, 3, 32, 32), 2).shape
        torch.Size([40, 3, 32, 32])
    """
    check_factor(factor, images.shape[1:])
    if factor == 1:
        return images
    count, channels, height, width = images.shape
    tiles = images.view(count, channels, factor, height // factor, factor, width // factor)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // factor, width // factor)
    return F.interpolate(tiles, size=(height, width), mode="bilinear", align_corners=False)


def encode(images: Tensor, factor: int) -> Tensor:
    """Store images ``(M f^2, C, H, W)`` as ``(M, C, H, W)``: average pooling reduces each of them to one tile.

    :func:`decode` then returns the images at 1 / f of their resolution.

    Raises:
        ValueError: ``factor`` is below 1 or does not divide the size, or the number of images is not a multiple of f^2.

    Example:
        >>> import torch
        >>> encode(torch.rand(40, 3, 32, 32), 2).shape
        torch.Size([10, 3, 32, 32])
    """
    check_factor(factor, images.shape[1:])
    if len(images) % factor**2:
        raise ValueError(f"Expected a multiple of {factor**2} images for factor {factor}, but got {len(images)}.")
    if factor == 1:
        return images
    channels, height, width = images.shape[1:]
    tiles = F.avg_pool2d(images, factor).view(-1, factor, factor, channels, height // factor, width // factor)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
