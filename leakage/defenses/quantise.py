"""Gradients in few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients, Size, entries, interval_variance, within
from leakage.errors import check_count, check_flag

# Up to so many bits, one less if stochastic, intervals say more than distances: on LeNet, six images, 24 against 19 dB
# with 5 bits, 27 against 26 with 6, 31 against 32 with 7; stochastic 18 against 17 with 5, 21 against 23 with 6.
_FEW_BITS = 6


class Quantise(Defense):
    r"""Rounds every entry of the gradient to one of few values, equally far from one another.

    For each tensor with its largest magnitude m they are the multiples of :math:`m / (2^{b - 1} - 1)` from -m to m;
    with one bit -m and m. With ``stochastic`` an entry between two of them becomes either, so that it is right on
    average; else the nearest.

    An attacker who knows of it asks for gradients that are rounded to the same values: those within half a step of what
    was shared, with ``stochastic`` within a whole one. From 7 bits on, with ``stochastic`` from 6, it matches what was
    shared as it is: errors of rounding average out, and images come nearer so. With 1 or 2 bits and ``stochastic`` the
    intervals are so wide that a gradient of zero is in them: what is found then is less than there is to find.

    Args:
        bits: b, from 1 to 16.
        stochastic: whether it draws.

    Raises:
        ValueError: an argument out of its range.

    References:
        Alistarh et al., *QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding*, NeurIPS 2017,
        https://arxiv.org/abs/1610.02132.

    Example:
        >>> Quantise(3)({"weight": torch.tensor([3.0, -1.2, 0.4])}, torch.Generator())
        {'weight': tensor([ 3., -1.,  0.])}
    """

    def __init__(self, bits: int, stochastic: bool = False) -> None:
        check_count(bits=bits)
        if bits > 16:
            raise ValueError(f"Expected `bits` from 1 to 16, but got {bits!r}.")
        check_flag(stochastic=stochastic)
        self.bits = bits
        self.stochastic = stochastic
        self.keeps_zeros = bits > 1
        self.averages_out = bits > _FEW_BITS - stochastic

    def _steps(self, largest: Tensor) -> Tensor:
        """How far the values are from one another."""
        return largest / (2 ** (self.bits - 1) - 1) if self.bits > 1 else 2 * largest

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """The gradients, rounded."""
        rounded = {}
        for name, tensor in gradients.items():
            exact = tensor.double()
            largest = exact.abs().amax()
            step = self._steps(largest)
            # Counted from zero, so that it stays zero exactly; with one bit there is no zero.
            least = largest if self.bits == 1 else torch.zeros_like(largest)
            places = (exact + least) / torch.where(step > 0, step, 1.0)
            if self.stochastic:
                draws = torch.rand(tensor.shape, generator=generator, dtype=torch.float32).to(exact)
                places = (places + draws).floor()
            else:
                places = places.round()
            rounded[name] = (places * step - least).clamp(-largest, largest).to(tensor)
        return rounded

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """What was shared, plus by how much gradients are outside of all that may have been rounded to it."""
        found = {}
        for name, tensor in gradients.items():
            largest = shared[name].abs().amax()
            reach = self._steps(largest) * (1.0 if self.stochastic else 0.5)
            low, high = (shared[name] - reach).clamp(min=-largest), (shared[name] + reach).clamp(max=largest)
            found[name] = within(tensor, low, high, shared[name])
        return found

    def noise_variance(self, shared: Gradients, images: int) -> Tensor | float:
        """That of errors of rounding where they average out; else little, as nothing is known but an interval."""
        if not self.averages_out:
            return interval_variance(shared)
        steps = {name: self._steps(tensor.flatten(1).abs().amax(1)) for name, tensor in shared.items()}
        squares = torch.stack([steps[name].double().square() * tensor[0].numel() for name, tensor in shared.items()])
        return squares.sum(0) / entries(shared) / (6 if self.stochastic else 12)

    def size(self, before: Size, gradients: Gradients) -> Size:
        """And the largest magnitude of each tensor."""
        return Size(before.numbers, self.bits, before.more + 32 * len(gradients))
