"""Gradients in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients, Size, mean_square
from leakage.errors import check_choice

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class HalfPrecision(Defense):
    """Rounds every entry of the gradient to a number of 16 bits.

    Not meant to hide anything, but what mixed precision sends. Entries beyond the largest number of ``"float16"``
    become that; those below its smallest, 6e-8, become zero.

    An attacker who knows of it matches what it was sent: errors of rounding average out.

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: another ``dtype``.

    Example:
        >>> HalfPrecision("bfloat16")({"weight": torch.tensor([1.001, 2.3])}, torch.Generator())
        {'weight': tensor([1.0000, 2.2969])}
    """

    def __init__(self, dtype: str = "bfloat16") -> None:
        check_choice("dtype", dtype, _DTYPES)
        self.dtype = dtype

    keeps_zeros = averages_out = True

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """The gradients, rounded."""
        dtype = _DTYPES[self.dtype]
        largest = torch.finfo(dtype).max
        return {name: tensor.clamp(-largest, largest).to(dtype).to(tensor) for name, tensor in gradients.items()}

    def noise_variance(self, shared: Gradients, images: int) -> Tensor | float:
        """About that of errors of rounding, which grow with the entries."""
        return torch.finfo(_DTYPES[self.dtype]).eps ** 2 / 24 * mean_square(shared)

    def size(self, before: Size, gradients: Gradients) -> Size:
        """16 bits a number."""
        return Size(before.numbers, min(before.bits, 16), before.more)
