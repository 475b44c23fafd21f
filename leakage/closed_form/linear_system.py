"""Linear least squares for the inputs of a convolution or linear layer, for many victims at once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.clients.chain import Geometry
from leakage.solvers.linear import select_lanes
from leakage.solvers.spectrum import ImageSpectrum

# Largest number of unknowns of one channel for which a dense preconditioner pays off, and least number of channels that
# must share it.
_LARGEST_BLOCK, _FEWEST_CHANNELS = 1024, 8
# Weight of the gradient's equations relative to the layer's equations if the preconditioner covers them. More weight
# means fewer iterations, but more of the gradient's rounding in the solution.
_GRADIENT_WEIGHT = 3.0


@dataclass(frozen=True)
class LinearSystem:
    """The weighted equations for the inputs x of one layer, ``(V, N*C*H*W)``: a linear map A for each victim."""

    geometry: Geometry
    weight: Tensor  # (V, N, groups, outputs, patch)
    slopes: Tensor  # (V, N, groups, outputs, positions), weights of the layer's equations
    errors: Tensor | None  # shape of `slopes`, gradient of each output times 1/N and `scale`; None if none is shared
    scale: Tensor  # (V, 1, 1, 1), weight of the gradient's equations
    count: Tensor  # (V,), equations
    diagonal: Tensor  # (V, N*C*H*W), inverse diagonal of A^T A
    blocks: Tensor | None = None  # (V, groups, N*H*W, N*H*W), approximate inverse of A^T A for a channel of a group
    undetermined: Tensor | None = None  # (V,), whether x are images with too few equations, which need `spectrum`
    spectrum: ImageSpectrum | None = None

    @classmethod
    def weighted(
        cls,
        geometry: Geometry,
        weight: Tensor,
        slopes: Tensor,
        errors: Tensor | None,
        image_shape: tuple[int, ...] | None = None,
    ) -> LinearSystem:
        """Weigh the gradient's equations (``errors`` without ``scale``), count all, and build the preconditioner."""
        count, groups = slopes.shape[1:3]
        channels, height, width = geometry.input_shape
        size = count * height * width
        shares = channels // groups >= _FEWEST_CHANNELS or size == count
        dense = errors is not None and size <= _LARGEST_BLOCK and shares
        # The sum over a group's outputs of their slopes times their squared weights, for every input.
        diagonal = geometry.fold(weight.square().mT @ slopes.square())
        known = (slopes > 0).flatten(2).sum(2).clamp(max=math.prod(geometry.input_shape)).sum(1)
        scale, both = torch.ones_like(diagonal[:, :1, :1, None]), diagonal
        if errors is not None:
            # With this weight, rows of the gradient and rows of the layer have about the same size.
            layer, gradient = weight[:, 0].square().sum((1, 2, 3)), errors.square().sum((1, 2, 3, 4))
            ratio = torch.where(gradient > 0, layer / torch.where(gradient > 0, gradient, 1), 0).sqrt()
            scale = (ratio * (_GRADIENT_WEIGHT if dense else 1.0)).reshape(-1, 1, 1, 1)
            active = (errors != 0).any(4).any(1).sum(2)  # (V, groups): outputs with a gradient
            rows = (active * math.prod(geometry.kernel)).clamp(max=size)
            known = known + rows.sum(1) * (channels // groups)
            errors = errors * scale[:, None]
            squares = errors.square().sum(3, keepdim=True).expand(-1, -1, -1, geometry.patch, -1)
            both = diagonal + geometry.fold(squares)
        both = both.flatten(1)
        blocks = undetermined = spectrum = None
        if errors is not None and dense:
            blocks = _blocks(geometry, errors, diagonal)
        elif image_shape is not None and bool((few := known < count * math.prod(geometry.input_shape)).any()):
            undetermined, spectrum = few, ImageSpectrum(count, image_shape)
        inverse = 1 / _lifted(both, both.mean(1, keepdim=True))
        return cls(geometry, weight, slopes, errors, scale, known, inverse, blocks, undetermined, spectrum)

    def product(self, x: Tensor) -> list[Tensor]:
        """Return A x: the layer's equations, then those of the gradient, ``(V, groups, outputs, patch)``, if shared."""
        patches = self.geometry.unfold(x.reshape(*self.slopes.shape[:2], *self.geometry.input_shape))
        layer = self.slopes * (self.weight @ patches)
        return [layer] if self.errors is None else [layer, (self.errors @ patches.mT).sum(1)]

    def transposed(self, parts: list[Tensor]) -> Tensor:
        """Return :math:`A^T y`."""
        left, right = self.weight, self.slopes * parts[0]
        if self.errors is not None:
            left = torch.cat([left, parts[1][:, None].expand(left.shape)], dim=3)
            right = torch.cat([right, self.errors], dim=3)
        return self.geometry.fold(left.mT @ right).flatten(1)

    def select(self, lanes: Tensor) -> LinearSystem:
        """Return the system of some of the victims."""
        return select_lanes(self, lanes)

    def precondition(self, x: Tensor) -> Tensor:
        """Apply the preconditioner to ``(V, N*C*H*W)``."""
        if self.blocks is not None:
            victims, count, groups = self.slopes.shape[:3]
            size = self.blocks.shape[2]
            # (V, groups, channels, N, H*W): every channel of a group has the same block.
            by_channel = x.reshape(victims, count, groups, -1, size // count).movedim(1, 3)
            solved = by_channel.reshape(victims, groups, -1, size) @ self.blocks
            return solved.reshape(by_channel.shape).movedim(3, 1).reshape(victims, -1)
        product = x * self.diagonal
        if self.undetermined is not None and self.spectrum is not None:
            product = torch.where(self.undetermined[:, None], self.spectrum(x), product)
        return product


def _blocks(geometry: Geometry, errors: Tensor, diagonal: Tensor) -> Tensor:
    """Return the inverse of G^T G + D: G are the gradient's equations of a channel, D the layer's mean diagonal."""
    victims, count, groups, outputs, _ = errors.shape
    _, height, width = geometry.input_shape
    one_channel = dataclasses.replace(geometry, input_shape=(1, height, width), groups=1)
    pixels = torch.arange(1, height * width + 1, device=errors.device).view(1, 1, 1, height, width)
    places = one_channel.unfold(pixels)[0, 0, 0]  # (kernel, positions), 0 in the padding
    rows = errors.new_zeros(victims, groups, outputs, len(places), count, height * width + 1)
    errors = errors.permute(0, 2, 3, 1, 4)[:, :, :, None].expand(-1, -1, -1, len(places), -1, -1)
    rows.scatter_(-1, places[:, None].expand_as(errors), errors)
    rows = rows[..., 1:].reshape(victims, groups, -1, count * height * width)
    matrix = rows.mT @ rows
    by_channel = diagonal.reshape(victims, count, groups, -1, height * width)
    mean = by_channel.mean(3).movedim(1, 2).flatten(2)  # (V, groups, N*H*W)
    traces = mean.mean(-1, keepdim=True) + matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    matrix.diagonal(dim1=-2, dim2=-1).add_(_lifted(mean, traces))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    inverse = torch.cholesky_inverse(factor)
    # A victim whose gradient is not finite gets a block of NaN, which does not affect the others.
    return torch.where((failed == 0)[..., None, None], inverse, torch.nan)


def _lifted(diagonal: Tensor, mean: Tensor) -> Tensor:
    """Raise the zeros of a diagonal (inputs without equations) a little above zero."""
    return diagonal + torch.where(mean > 0, 1e-10 * mean, 1)
