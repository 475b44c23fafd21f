"""Linear least squares for the inputs of a convolution or linear layer, for many victims at once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.closed_form.stages import Stage
from leakage.solvers.spectrum import ImageSpectrum

# Unknowns of one channel up to which a dense preconditioner pays, and channels that must share it.
_LARGEST_BLOCK, _FEWEST_CHANNELS = 1024, 8
# Weight of the gradient's equations relative to the layer's where the preconditioner takes care of them: more means
# fewer iterations, and more of the gradients' rounding in the solution.
_GRADIENT_WEIGHT = 3.0
# Stopped victims leave the batch once they are this part of it.
_LEAVE = 1 / 4


@dataclass(frozen=True)
class Geometry:
    """How a layer takes patches from its inputs; a ``Linear`` is a convolution of a single pixel."""

    input_shape: tuple[int, int, int]
    output_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom
    groups: int

    @property
    def patch(self) -> int:
        """Numbers in one patch of one group of channels."""
        return self.input_shape[0] // self.groups * math.prod(self.kernel)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width with the padding."""
        left, right, top, bottom = self.padding
        return self.input_shape[1] + top + bottom, self.input_shape[2] + left + right

    def unfold(self, inputs: Tensor) -> Tensor:
        """Patches ``(V, N, groups, patch, positions)`` of ``(V, N, C, H, W)``; faster than ``F.unfold``."""
        padded = F.pad(inputs, self.padding).contiguous()
        victims, count, channels, row, column = padded.stride()
        size = (*inputs.shape[:3], *self.kernel, *self.output_size)
        inner = (row * self.dilation[0], column * self.dilation[1], row * self.stride[0], column * self.stride[1])
        patches = padded.as_strided(size, (victims, count, channels, *inner))
        return patches.reshape(*inputs.shape[:2], self.groups, self.patch, -1)

    def fold(self, patches: Tensor, batch: tuple[int, ...]) -> Tensor:
        """The transposed of :meth:`unfold`, flattened: ``(V, N, C*H*W)``."""
        if self.kernel == self.padded == (1, 1):
            return patches.reshape(*batch, -1)
        _, height, width = self.input_shape
        patches = patches.reshape(math.prod(batch), -1, math.prod(self.output_size))
        sums = F.fold(patches, self.padded, self.kernel, dilation=self.dilation, stride=self.stride)
        left, _, top, _ = self.padding
        return sums[..., top : top + height, left : left + width].reshape(*batch, -1)


def geometry_of(stage: Stage) -> Geometry:
    """That of a stage's linear layer."""
    layer = stage.layer
    if isinstance(layer, nn.Linear):
        return Geometry(stage.input_shape, (1, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 1)
    (height, width), (rows, columns) = layer.kernel_size, layer.dilation
    padding: tuple[int, int, int, int]
    if isinstance(layer.padding, str):  # "same" puts the odd one behind
        total = (rows * (height - 1), columns * (width - 1)) if layer.padding == "same" else (0, 0)
        padding = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    else:
        padding = (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0])
    return Geometry(
        input_shape=stage.input_shape,
        output_size=(stage.output_shape[1], stage.output_shape[2]),
        kernel=(height, width),
        stride=(layer.stride[0], layer.stride[1]),
        dilation=(rows, columns),
        padding=padding,
        groups=layer.groups,
    )


