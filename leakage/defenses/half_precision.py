"""Gradients in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients, Size, within
from leakage.errors import check_choice

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Bits of the fraction, with the one that is not stored; and the exponent of the smallest normal number.
_BITS = {"bfloat16": (8, -126), "float16": (11, -14)}


class HalfPrecision(Defense):
    """Rounds every entry of the gradient to a number of 16 bits.

    Not meant to hide anything, but what mixed precision sends. Entries beyond the largest number of ``"float16"``
    become that; those below its smallest, 6e-8, become zero.

    An attacker who knows of it asks for gradients that are rounded to the same numbers.

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

    keeps_zeros = True

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """The gradients, rounded."""
        dtype = _DTYPES[self.dtype]
        largest = torch.finfo(dtype).max
        return {name: tensor.clamp(-largest, largest).to(dtype).to(tensor) for name, tensor in gradients.items()}

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """What was shared, plus by how much gradients are outside of all that is rounded to it."""
        bits, smallest = _BITS[self.dtype]
        largest = torch.finfo(_DTYPES[self.dtype]).max
        found = {}
        for name, tensor in gradients.items():
            sizes = shared[name].abs()
            fractions, exponents = torch.frexp(sizes)
            exponents = torch.where(sizes == 0, smallest, exponents - 1).clamp(min=smallest)
            half = torch.ldexp(torch.ones_like(sizes), exponents - bits)
            # Below a power of two numbers are twice as close.
            below = torch.where((fractions == 0.5) & (exponents > smallest), half / 2, half)
            above = torch.where(sizes >= largest, torch.inf, half)
            positive = shared[name] >= 0
            low = shared[name] - torch.where(positive, below, above)
            high = shared[name] + torch.where(positive, above, below)
            low, high = torch.where(sizes == 0, -half, low), torch.where(sizes == 0, half, high)
            found[name] = within(tensor, low, high, shared[name])
        return found

    def size(self, before: Size, gradients: Gradients) -> Size:
        """16 bits a number."""
        return Size(before.numbers, 16, before.more)
