"""Newly drawn weights that depend only on a seed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def draw_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Draw new weights and buffers of a network, by name, as ``functional_call`` takes them.

    Each module draws its weights by its ``reset_parameters``, in the order of ``model.modules()``; weights that no
    module resets have the values of ``model``. The draws depend only on the architecture, the precision and the seed:
    they are made on the CPU, and the global random state is neither read nor changed.

    Args:
        model: any network; it is not changed.
        seed: a whole number from 0 to 2**63 - 1, such as :func:`leakage.seeds.derive_seed` returns.

    Returns:
        New tensors on the CPU, without gradients. Tied weights appear only under their first name.

    Raises:
        ValueError: a module has weights but no ``reset_parameters``.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> state = draw_state(model, seed=0)
        >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
        {'1.weight': (2, 4), '1.bias': (2,)}
        >>> torch.func.functional_call(model, state, torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    return draw_states(model, [seed])[0]


def draw_states(model: nn.Module, seeds: list[int], *, hint: str = "Add this method.") -> list[dict[str, Tensor]]:
    """Call :func:`draw_state` for each of ``seeds``, with one copy of the network; ``hint`` ends the error message."""
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False)]
        if own and not hasattr(module, "reset_parameters") and not _reset_by_parent(model, name):
            raise ValueError(
                f"Expected every module with weights to have `reset_parameters()`, but got "
                f"{type(module).__name__} {name!r}. {hint}"
            )
    network = copy.deepcopy(model).cpu()  # the draws must not depend on the model's device
    states = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in seeds:
            torch.default_generator.manual_seed(seed)
            network.apply(reset)
            states.append({name: tensor.clone() for name, tensor in state_of(network).items()})
    return states


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers by name; tied ones only under their first name, as ``functional_call`` needs it."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def reset(module: nn.Module) -> None:
    """Call ``reset_parameters`` of one module, if it has this method; for ``model.apply``."""
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()


def _reset_by_parent(model: nn.Module, name: str) -> bool:
    """Return whether a parent of the module ``name`` draws its weights."""
    parts = name.split(".") if name else []
    return any(hasattr(model.get_submodule(".".join(parts[:end])), "reset_parameters") for end in range(len(parts)))
