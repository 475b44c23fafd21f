"""Modules that draw random numbers for each image in each pass: dropout, and defenses such as PRECODE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from leakage.seeds import derive_seed

_BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_ALPHA = (nn.AlphaDropout, nn.FeatureAlphaDropout)
# The limit of SELU at minus infinity, by which alpha dropout replaces dropped values.
_SELU_LEAST = -1.0507009873554805 * 1.6732632423543772


@dataclass(frozen=True)
class Draw:
    """The random numbers that a module draws for one image.

    Attributes:
        shape: their shape.
        keep: for a mask of zeros and ones, the probability of a one; None for standard normal numbers.
    """

    shape: tuple[int, ...]
    keep: float | None = None

    @property
    def size(self) -> int:
        """The number of random numbers."""
        return math.prod(self.shape)


class Drawing(nn.Module):
    """Base class of modules that use standard normal numbers, from the buffer ``drawn``, in training mode.

    The caller, such as :class:`leakage.Victim`, puts the numbers ``(N, *draw_shape)`` into the buffer. While the buffer
    is empty, the module works without random numbers. A module may add a term to the loss of each image: its forward
    pass stores these as ``penalties`` ``(N,)``.

    Args:
        draw_shape: shape of the numbers for one image.

    Attributes:
        first_layer: name of a linear layer in the module that receives the module's input unchanged; None if there is
            none.
    """

    drawn: Tensor
    first_layer: str | None = None

    def __init__(self, draw_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.draw_shape = draw_shape
        self.penalties: Tensor | None = None
        self.register_buffer("drawn", torch.empty(0), persistent=False)


def take_masks(model: nn.Module) -> None:
    """Make dropout in training mode take its masks from a buffer ``drawn``, as :class:`Drawing` does.

    Raises:
        ValueError: a dropout module drops everything.
    """
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            if module.p >= 1:
                raise ValueError(f"Expected dropout with p below 1, but got {name!r} with p={module.p}.")
            module.register_buffer("drawn", torch.empty(0), persistent=False)
            module.forward = partial(_drop, module)


def find_draws(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Draw]:
    """Return what the modules of a model draw, by their names.

    Args:
        model: a model prepared by :func:`take_masks`.
        inputs: what the model takes in a trial run.

    Raises:
        ValueError: a module that draws is called more than once in a forward pass.
    """
    drawing = {name: module for name, module in model.named_modules() if module.training and _draws(module)}
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in drawing}

    def note(name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        shapes[name].append(tuple(given[0].shape[1:]))

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in drawing.items()]
    try:
        if hooks:
            with torch.no_grad():
                model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if several := [name for name, seen in shapes.items() if len(seen) > 1]:
        raise ValueError(
            f"Expected modules that draw random numbers, such as dropout, to be called once in a pass, but got "
            f"{several}, which are called more often. Use a separate module for each call."
        )
    return {name: _draw_of(drawing[name], seen[0]) for name, seen in shapes.items() if seen}


def _draws(module: nn.Module) -> bool:
    return isinstance(module, Drawing) or (isinstance(module, _DropoutNd) and module.p > 0)


def _draw_of(module: nn.Module, shape: tuple[int, ...]) -> Draw:
    if isinstance(module, Drawing):
        return Draw(module.draw_shape)
    if isinstance(module, _BY_CHANNEL):
        shape = (shape[0], *[1] * (len(shape) - 1))
    return Draw(shape, 1 - cast(_DropoutNd, module).p)


def draw(draws: Mapping[str, Draw], rows: int, ids: Sequence[int], seed: int) -> Tensor:
    """Draw ``(V, rows, D)``: the D numbers of all modules for each image of each step, with one seed per victim."""
    found = []
    for victim in ids:
        generator = torch.Generator().manual_seed(derive_seed(seed, victim, "draws"))
        parts = []
        for own in draws.values():
            if own.keep is None:
                parts.append(torch.randn(rows, own.size, generator=generator))
            else:
                parts.append((torch.rand(rows, own.size, generator=generator) < own.keep).float())
        found.append(torch.cat(parts, dim=1))
    return torch.stack(found)


def as_buffers(draws: Mapping[str, Draw], drawn: Tensor) -> dict[str, Tensor]:
    """Split the numbers ``(N, D)`` of N images into the buffers of the modules, by name."""
    parts = torch.split(drawn, [own.size for own in draws.values()], dim=1)
    return {
        f"{name}.drawn": part.reshape(len(part), *own.shape)
        for (name, own), part in zip(draws.items(), parts, strict=True)
    }


def take_penalties(model: nn.Module) -> list[Tensor]:
    """Return and clear the ``penalties`` of a model's modules from the last forward pass, ``(N,)`` each."""
    found = []
    for module in model.modules():
        if isinstance(module, Drawing) and module.penalties is not None:
            found.append(module.penalties)
            module.penalties = None  # keep no graph of the pass
    return found


def _drop(module: _DropoutNd, inputs: Tensor) -> Tensor:
    mask = cast(Tensor, module.drawn)
    if not mask.numel():
        return inputs
    keep = 1 - module.p
    if not isinstance(module, _ALPHA):
        kept: Tensor = inputs * mask / keep
        return kept
    scale: float = (keep + keep * module.p * _SELU_LEAST**2) ** -0.5
    return scale * (inputs * mask + _SELU_LEAST * (1 - mask)) - scale * _SELU_LEAST * module.p