@dataclass
class LinearSystem:
    """The weighted equations of one layer's inputs x, ``(V, N*C*H*W)``: a linear map A of each victim.

    Attributes:
        geometry: of the layer.
        weight: ``(V, N, groups, outputs, patch)``.
        slopes: ``(V, N, groups, outputs, positions)``, weights of the layer's equations.
        errors: of the same shape, gradient of each output times 1/N; once prepared, weighted by ``scale``. None if no
            gradient is shared.
        scale: ``(V, 1, 1, 1)``, weight of the gradient's equations.
        count: ``(V,)``, equations.
        diagonal: ``(V, N*C*H*W)``, inverse diagonal of :math:`A^T A`.
        blocks: ``(V, groups, N*H*W, N*H*W)``, inverse of :math:`A^T A` for one channel of a group, nearly.
        spectrum: where the unknowns are images, with too few equations for some victims, which ``undetermined`` names.
    """

    geometry: Geometry
    weight: Tensor
    slopes: Tensor
    errors: Tensor | None
    scale: Tensor = dataclasses.field(default_factory=lambda: torch.ones(1))
    count: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1))
    diagonal: Tensor = dataclasses.field(default_factory=lambda: torch.ones(1))
    blocks: Tensor | None = None
    undetermined: Tensor | None = None
    spectrum: ImageSpectrum | None = None

    def per_group(self, outputs: Tensor) -> Tensor:
        """Outputs ``(V, N, O, H, W)`` as ``(V, N, groups, outputs, positions)``."""
        return outputs.reshape(*self.slopes.shape)

    def product(self, x: Tensor) -> list[Tensor]:
        """A x: the layer's equations, then the gradient's ``(V, groups, outputs, patch)`` if there is one."""
        patches = self.geometry.unfold(x.reshape(*self.slopes.shape[:2], *self.geometry.input_shape))
        layer = self.slopes * (self.weight @ patches)
        return [layer] if self.errors is None else [layer, (self.errors @ patches.mT).sum(1)]

    def transposed(self, parts: list[Tensor]) -> Tensor:
        """:math:`A^T y`."""
        left, right = self.weight, self.slopes * parts[0]
        if self.errors is not None:
            left = torch.cat([left, parts[1][:, None].expand(left.shape)], dim=3)
            right = torch.cat([right, self.errors], dim=3)
        return self.geometry.fold(left.mT @ right, self.slopes.shape[:2]).flatten(1)

    def select(self, victims: Tensor) -> LinearSystem:
        """Some of the victims."""
        tensors: dict[str, Any] = {
            name: value[victims] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def precondition(self, gradient: Tensor) -> Tensor:
        """The preconditioner times ``(V, N*C*H*W)``."""
        if self.blocks is not None:
            victims, count, groups = self.slopes.shape[:3]
            size = self.blocks.shape[2]
            # (V, groups, channels, N, H*W): every channel of a group has the same block.
            by_channel = gradient.reshape(victims, count, groups, -1, size // count).movedim(1, 3)
            solved = by_channel.reshape(victims, groups, -1, size) @ self.blocks
            return solved.reshape(by_channel.shape).movedim(3, 1).reshape(victims, -1)
        product = gradient * self.diagonal
        if self.undetermined is not None and self.spectrum is not None:
            product = torch.where(self.undetermined[:, None], self.spectrum(gradient), product)
        return product

    def prepare(self, image_shape: tuple[int, ...] | None) -> None:
        """Weigh the gradient's equations, count them all, and make the preconditioner; a shape if x are images."""
        geometry, (victims, count, groups) = self.geometry, self.slopes.shape[:3]
        channels, height, width = geometry.input_shape
        size = count * height * width
        shares = channels // groups >= _FEWEST_CHANNELS or size == count
        dense = self.errors is not None and size <= _LARGEST_BLOCK and shares
        # The sum over a group's outputs of their slopes times their squared weights, for every input.
        diagonal = geometry.fold(self.weight.square().mT @ self.slopes.square(), (victims, count))
        known = (self.slopes > 0).flatten(2).sum(2).clamp(max=math.prod(geometry.input_shape)).sum(1)
        if self.errors is not None:
            # As many rows of the gradient as of the layer are about equally large with this weight.
            layer = self.weight[:, 0].square().sum((1, 2, 3))
            gradient = self.errors.square().sum((1, 2, 3, 4))
            ratio = torch.where(gradient > 0, layer / torch.where(gradient > 0, gradient, 1), 0).sqrt()
            self.scale = (ratio * (_GRADIENT_WEIGHT if dense else 1.0)).reshape(-1, 1, 1, 1)
            active = (self.errors != 0).any(4).any(1).sum(2)  # (V, groups): outputs with a gradient
            rows = (active * math.prod(geometry.kernel)).clamp(max=size)
            known = known + rows.sum(1) * (channels // groups)
            self.errors = self.errors * self.scale[:, None]
            squares = self.errors.square().sum(3, keepdim=True).expand(-1, -1, -1, geometry.patch, -1)
            both = diagonal + geometry.fold(squares, (victims, count))
        else:
            self.scale = torch.ones_like(diagonal[:, :1, :1, None])
            both = diagonal
        self.count = known
        both = both.flatten(1)
        self.diagonal = 1 / _lifted(both, both.mean(1, keepdim=True))
        undetermined = known < count * math.prod(geometry.input_shape)
        if dense:
            self.blocks = self._blocks(diagonal)
        elif image_shape is not None and bool(undetermined.any()):
            self.undetermined, self.spectrum = undetermined, ImageSpectrum(count, image_shape)

    def _blocks(self, diagonal: Tensor) -> Tensor:
        """Inverse of :math:`G^T G + D`, where G are the gradient's equations of one channel, the same for all of them.

        D is the mean over channels of the diagonal of the layer's equations.
        """
        assert self.errors is not None
        geometry, (victims, count, groups, outputs, _) = self.geometry, self.errors.shape
        errors = self.errors.reshape(victims, count, groups, outputs, *geometry.output_size)
        errors = errors.permute(0, 2, 3, 1, 4, 5)  # (V, groups, outputs, N, H, W)
        rows = errors.new_zeros(victims, groups, outputs, *geometry.kernel, count, *geometry.padded)
        (height, width), (down, right) = geometry.output_size, geometry.stride
        for i in range(geometry.kernel[0]):
            for j in range(geometry.kernel[1]):
                top, left = i * geometry.dilation[0], j * geometry.dilation[1]
                place = (slice(top, top + height * down, down), slice(left, left + width * right, right))
                rows[..., i, j, :, *place] = errors
        _, full_height, full_width = geometry.input_shape
        left, _, top, _ = geometry.padding
        rows = rows[..., top : top + full_height, left : left + full_width]
        rows = rows.reshape(victims, groups, -1, count * full_height * full_width)
        matrix = rows.mT @ rows
        by_channel = diagonal.reshape(victims, count, groups, -1, full_height * full_width)
        mean = by_channel.mean(3).movedim(1, 2).flatten(2)  # (V, groups, N*H*W)
        traces = mean.mean(-1, keepdim=True) + matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        matrix.diagonal(dim1=-2, dim2=-1).add_(_lifted(mean, traces))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        inverse = torch.cholesky_inverse(factor)
        # A block that is not finite (its gradient is not): the victim's own business.
        return torch.where((failed == 0)[..., None, None], inverse, torch.nan)


def _lifted(diagonal: Tensor, mean: Tensor) -> Tensor:
    """A diagonal whose zeros (inputs without equations) are lifted a little above zero."""
    return diagonal + torch.where(mean > 0, 1e-10 * mean, 1)


def conjugate_gradients(
    system: LinearSystem, given: list[Tensor], start: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """The least-squares solution of each victim's system, or after the last iteration what is nearest to it."""
    found = start.clone()
    victims = torch.arange(len(start), device=start.device)
    x = start.clone()
    rest = [b - a for a, b in zip(system.product(x), given, strict=True)]
    gradient = system.transposed(rest)
    step = system.precondition(gradient)
    size = (gradient * step).sum(1)
    enough = tolerance**2 * size
    running = size > 0  # false for NaN
    for _ in range(max_iterations):
        stopped = int((~running).sum())
        if stopped == len(running):
            break
        if stopped > _LEAVE * len(running):
            found[victims[~running]] = x[~running]
            keep = running.nonzero()[:, 0]
            system, rest = system.select(keep), [part[keep] for part in rest]
            victims, x, step, size, enough = (part[keep] for part in (victims, x, step, size, enough))
            running = running[keep]
        product = system.product(step)
        curvature = sum(part.flatten(1).square().sum(1) for part in product)
        assert isinstance(curvature, Tensor)
        length = torch.where(running & (curvature > 0), size / curvature, 0)
        x = torch.addcmul(x, length[:, None], step)
        rest = [
            torch.addcmul(part, length.reshape(-1, *[1] * (part.ndim - 1)), change, value=-1)
            for part, change in zip(rest, product, strict=True)
        ]
        gradient = system.transposed(rest)
        towards = system.precondition(gradient)
        new = (gradient * towards).sum(1)
        running = running & (new > enough)
        step = torch.addcmul(towards, (new / size)[:, None], step)
        size = new
    found[victims] = x
    return found
