"""What every defense is: one method from a client's gradient to what it shares instead."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leakage.errors import show_shape
from leakage.pieces import Piece
from leakage.seeds import derive_seed

Gradients = Mapping[str, Tensor]


class Defense(Piece, ABC):
    """What a client does to its gradient before it shares it.

    One of your own is an object with one method. It keeps the arguments of its constructor as attributes of the same
    names: from them :meth:`describe` tells the attacker what was done.

    Example:
        >>> class Signs(Defense):
        ...     '''Only the signs, all of one size.'''
        ...
        ...     def __init__(self, size: float) -> None:
        ...         self.size = size
        ...
        ...     def __call__(self, gradients, generator):
        ...         return {name: self.size * tensor.sign() for name, tensor in gradients.items()}
        >>> from leakage import LeNet, Victim
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28), defenses=[Signs(0.1)])
        >>> shared = victim.share(torch.rand(2, 1, 1, 28, 28), torch.tensor([[3], [8]]))
        >>> shared.gradients["classifier.bias"][0].abs().unique(), shared.protocol.defenses
        (tensor([0.1000]), ({'name': 'Signs', 'size': 0.1},))
    """

    @abstractmethod
    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """What is shared instead of the gradients of one client.

        Args:
            gradients: name to a tensor of the parameter's shape, on the client's device and in its precision.
            generator: of this client and this place among its defenses, on the CPU. Random numbers drawn from it
                in float32, one tensor after another, are the same on every device and whoever the other clients are.

        Returns:
            The same names and shapes, all finite.
        """

    def describe(self) -> dict[str, Any]:
        """What the attacker is told: the name of the class and the arguments of its constructor.

        Numbers, words, lists and dicts, since it travels in a file. Override it to withhold some.

        Raises:
            ValueError: an argument is not kept as an attribute of its name.
        """
        return {"name": type(self).__name__, **self._arguments()}


def whole_norm(gradients: Gradients) -> float:
    """The Euclidean norm of all tensors together; in double precision, where no square underflows."""
    return math.hypot(*(float(tensor.double().norm()) for tensor in gradients.values()))


def check_defenses(defenses: Sequence[Defense]) -> tuple[Defense, ...]:
    """The defenses as a tuple; a ``ValueError`` unless each is a :class:`Defense`."""
    example = "Expected `defenses` as a list of Defense objects, such as [GaussianNoise(1e-4)], but got"
    if not isinstance(defenses, list | tuple):
        raise ValueError(f"{example} {defenses!r}.")
    for defense in defenses:
        if not isinstance(defense, Defense):
            raise ValueError(f"{example} {defense!r} in it.")
    return tuple(defenses)


def defend(defenses: Sequence[Defense], gradients: Gradients, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """The gradients of V clients, name to ``(V, *shape)``, after all defenses, each client by itself.

    A client's id, ``seed`` and the place of a defense decide what it draws.

    Raises:
        ValueError: a defense returns other names or shapes, or numbers that are not finite.
    """
    clients = []
    for row, victim in enumerate(ids.tolist()):
        client = {name: tensor[row] for name, tensor in gradients.items()}
        for place, defense in enumerate(defenses):
            generator = torch.Generator().manual_seed(derive_seed(seed, victim, f"defense {place}"))
            defended = defense(client, generator)
            _check_defended(defense, defended, client, victim)
            client = {name: defended[name].to(tensor) for name, tensor in client.items()}
        clients.append(client)
    return {name: torch.stack([client[name] for client in clients]) for name in gradients}


def _check_defended(defense: Defense, defended: Any, gradients: Gradients, victim: int) -> None:
    given = f"Expected {type(defense).__name__} to return"
    if not isinstance(defended, Mapping) or defended.keys() != gradients.keys():
        got = sorted(defended) if isinstance(defended, Mapping) else type(defended).__name__
        raise ValueError(f"{given} tensors named {sorted(gradients)}, but got {got}.")
    for name, tensor in gradients.items():
        found = defended[name]
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            got = show_shape(*found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{given} a tensor of shape {show_shape(*tensor.shape)} for {name!r}, but got {got}.")
        if not bool(torch.isfinite(found.to(tensor)).all()):
            raise ValueError(f"{given} finite numbers for {name!r}, but got NaN or inf (victim {victim}).")
