"""Recording of the inputs and outputs of a network's modules, by name, in a forward pass."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Activation(NamedTuple):
    """The input and output of a module.

    Attributes:
        inputs: the first positional argument of the module, such as ``(N, C, H, W)``.
        outputs: the tensor that the module returned.
    """

    inputs: Tensor
    outputs: Tensor


@contextlib.contextmanager
def recorded(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, Activation]]:
    """Collect the activations of some modules while the model runs once; the hooks are removed afterwards.

    The activations are added in the order of the calls. They are copies, because later operations may change the output
    of a module in place.

    Args:
        model: the network that runs within the context.
        modules: names of the modules.

    Raises:
        ValueError: a module is called more than once or never, does not take a tensor first, or does not return one.
    """
    inputs: dict[str, Tensor] = {}
    activations: dict[str, Activation] = {}

    def before(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if name in inputs:
            raise ValueError(
                f"Expected `modules` that are called once in a forward pass, but got {name!r}, which is called again."
            )
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
        raise ValueError(
            f"Expected `modules` that are called once in a forward pass, but got {missing}, which are not called."
        )


def check_names(model: nn.Module, modules: Sequence[str]) -> None:
    """Raise a ``ValueError`` if no module of the model has one of the names; the message suggests similar names."""
    names = [name for name, _ in model.named_modules() if name]
    for name in modules:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=5, cutoff=0.0)
            raise ValueError(f"Expected `modules` to name modules of the model, such as {close}, but got {name!r}.")


def joined(parts: list[dict[str, Activation]]) -> dict[str, Activation]:
    """Concatenate the activations of the batches of one pass over the images."""
    if len(parts) == 1:
        return parts[0]
    return {name: Activation(*map(torch.cat, zip(*(part[name] for part in parts), strict=True))) for name in parts[0]}
