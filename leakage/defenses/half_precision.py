"""Rounding of gradients to half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients, Size, mean_square
from leakage.errors import check_choice

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class HalfPrecision(Defense):
    """Rounds every entry of the gradient to 16 bits.

    This is what mixed precision sends; it is not meant to hide anything. Entries beyond the range of ``dtype`` are
    clamped to its largest number; with ``"float16"``, entries below 6e-8 become zero.

    An attacker who knows the defense matches the shared gradient directly, because rounding errors average out.

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: ``dtype`` is neither of these.

    Example:
        >>> HalfPrecision("bfloat16")({"weight": torch.tensor([1.001, 2.3])}, torch.Generator())
        {'weight': tensor([1.0000, 2.2969])}
    """

    def __init__(self, dtype: str = "bfloat16") -> None:
        check_choice("dtype", dtype, _DTYPES)
        self.dtype = dtype

    keeps_zeros = averages_out = True

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the rounded gradients."""
        dtype = _DTYPES[self.dtype]
        largest = torch.finfo(dtype).max
        return {name: tensor.clamp(-largest, largest).to(dtype).to(tensor) for name, tensor in gradients.items()}

    def noise_variance(self, shared: Gradients, images: float) -> Tensor | float:
        """Estimate the variance of the rounding errors, which are proportional to the entries."""
        return torch.finfo(_DTYPES[self.dtype]).eps ** 2 / 24 * mean_square(shared)

    def size(self, before: Size, gradients: Gradients) -> Size:
        """Return the size with at most 16 bits for each entry."""
        return Size(before.numbers, min(before.bits, 16), before.more)
