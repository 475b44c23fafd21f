"""Victims of which only the shared gradients are known."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from leakage.clients.low_rank import is_of_low_rank
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import VictimDataModule
from leakage.pieces import digest

# A shared gradient, the path of its file, or a pattern for several files.
AnyShared: TypeAlias = SharedGradient | str | os.PathLike[str]
_KINDS = (SharedGradient, str, os.PathLike)


class SharedGradients(VictimDataModule):
    """Victims of which only the shared gradients are known: without ground truth, there is no validation.

    All gradients have the same protocol. The victims are in the order of ``shared``, and within a pattern in the order
    of the file names. They keep their ids; if ids clash, all victims are numbered from 0.

    Args:
        shared: a :class:`~leakage.SharedGradient`, the path of a file written by :meth:`leakage.SharedGradient.save`,
            a pattern such as ``"round-*.safetensors"``, or a list of these.
        victim: the client whose gradients these are, or only its network; the rest is then taken from the protocol of
            the gradients. The weights are those saved with the gradients.
        lanes: victims that are attacked at once, see :class:`VictimDataModule`.

    Raises:
        ValueError: ``shared`` is empty or of another type, or ``victim`` is neither a client nor a network; at
            ``setup``, a file is truncated or of another kind, or the gradients do not fit the victim or one another.
        FileNotFoundError: at ``setup``, a file does not exist, or no file matches a pattern.

    Example:
        >>> from leakage import LeNet, Victim
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28))
        >>> shared = victim.share(torch.rand(5, 1, 1, 28, 28), torch.randint(10, (5, 1)))
        >>> data = SharedGradients(shared, victim)
        >>> data.setup("fit")
        >>> data.victims
        5
        >>> files = SharedGradients("clients/*.safetensors", LeNet())
        >>> files.setup("fit")  # doctest: +SKIP
    """

    def __init__(
        self,
        shared: AnyShared | list[AnyShared] | tuple[AnyShared, ...],
        victim: Victim | nn.Module,
        *,
        lanes: int | str = "auto",
    ) -> None:
        super().__init__(lanes=lanes)
        if not isinstance(victim, Victim | nn.Module):
            raise ValueError(f"Expected `victim` to be a Victim or a torch.nn.Module, but got {type(victim).__name__}.")
        parts = list(shared) if isinstance(shared, list | tuple) else [shared]
        if not parts:
            raise ValueError(f"Expected `shared` to hold at least one shared gradient or path, but got {shared!r}.")
        for part in parts:
            if not isinstance(part, _KINDS):
                raise ValueError(
                    f"Expected `shared` as a SharedGradient, a path, or a list of these, but got {type(part).__name__}."
                )
        self.shared = parts
        # The user's own network, so that the command line can put it into evaluation mode.
        self.model = victim if isinstance(victim, nn.Module) else None
        self._given = victim

    def setup(self, stage: str | None = None) -> None:
        """Read the files and check all gradients against the victim. Later calls do nothing."""
        if hasattr(self, "victim"):
            return
        parts = self._read()
        victim = self._given
        if isinstance(victim, nn.Module):
            victim = Victim.of(victim, next(iter(parts.values())).protocol)
        for name, part in parts.items():
            try:
                victim.check(part)
            except ValueError as error:
                raise ValueError(f"Expected {name} to fit the victim and the others, but got: {error}") from error
        self._shared = _join(list(parts.values()))
        self.victims = len(self._shared)
        self.reveal_labels = self._shared.labels is not None
        self.own_weights = self._shared.own_weights
        self.victim = victim

    @cached_property
    def low_rank(self) -> bool:
        """Whether the gradients of the last layer that were shared can be represented by fewer numbers."""
        return is_of_low_rank(self._shared, self.victim)

    def share(self, victims: Sequence[int]) -> SharedGradient:
        """Return what the victims at these positions shared, in this order."""
        return self._shared.select(torch.tensor(victims))

    def _read(self) -> dict[str, SharedGradient]:
        """Read everything that was shared, each file once. The keys are names for error messages."""
        parts: dict[str, SharedGradient] = {}
        for number, part in enumerate(self.shared):
            if isinstance(part, SharedGradient):
                parts[f"`shared[{number}]`"] = part.to("cpu")
                continue
            path = Path(part).expanduser()
            matches = [path]
            if not path.exists():  # a pattern, which may be absolute
                matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not matches:
                raise FileNotFoundError(f"Expected safetensors files at '{path}', but got none.")
            parts |= {f"'{file}'": SharedGradient.load(file) for file in matches if f"'{file}'" not in parts}
        return parts

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """The configuration of the base class, and hashes of the gradients and weights."""
        configuration = super().configuration
        hashes = {"gradients": digest(self._shared.gradients), "weights": digest(self._shared.state)}
        return configuration | hashes


def _join(parts: list[SharedGradient]) -> SharedGradient:
    labelled = [part.labels is not None for part in parts]
    if any(labelled) and not all(labelled):
        raise ValueError("Expected labels with all shared gradients or with none, but got them with some.")
    if any(part.own_weights for part in parts) or len({digest(part.state) for part in parts}) > 1:
        parts = [_with_own_weights(part) for part in parts]
    joined = SharedGradient.cat(parts)
    if len(set(joined.ids.tolist())) < len(joined):
        joined = dataclasses.replace(joined, ids=torch.arange(len(joined)))
    return joined


def _with_own_weights(part: SharedGradient) -> SharedGradient:
    """Add a victims' dimension to the weights, which gradients of several rounds need."""
    if part.own_weights:
        return part
    state = {name: tensor.expand(len(part), *tensor.shape) for name, tensor in part.state.items()}
    return dataclasses.replace(part, state=state, own_weights=True)
