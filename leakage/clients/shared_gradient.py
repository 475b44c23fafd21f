"""What clients share and an attacker sees, as plain data that can be stored in a safetensors file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leakage.clients.protocol import WHOLE, Protocol, check_labels
from leakage.errors import show_shape
from leakage.files.tensors import header_value, read_safetensors, shorten, write_safetensors

_FORMAT = "leakage.SharedGradient"
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class SharedGradient:
    """The gradients of V victims, the weights at which they were computed, and the protocol.

    Attributes:
        gradients: name to ``(V, *shape)``.
        state: weights and buffers at which the gradients were computed, name to ``(V, *shape)`` if each victim has its
            own network, otherwise to ``shape``.
        ids: ``(V,)``, whole numbers that identify the victims.
        protocol: what the attacker knows about the clients' computation.
        own_weights: whether ``state`` has a leading victims' dimension.
        labels: ``(V, N)``, class indices, or ``(V, N, K)`` (:attr:`Protocol.label_kind`), if the attacker knows them;
            otherwise None.
        basis: ``(V, K, N)``, used only within an attack: a basis of the columns of the last layer's gradient, which is
            then given in coordinates (:mod:`leakage.clients.low_rank`). None in what is shared.

    Example:
        >>> from leakage import LeNet, Victim
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28))
        >>> shared = victim.share(torch.rand(2, 1, 1, 28, 28), torch.tensor([[3], [8]]))
        >>> shared.save("client.safetensors")                        # doctest: +SKIP
        >>> SharedGradient.load("client.safetensors").protocol.loss  # doctest: +SKIP
        'cross_entropy'
    """

    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    ids: Tensor
    protocol: Protocol
    own_weights: bool = False
    labels: Tensor | None = None
    basis: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, *args: Any, **kwargs: Any) -> SharedGradient:
        """Move the tensors to a device or a floating-point precision, like ``Tensor.to``; ids stay on the CPU."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            return tensor.to(torch.empty(0, device=tensor.device).to(*args, **kwargs).device)

        return self._map(move, move)

    def select(self, victims: Tensor) -> SharedGradient:
        """Return the victims at the given indices, in this order, or those that a boolean mask selects."""
        selected = self._map(lambda tensor: tensor[victims.to(tensor.device)], None)
        selected.ids = self.ids[victims.cpu()]
        return selected

    def piece(self, victims: slice) -> SharedGradient:
        """Return the victims of a slice, without a copy."""
        return dataclasses.replace(self._map(lambda tensor: tensor[victims], None), ids=self.ids[victims])

    def replace(self, places: Tensor, others: SharedGradient) -> SharedGradient:
        """Overwrite the victims at these indices with ``others``, in place; shared weights do not change."""
        pairs = [(self.gradients, others.gradients)]
        if self.own_weights:
            pairs.append((self.state, others.state))
        for mine, theirs in pairs:
            for name, tensor in mine.items():
                tensor[places] = theirs[name].to(tensor)
        self.ids[places.cpu()] = others.ids
        if self.labels is not None and others.labels is not None:
            self.labels[places] = others.labels.to(self.labels)
        if self.basis is not None and others.basis is not None:
            self.basis[places] = others.basis
        return dataclasses.replace(self)

    @staticmethod
    def cat(parts: list[SharedGradient]) -> SharedGradient:
        """Concatenate the victims of several parts; shared weights are those of the first part.

        Raises:
            ValueError: the parts differ in protocol, in whether victims have their own weights, or in whether labels
                are known.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts:
            kind, expected = (
                (shared.protocol, shared.own_weights, shared.labels is not None) for shared in (part, first)
            )
            if kind != expected:
                raise ValueError(
                    f"Expected parts of the same protocol, own weights and known labels, but got {expected} and {kind}."
                )

        def join(tensors: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}

        labels = [part.labels for part in parts if part.labels is not None]
        bases = [part.basis for part in parts if part.basis is not None]
        return SharedGradient(
            gradients=join([part.gradients for part in parts]),
            state=join([part.state for part in parts]) if first.own_weights else first.state,
            ids=torch.cat([part.ids for part in parts]),
            protocol=first.protocol,
            own_weights=first.own_weights,
            labels=torch.cat(labels) if labels else None,
            basis=torch.cat(bases) if bases else None,
        )

    def _map(self, change: Any, change_shared: Any) -> SharedGradient:
        """Apply ``change`` to all tensors with a victims' dimension, and ``change_shared`` to shared weights."""
        weights = change if self.own_weights else change_shared
        return dataclasses.replace(
            self,
            gradients={name: change(tensor) for name, tensor in self.gradients.items()},
            state={name: weights(tensor) for name, tensor in self.state.items()} if weights else self.state,
            labels=None if self.labels is None else change(self.labels),
            basis=None if self.basis is None else change(self.basis),
        )

    def check(self) -> None:
        """Raise a ``ValueError`` unless all shapes agree and all numbers are finite."""
        if self.ids.ndim != 1 or not len(self.ids) or self.ids.dtype not in WHOLE or bool((self.ids < 0).any()):
            raise ValueError(
                f"Expected `ids` as whole numbers of at least 0 and shape (V,), but got {self.ids.dtype} "
                f"{tuple(self.ids.shape)}, {self.ids.flatten()[:5].tolist()}."
            )
        victims = len(self.ids)
        if not self.gradients:
            raise ValueError("Expected `gradients` to hold at least one tensor, but got none.")
        for kind, tensors, leading in (
            ("gradient", self.gradients, True),
            ("state", self.state, self.own_weights),
        ):
            for name, tensor in tensors.items():
                if leading and (tensor.ndim < 1 or len(tensor) != victims):
                    raise ValueError(
                        f"Expected the {kind} of {name!r} to have shape {show_shape(victims, '...')}, "
                        f"but got {tuple(tensor.shape)}."
                    )
                if kind == "gradient" and tensor.dtype not in _REAL:
                    raise ValueError(f"Expected the gradient of {name!r} in floating point, but got {tensor.dtype}.")
                if tensor.dtype not in (*_REAL, *WHOLE, torch.bool):
                    raise ValueError(f"Expected the {kind} of {name!r} as real numbers, but got {tensor.dtype}.")
                if tensor.is_floating_point() and not _all_finite(tensor):
                    where = ""
                    if leading:
                        finite = torch.isfinite(tensor).reshape(victims, -1).all(1)
                        bad = self.ids[~finite.cpu()].tolist()
                        where = f" (victims {bad[:5]}{', ...' if len(bad) > 5 else ''})"
                    raise ValueError(f"Expected finite numbers in the {kind} of {name!r}, but got NaN or inf{where}.")
        if self.labels is not None:
            check_labels(self.labels, victims, self.protocol)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the protocol in its header.

        Raises:
            OSError: the file can't be written.
        """
        tensors = {f"gradients/{name}": tensor for name, tensor in self.gradients.items()}
        tensors |= {f"state/{name}": tensor for name, tensor in self.state.items()}
        tensors["ids"] = self.ids
        if self.labels is not None:
            tensors["labels"] = self.labels
        header = {
            "protocol": json.dumps(dataclasses.asdict(self.protocol)),
            "own_weights": json.dumps(self.own_weights),
        }
        write_safetensors(path, _FORMAT, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharedGradient:
        """Read a file that :meth:`save` or another federated-learning system wrote.

        The file holds the tensors ``gradients/<name>`` of shape ``(V, *shape)``, ``state/<name>``, ``ids (V,)`` and,
        if known, ``labels (V, N)``. Its header has the entries ``format`` (``leakage.SharedGradient``), ``version``
        (``1``), ``protocol`` (JSON, the attributes of :class:`Protocol`; those with a default may be missing) and
        ``own_weights`` (JSON). No code in the file is ever run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is of another kind, truncated, or has a wrong header.
        """
        header, tensors = read_safetensors(path, _FORMAT)
        try:
            protocol = Protocol(**header_value(header, "protocol"))
            own_weights = header_value(header, "own_weights")
            if not isinstance(own_weights, bool):
                raise ValueError(f"Expected `own_weights` to be true or false, but got {own_weights!r}.")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"Expected a protocol in the header of '{path}', but got: {shorten(error)}") from error

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        if "ids" not in tensors:
            raise ValueError(f"Expected a tensor 'ids' in '{path}', but got {shorten(sorted(tensors)[:5])}.")
        shared = cls(
            gradients=under("gradients/"),
            state=under("state/"),
            ids=tensors["ids"],
            protocol=protocol,
            own_weights=own_weights,
            labels=tensors.get("labels"),
        )
        try:
            shared.check()
        except ValueError as error:
            raise ValueError(f"Expected a valid shared gradient in '{path}', but got: {shorten(error)}") from error
        return shared


def _all_finite(tensor: Tensor) -> bool:
    # The extremes are NaN if any number is NaN; `isfinite` of all numbers takes thirty times as long.
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))
