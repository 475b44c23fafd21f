"""What is searched for, and how it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import vmap

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.pieces import Piece, State

# Each restart draws from a distribution this much wider: close to the start that failed lies the same failure.
_WIDER = 3.0


@dataclass
class Target:
    """What an attack knows before it begins.

    Attributes:
        victim: the clients' network, loss and protocol.
        labels_revealed: whether what is shared tells the labels.
        own_weights: whether each victim has a network of its own.
        labels_known: whether labels are known before the search, revealed or inferred.
    """

    victim: Victim
    labels_revealed: bool = False
    own_weights: bool = False
    labels_known: bool = True


class Dummy(Piece, ABC):
    """Images or class probabilities, as a function of an unknown that is searched for; or known, without any.

    The unknown is one tensor for each victim. A subclass says its shape, where it starts and what it stands for.

    Attributes:
        writes_all: whether :meth:`write` works on any number of victims as it is, without ``vmap``.
    """

    writes_all: ClassVar[bool] = False

    @abstractmethod
    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """Of one victim's unknown; None if nothing is searched for."""

    @abstractmethod
    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """One victim's images ``(N, C, H, W)`` or class probabilities ``(N, K)``, differentiable by the unknown.

        ``torch.func.vmap`` runs it for many victims: it may not branch on numbers.

        Args:
            unknown: of this victim, None if nothing is searched for.
            kept: what :meth:`begin` gave for this victim, without the victims' dimension.
        """

    def write_all(self, unknowns: Tensor | None, kept: State) -> Tensor:
        """The same for V victims at once, all with their leading dimension."""
        if self.writes_all:
            return self.write(unknowns, kept)
        if unknowns is None:
            return vmap(lambda own: self.write(None, own))(kept)
        return vmap(self.write)(unknowns, kept)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Where the search begins, ``(V, ...)``.

        Args:
            noise: ``(V, ...)``, normally distributed; of a stream for each victim and restart.
            restarts: ``(V,)``, how often the victim has begun before.
        """
        return noise

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if it can't be used on such victims."""

    def state(self, protocol: Protocol, dtype: torch.dtype) -> State:
        """What it keeps of each victim while it is searched for, as tensors without a victim."""
        return {}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """The entries of :meth:`state` for V victims, from what they shared."""
        return {}

    def learnt(self) -> dict[str, Any]:
        """What it has learnt about the clients' network, as plain values and tensors, for a checkpoint."""
        return {}

    def load_learnt(self, learnt: dict[str, Any]) -> None:
        """Take back what :meth:`learnt` gave."""


class Images(Dummy):
    """A way to write images.

    Attributes:
        seeds: how many sets of images a victim's unknown holds. If there are several, they are its first dimension,
            and :meth:`write` is given one of them; the objective is the mean of theirs and what :meth:`joint` adds.
    """

    seeds: int = 1

    def joint(self, unknown: Tensor) -> Tensor:
        """What one victim's sets of images ``(seeds, ...)`` have to do with one another, a scalar; by default 0."""
        return unknown.new_zeros(())

    def first_starts(
        self, starts: Tensor, shared: SharedGradient, victim: Victim, labels: Tensor | None, seed: int
    ) -> Tensor:
        """Where the search for new victims begins; all later starts are those of :meth:`starts`.

        Args:
            starts: what :meth:`starts` gave for them, ``(V, ...)``.
            shared: what they shared.
            victim: their network and protocol.
            labels: ``(V, N)``, None if they are not known before the search.
            seed: of the attack.
        """
        return starts

    def project(self) -> Callable[[Tensor], Tensor] | None:
        """Puts unknowns ``(V, ...)`` back where they may be, after each step; None if they may be anywhere."""
        return None

    def preconditioner(self, protocol: Protocol) -> Callable[[Tensor], Tensor] | None:
        """The covariance that the unknowns have, if it is known: see :class:`~leakage.solvers.ImageSpectrum`."""
        return None


class Labels(Dummy):
    """A way to write class probabilities."""

    @property
    def known(self) -> bool:
        """Whether labels are known before the search."""
        return True

    def read(self, probabilities: Tensor) -> Tensor:
        """The labels ``(V, N)`` that class probabilities ``(V, N, K)`` stand for."""
        return probabilities.argmax(dim=-1)


def widen(noise: Tensor, std: float, restarts: Tensor) -> Tensor:
    """Noise ``(V, ...)`` of this standard deviation, three times as wide for each of a victim's restarts ``(V,)``."""
    spread = std * _WIDER ** restarts.to(noise)
    return noise * spread.view(-1, *[1] * (noise.ndim - 1))
