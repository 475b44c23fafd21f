"""What modules of a network take and give, collected by name in a forward pass."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Activation(NamedTuple):
    """What a module took and gave.

    Attributes:
        inputs: its first positional argument, such as ``(N, C, H, W)``.
        outputs: what it returned.
    """

    inputs: Tensor
    outputs: Tensor


@contextlib.contextmanager
def recorded(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, Activation]]:
    """Collect the activations of some modules while the model runs once; no hook is left behind.

    They are filled in as the model runs, in the order of the calls, as copies: what comes after a module may change
    its output in place.

    Raises:
        ValueError: a module is called more than once, or not at all, or takes or gives no tensor.
    """
    inputs: dict[str, Tensor] = {}
    activations: dict[str, Activation] = {}

    def before(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if name in inputs:
            raise ValueError(f"Expected `modules` that a pass calls once, but got {name!r}, which it calls again.")
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not tensors:
            raise ValueError(f"Expected `modules` that take a tensor first, but got {name!r}, which takes none.")
        inputs[name] = tensors[0].clone()

    def after(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Expected `modules` that return a tensor, but got {name!r}, which returns {type(output).__name__}."
            )
        activations[name] = Activation(inputs[name], output.clone())

    with contextlib.ExitStack() as hooks:
        for name in dict.fromkeys(modules):
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(partial(before, name)).remove)
            hooks.callback(module.register_forward_hook(partial(after, name)).remove)
        yield activations
    if missing := [name for name in modules if name not in activations]:
        raise ValueError(f"Expected `modules` that a pass calls once, but got {missing}, which it does not call.")


def check_names(model: nn.Module, modules: Sequence[str]) -> None:
    """Raise a ``ValueError``, with names that are like it, for a name that no module of the model has."""
    names = [name for name, _ in model.named_modules() if name]
    for name in modules:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=5, cutoff=0.0)
            raise ValueError(f"Expected `modules` to name modules of the model, such as {close}, but got {name!r}.")


def joined(parts: list[dict[str, Activation]]) -> dict[str, Activation]:
    """Those of the batches of one pass over the images after one another."""
    if len(parts) == 1:
        return parts[0]
    return {name: Activation(*map(torch.cat, zip(*(part[name] for part in parts), strict=True))) for name in parts[0]}
