"""Gradients that real clients shared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import VictimDataModule
from leakage.datamodules.images import digest


class SharedGradientFiles(VictimDataModule):
    """Victims of whom only the shared gradients are known: there is no ground truth, so no validation.

    The files are those of :meth:`leakage.SharedGradient.save`, of one protocol; their victims
    follow one another in the order of ``paths``, and of the names that match a pattern. The
    victims keep their ids, or are numbered from 0 on where ids clash.

    Args:
        paths: files or patterns such as ``"round-*.safetensors"``.
        model: the network that the gradients were taken of; its weights are those in the files.
        lanes: victims that are attacked at once, see :class:`VictimDataModule`.

    Raises:
        ValueError: no paths; at ``setup``, a file that is truncated, of another kind or does not
            fit the model, or files of different protocols.
        FileNotFoundError: at ``setup``, no such file, or none that matches a pattern.

    Example:
        >>> from leakage import LeNet
        >>> data = SharedGradientFiles("clients/*.safetensors", model=LeNet())
        >>> data.setup("fit")  # doctest: +SKIP
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        model: nn.Module,
        lanes: int | str = "auto",
    ) -> None:
        super().__init__(lanes=lanes)
        if not isinstance(model, nn.Module):
            raise ValueError(f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}.")
        patterns = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not patterns:
            raise ValueError(f"Expected `paths` to name at least one file, but got {paths!r}.")
        self.paths = [Path(pattern).expanduser() for pattern in patterns]
        self.model = model

    def setup(self, stage: str | None = None) -> None:
        """Read the files and check them against the model; later calls do nothing."""
        if hasattr(self, "victim"):
            return
        parts = {path: SharedGradient.load(path) for path in self._files()}
        victim = Victim.of(self.model, next(iter(parts.values())).protocol)
        for path, part in parts.items():
            try:
                victim.check(part)
            except ValueError as error:
                raise ValueError(f"Expected '{path}' to fit the model and the other files, but got: {error}") from error
        self._shared = _join(list(parts.values()))
        self.victims = len(self._shared)
        self.reveal_labels = self._shared.labels is not None
        self.victim = victim

    def share(self, victims: Sequence[int]) -> SharedGradient:
        """What the files hold of the victims at these places."""
        return self._shared.select(torch.tensor(victims))

    def _files(self) -> list[Path]:
        files: list[Path] = []
        for path in self.paths:
            matches = [path]
            if not path.exists():  # a pattern, which may be absolute
                matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not matches:
                raise FileNotFoundError(f"Expected safetensors files at '{path}', but got none.")
            files += matches
        return list(dict.fromkeys(files))

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """As in the base class, with a hash of gradients and weights."""
        hashes = {"gradients": digest(self._shared.gradients), "weights": digest(self._shared.state)}
        return super().configuration | hashes


def _join(parts: list[SharedGradient]) -> SharedGradient:
    told = [part.labels is not None for part in parts]
    if any(told) and not all(told):
        raise ValueError("Expected labels in all files or in none, but got them in some.")
    if any(part.own_weights for part in parts) or len({digest(part.state) for part in parts}) > 1:
        parts = [_with_own_weights(part) for part in parts]
    joined = SharedGradient.cat(parts)
    if len(set(joined.ids.tolist())) < len(joined):
        joined.ids = torch.arange(len(joined))
    return joined


def _with_own_weights(part: SharedGradient) -> SharedGradient:
    """The same with a victims' dimension on the weights, as files of several rounds need it."""
    if part.own_weights:
        return part
    state = {name: tensor.expand(len(part), *tensor.shape) for name, tensor in part.state.items()}
    return dataclasses.replace(part, state=state, own_weights=True)
