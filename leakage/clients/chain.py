"""Whether a network is a plain chain of modules, and which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leakage.clients.victim import Victim


@torch.no_grad()
def module_calls(victim: Victim) -> list[tuple[str, nn.Module, torch.Size, torch.Size]]:
    """Modules without children in the order of their calls, with the shapes of one image before and behind.

    The model runs once on noise; nothing is left behind on it.

    Raises:
        ValueError: a module is called twice, or with something else than the output of the one before it.
    """
    like = next(victim.model.parameters())
    noise = torch.rand(2, *victim.protocol.image_shape, generator=torch.Generator().manual_seed(0)).to(like)
    calls: list[tuple[str, nn.Module, torch.Size, torch.Size]] = []
    # The last output, its version (a change in place counts it up) and its values; all are kept, so that no later
    # tensor takes the place of one in memory.
    kept: list[tuple[str, Tensor, int, Tensor]] = [("the images", noise, noise._version, noise.clone())]
    shapes: list[torch.Size] = []

    def start(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = inputs[0] if len(inputs) == 1 else None
            source, last, version, values = kept[-1]
            if (
                not isinstance(given, Tensor)
                or (given.data_ptr(), given.numel(), given._version) != (last.data_ptr(), last.numel(), version)
                or not torch.equal(given.reshape(-1), values.reshape(-1))
            ):
                raise not_a_chain(
                    f"{show_module(name, module)}, whose input is not the output of {source}: "
                    "there is an operation or a branch between them"
                )
            if any(name == other for other, *_ in calls):
                raise not_a_chain(f"{show_module(name, module)}, which is called more than once")
            shapes.append(given.shape[1:])

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                raise not_a_chain(f"{show_module(name, module)}, whose output is not a tensor")
            kept.append((show_module(name, module), output, output._version, output.clone()))
            calls.append((name, module, shapes[-1], output.shape[1:]))

        return hook

    hooks = []
    try:
        for name, module in victim.model.named_modules():
            if not any(True for _ in module.children()):
                hooks += [module.register_forward_pre_hook(start(name)), module.register_forward_hook(end(name))]
        victim.model(noise)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def not_a_chain(got: str) -> ValueError:
    """The error that says so."""
    return ValueError(f"Expected a plain chain of layers, but got {got.rstrip('.')}.")


def show_module(name: str, module: nn.Module) -> str:
    """Its kind and name, as errors say them."""
    return f"{type(module).__name__} {name!r}"
