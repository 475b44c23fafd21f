"""The parts of an attack: objects whose ``repr`` says how they were made."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# What is kept per victim besides its gradient: names of tensors whose first dimension is that of the victims.
State = dict[str, Tensor]


class Piece:
    """A part of an attack, chosen once and never changed: a distance, a prior, a solver, a parametrisation of images.

    It keeps each argument of its constructor as an attribute of the same name. Its ``repr`` therefore shows these
    arguments, and checkpoints and loggers use it to identify the piece. Tensors, modules and other large values appear
    as a hash.

    Example:
        >>> class Brightness(Piece):
        ...     def __init__(self, mean: float = 0.5) -> None:
        ...         self.mean = mean
        >>> Brightness(0.4)
        Brightness(mean=0.4)
    """

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={stable_repr(value)}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    def _arguments(self) -> dict[str, Any]:
        # A module without a constructor of its own inherits that of `nn.Module`, which takes no arguments.
        own = type(self).__init__ is not nn.Module.__init__
        names = list(inspect.signature(type(self)).parameters) if own else []
        if missing := [name for name in names if not hasattr(self, name)]:
            raise ValueError(
                f"Expected {type(self).__name__} to keep the arguments of its constructor as attributes of the same "
                f"names, which identify it, but got no attribute for {missing}. Assign them in the constructor."
            )
        return {name: getattr(self, name) for name in names}

    def prepare(self, like: Tensor) -> None:
        """Move the networks of this piece and of the pieces in it to the device and precision of the search.

        Args:
            like: a tensor on that device and in that precision.
        """
        for value in (self, *vars(self).values()):
            if isinstance(value, nn.Module):
                value.to(device=like.device, dtype=like.dtype)
            elif isinstance(value, Piece) and value is not self:
                value.prepare(like)


def stable_repr(value: Any) -> str:
    """Describe a value in a way that is the same in every process: plain values by ``repr``, tensors by a hash.

    Example:
        >>> stable_repr((0, 1.5))
        '(0, 1.5)'
        >>> stable_repr(torch.zeros(2)) == stable_repr(torch.zeros(2)) != stable_repr(torch.ones(2))
        True
    """
    if isinstance(value, nn.Module):
        made = Piece.__repr__(value) if isinstance(value, Piece) else type(value).__name__
        return f"{made} {digest(dict(value.state_dict()))}"
    if isinstance(value, Tensor):
        return f"Tensor {tuple(value.shape)} {digest({'': value})}"
    if isinstance(value, list | tuple):
        items = ", ".join(map(stable_repr, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {stable_repr(entry)}" for name, entry in value.items()) + "}"
    if dataclasses.is_dataclass(value) and not isinstance(value, Piece | type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{type(value).__name__}({stable_repr(fields)})"
    words = repr(value)
    if words == object.__repr__(value):  # the default repr, which holds an address
        return f"{type(value).__name__}({stable_repr(vars(value)) if hasattr(value, '__dict__') else ''})"
    return words


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute a short hash of tensors, to identify them.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)}) != digest({"a": torch.ones(2)})
        True
    """
    hashed = hashlib.sha256()
    for name, tensor in tensors.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]
