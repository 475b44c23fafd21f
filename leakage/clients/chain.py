"""Networks that are a plain chain: the input of each module is the output of the previous one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from leakage.clients.victim import Victim

_Pair = tuple[int, int]
_Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """How a layer takes patches from inputs ``(C, H, W)``; a ``Linear`` counts as a convolution of a single pixel.

    ``padding`` is given for the left, right, top and bottom.
    """

    input_shape: _Shape
    output_shape: _Shape
    kernel: _Pair = (1, 1)
    stride: _Pair = (1, 1)
    dilation: _Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    @property
    def patch(self) -> int:
        """The number of values in one patch of one group of channels."""
        return self.input_shape[0] // self.groups * math.prod(self.kernel)

    @property
    def symmetric(self) -> bool:
        """Whether opposite sides have the same padding."""
        left, right, top, bottom = self.padding
        return (left, top) == (right, bottom)

    def unfold(self, inputs: Tensor) -> Tensor:
        """Return the patches ``(A, B, groups, patch, positions)`` of ``(A, B, C, H, W)``; faster than ``F.unfold``."""
        padded = F.pad(inputs, self.padding).contiguous()
        *outer, row, column = padded.stride()
        inner = (row * self.dilation[0], column * self.dilation[1], row * self.stride[0], column * self.stride[1])
        patches = padded.as_strided((*inputs.shape[:3], *self.kernel, *self.output_shape[1:]), (*outer, *inner))
        return patches.reshape(*inputs.shape[:2], self.groups, self.patch, -1)

    def fold(self, patches: Tensor) -> Tensor:
        """Apply the transpose of :meth:`unfold`, and flatten the result to ``(A, B, C*H*W)``."""
        if self.kernel == self.input_shape[1:] == (1, 1):
            return patches.flatten(2)
        _, height, width = self.input_shape
        left, right, top, bottom = self.padding
        size = (height + bottom - top, width + right - left)  # `F.fold` supports only equal paddings
        merged = patches.reshape(-1, self.groups * self.patch, math.prod(self.output_shape[1:]))
        sums = F.fold(merged, size, self.kernel, self.dilation, (top, left), self.stride)
        return sums[..., :height, :width].reshape(*patches.shape[:2], -1)


@dataclass(frozen=True)
class Link:
    """A module of a chain, without children, and the shapes of its input and output for one image."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def __str__(self) -> str:
        """Return the type and name of the module, for error messages."""
        return f"{type(self.module).__name__} {self.name!r}"

    @property
    def is_layer(self) -> bool:
        """Whether the module is a ``Conv2d`` or ``Linear``; other links are functions between these."""
        return type(self.module) in (nn.Conv2d, nn.Linear)

    @property
    def geometry(self) -> Geometry:
        """The geometry of the layer."""
        if isinstance(self.module, nn.Linear):
            return Geometry((self.input_shape[0], 1, 1), (self.output_shape[0], 1, 1))
        layer = cast(nn.Conv2d, self.module)
        kernel, dilation = cast(_Pair, layer.kernel_size), cast(_Pair, layer.dilation)
        if layer.padding == "same":  # an odd total puts the extra pixel at the end
            rows, columns = (step * (size - 1) for size, step in zip(kernel, dilation, strict=True))
            padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        else:
            top, left = (0, 0) if layer.padding == "valid" else cast(_Pair, layer.padding)
            padding = (left, left, top, top)
        inputs, outputs = cast(_Shape, self.input_shape), cast(_Shape, self.output_shape)
        return Geometry(inputs, outputs, kernel, cast(_Pair, layer.stride), dilation, padding, layer.groups)


class _ReachedError(Exception):
    """The last module of a chain was called."""


