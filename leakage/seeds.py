"""Seeds derived from one seed, so that every purpose has its own random stream."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

# Constants of SplitMix64 as signed numbers: the odd increment of its state, and the factors of its mixing function.
_STEP, _FACTORS = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_HALF = 2**32


def derive_seed(seed: int, index: int, stream: str) -> int:
    """Derive a separate seed for one purpose and one index, such as a victim's number or an iteration.

    Example:
        >>> derive_seed(0, 7, "weights") == derive_seed(0, 7, "weights") != derive_seed(0, 7, "start")
        True
    """
    words = [int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big"), index]
    return int(np.random.SeedSequence(seed, spawn_key=words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def hashed_normal(seeds: Tensor, steps: Tensor, size: int) -> Tensor:
    r"""Compute normally distributed numbers from the seed and step of each row and the position in it.

    No generator is used, so there is no random state to keep, and a row does not depend on the other rows.
    Number i of seed s at step t comes from 64 bits by the Box-Muller method,

    .. math:: \sqrt{-2 \ln u} \, \cos 2 \pi v, \qquad (u, v) \text{ the halves of } h(h(s + c t) + c i)

    with h the mixing function of SplitMix64 and c its increment.

    Args:
        seeds: ``(V,)``, int64.
        steps: ``(V,)``, int64.
        size: numbers per row.

    Returns:
        ``(V, size)``, float64.

    References:
        Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014,
        https://doi.org/10.1145/2660193.2660195.

    Example:
        >>> numbers = hashed_normal(torch.tensor([7, 8]), torch.tensor([1, 1]), 10_000)
        >>> float(numbers.mean().abs()) < 0.03, 0.97 < float(numbers.std()) < 1.03
        (True, True)
    """
    place = torch.arange(size, device=seeds.device)
    bits = _mixed(_mixed(seeds + _STEP * steps)[:, None] + _STEP * place)
    upper, lower = ((half & (_HALF - 1)).double() for half in (bits >> 32, bits))
    return (-2 * ((upper + 0.5) / _HALF).log()).sqrt() * (2 * math.pi / _HALF * lower).cos()


def _mixed(numbers: Tensor) -> Tensor:
    """Hash each number; int64."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        numbers = (numbers ^ _shifted(numbers, shift)) * factor
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, places: int) -> Tensor:
    """Shift to the right as if the numbers were unsigned."""
    shifted: Tensor = (numbers >> places) & (2 ** (64 - places) - 1)
    return shifted
