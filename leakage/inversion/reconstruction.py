"""Reconstruction: the result of an attack for each victim."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.files.tensors import read_safetensors, shorten, write_safetensors

_FORMAT = "leakage.Reconstruction"


@dataclass
class Reconstruction:
    """Images and labels that an attack recovered, with the state of its search for each victim.

    Attributes:
        ids: ``(V,)``, victim ids.
        images: ``(V, N, C, H, W)``; true images lie in [0, 1]; reconstructions are not clamped.
        labels: ``(V, N)``, class indices.
        loss: ``(V,)``, the attack's own objective at ``images``, or the lowest one of all starts if ``images`` are
            their mean; with the robust protocol, relative to the squared norm of the shared gradient.
        iterations: ``(V,)``, accepted steps, over all restarts.
        evaluations: ``(V,)``, evaluations of the objective and its gradient, over all restarts.
        restarts: ``(V,)``, number of starts after the first.
        status: ``(V,)``, indices into :data:`leakage.solvers.STATUS`.
        learning_rate: ``(V,)``, recovered learning rate of the clients' local steps, that of the best start; None if
            the attacker knew it.
    """

    ids: Tensor
    images: Tensor
    labels: Tensor
    loss: Tensor
    iterations: Tensor
    evaluations: Tensor
    restarts: Tensor
    status: Tensor
    learning_rate: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def empty(cls) -> Reconstruction:
        """Return a reconstruction of no victims."""
        whole, real = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        return cls(whole, real.view(0, 1, 1, 1, 1), whole.view(0, 1), real, whole, whole, whole, whole)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Reconstruction:
        """Apply a function to each tensor and return the result."""
        return Reconstruction(**{name: change(tensor) for name, tensor in self._tensors().items()})

    def select(self, victims: Tensor) -> Reconstruction:
        """Return the victims at the given indices, in that order, or those of a boolean mask."""
        return self.map(lambda tensor: tensor[victims])

    @staticmethod
    def cat(parts: Iterable[Reconstruction]) -> Reconstruction:
        """Concatenate the victims of several reconstructions."""
        tensors = [part._tensors() for part in parts if len(part)]
        if not tensors:
            return Reconstruction.empty()
        return Reconstruction(**{name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the attributes to a safetensors file.

        Raises:
            OSError: if the file cannot be written.
        """
        write_safetensors(path, _FORMAT, self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reconstruction:
        """Read a file written by :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file has another format, is truncated, or lacks a tensor.
        """
        _, tensors = read_safetensors(path, _FORMAT)
        names = {field.name for field in dataclasses.fields(cls)} - {"learning_rate"}
        if tensors.keys() - {"learning_rate"} != names:
            raise ValueError(f"Expected tensors {sorted(names)} in '{path}', but got {shorten(sorted(tensors))}.")
        return cls(**tensors)