def find_links(
    victim: Victim,
    functions: Collection[type[nn.Module]],
    refused: Callable[[Link], str | None],
    last: str | None = None,
) -> list[Link]:
    """Return the modules of a plain chain up to its classifier, without ``Identity``, ``Flatten`` and dropout.

    Args:
        victim: the victim whose network is searched.
        functions: module types that are allowed between ``Conv2d`` and ``Linear``.
        refused: returns the reason why a link is not supported, or None.
        last: the layer that ends the chain, whatever follows it; by default the classifier.

    Raises:
        ValueError: the network is not such a chain. The message names the module.
    """
    if victim.classifier is None:
        raise ValueError(
            f"Expected a network whose logits are the output of a linear layer, but got those of {victim.logits_from}."
        )
    if last is None:
        _check_no_draws(victim, victim.draws)
    last = last or victim.classifier
    calls = _calls(victim, last)
    _check_no_draws(victim, [link.name for link in calls])
    links = []
    for link in calls:
        if not isinstance(link.module, nn.Identity | nn.Flatten | _DropoutNd):
            if reason := _why_refused(link, victim, functions, refused):
                names = ", ".join(kind.__name__ for kind in (nn.Conv2d, nn.Linear, *functions))
                raise _not_a_chain(f"{link}, {reason}. Supported are {names}")
            links.append(link)
        if link.name == last:
            break
    return links


def _check_no_draws(victim: Victim, names: Iterable[str]) -> None:
    if secret := sorted(victim.draws.keys() & {*names}):
        raise _not_a_chain(f"{secret}, which draw random numbers that only the client knows")


def _why_refused(
    link: Link, victim: Victim, functions: Collection[type[nn.Module]], refused: Callable[[Link], str | None]
) -> str | None:
    module = link.module
    if not link.is_layer:
        return refused(link) or (None if type(module) in functions else "which is not supported")
    names = [f"{link.name}.{name}" for name in ("weight", "bias") if getattr(module, name) is not None]
    if not set(names) <= victim.state.keys():
        return "whose parameters are computed from others or shared with another layer"
    if isinstance(module, nn.Linear) and len(link.input_shape) > 1:
        return "applied to several vectors of each image"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padded by {module.padding_mode!r} instead of zeros"
    return refused(link)


@torch.no_grad()
def _calls(victim: Victim, last: str) -> list[Link]:
    """Return the modules without children in the order of their calls, up to ``last`` unless it is the classifier."""
    like = next(victim.model.parameters())
    noise = torch.rand(2, *victim.protocol.image_shape, generator=torch.Generator().manual_seed(0)).to(like)
    calls: list[Link] = []
    # The outputs with their versions (which a change in place increments) and values. All are kept, so that no later
    # tensor reuses the memory of one.
    kept: list[tuple[Tensor, int, Tensor]] = [(noise, noise._version, noise.clone())]

    def before(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        link, given = Link(name, module, (), ()), inputs[0] if len(inputs) == 1 else None
        last, version, values = kept[-1]
        if (
            not isinstance(given, Tensor)
            or (given.data_ptr(), given.numel(), given._version) != (last.data_ptr(), last.numel(), version)
            or not torch.equal(given.reshape(-1), values.reshape(-1))
        ):
            source = calls[-1] if calls else "the images"
            raise _not_a_chain(
                f"{link}, whose input is not the output of {source}: there is an operation or a branch between them"
            )
        if any(name == other.name for other in calls):
            raise _not_a_chain(f"{link}, which is called more than once")

    def after(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise _not_a_chain(f"{Link(name, module, (), ())}, whose output is not a tensor")
        kept.append((output, output._version, output.clone()))
        calls.append(Link(name, module, tuple(inputs[0].shape[1:]), tuple(output.shape[1:])))
        if name == last != victim.classifier:
            raise _ReachedError

    with contextlib.ExitStack() as hooks:
        for name, module in victim.model.named_modules():
            if not any(True for _ in module.children()):
                hooks.callback(module.register_forward_pre_hook(partial(before, name)).remove)
                hooks.callback(module.register_forward_hook(partial(after, name)).remove)
        hooks.enter_context(contextlib.suppress(_ReachedError))
        victim.model(noise)
    return calls


def _not_a_chain(got: str) -> ValueError:
    return ValueError(f"Expected a plain chain of layers, but got {got}.")
