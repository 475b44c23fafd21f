"""Base classes for the unknowns of a search, and for what they stand for."""

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

# Each restart draws from a distribution wider by this factor, because a start near a failed one would fail again.
_WIDER = 3.0


@dataclass
class Target:
    """What an attack knows before it begins.

    Attributes:
        victim: the clients' network, loss and protocol.
        labels_revealed: whether the clients share the labels.
        own_weights: whether each victim has its own network.
        labels_known: whether labels are known before the search, either revealed or inferred.
    """

    victim: Victim
    labels_revealed: bool = False
    own_weights: bool = False
    labels_known: bool = True


class Dummy(Piece, ABC):
    """Images, class probabilities or another quantity, as a function of an unknown that is searched for.

    The unknown is one tensor for each victim. If the quantity is known, there is no unknown. A subclass defines the
    shape of the unknown, where it starts and what it stands for.

    Attributes:
        writes_all: whether :meth:`write` also accepts a leading victims' dimension, without ``vmap``.
    """

    writes_all: ClassVar[bool] = False

    @abstractmethod
    def shape(self, protocol: Protocol) -> tuple[int, ...] | None:
        """Return the shape of one victim's unknown, or None if nothing is searched for."""

    @abstractmethod
    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return one victim's images ``(N, C, H, W)`` or class probabilities ``(N, K)``.

        The result is differentiable with respect to the unknown. ``torch.func.vmap`` runs this method for many victims,
        so it must not branch on values.

        Args:
            unknown: unknown of this victim, or None if nothing is searched for.
            kept: what :meth:`begin` returned for this victim, without the victims' dimension.
        """

    def write_all(self, unknowns: Tensor | None, kept: State) -> Tensor:
        """Return what :meth:`write` returns for V victims at once; all tensors have a leading victims' dimension."""
        if self.writes_all:
            return self.write(unknowns, kept)
        if unknowns is None:
            return vmap(lambda own: self.write(None, own))(kept)
        return vmap(self.write)(unknowns, kept)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Return where the search begins, ``(V, ...)``.

        Args:
            noise: ``(V, ...)``, normally distributed, from a separate random stream for each victim and restart.
            restarts: ``(V,)``, number of earlier starts of each victim.
        """
        return noise

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if this dummy can't be used on such victims."""

    def state(self, protocol: Protocol, dtype: torch.dtype) -> State:
        """Return empty tensors, with zero victims, for what is kept of each victim during the search."""
        return {}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """Return the entries of :meth:`state` for V victims, computed from what they shared."""
        return {}

    def learnt(self) -> dict[str, Any]:
        """Return what was learnt about the clients' network, as plain values and tensors, for a checkpoint."""
        return {}

    def load_learnt(self, learnt: dict[str, Any]) -> None:
        """Load what :meth:`learnt` returned."""


class Images(Dummy):
    """Base class for dummy images.

    Attributes:
        seeds: number of sets of images in a victim's unknown. If there are several, they are its first dimension, and
            :meth:`write` gets one set at a time. The objective is the mean over the sets plus :meth:`joint`.
    """

    seeds: int = 1

    def joint(self, unknown: Tensor) -> Tensor:
        """Return the term that couples one victim's sets of images ``(seeds, ...)``, a scalar; by default 0."""
        return unknown.new_zeros(())

    def first_starts(
        self, starts: Tensor, shared: SharedGradient, victim: Victim, labels: Tensor | None, seed: int
    ) -> Tensor:
        """Return where the search for new victims begins; all later starts come from :meth:`starts`.

        Args:
            starts: what :meth:`starts` returned for the victims, ``(V, ...)``.
            shared: what the victims shared.
            victim: the victims' network and protocol.
            labels: ``(V, N)``, or None if labels are not known before the search.
            seed: seed of the attack.
        """
        return starts

    def project(self) -> Callable[[Tensor], Tensor] | None:
        """Return the projection of unknowns ``(V, ...)`` to valid values after each step, or None if all are valid."""
        return None

    def preconditioner(self, protocol: Protocol) -> Callable[[Tensor], Tensor] | None:
        """Return the covariance of the unknowns if it is known; see :class:`~leakage.solvers.ImageSpectrum`."""
        return None


class Labels(Dummy):
    """Base class for the class probabilities of dummy images."""

    @property
    def known(self) -> bool:
        """Whether labels are known before the search."""
        return True

    def read(self, probabilities: Tensor) -> Tensor:
        """Return the most probable labels ``(V, N)`` for class probabilities ``(V, N, K)``."""
        return probabilities.argmax(dim=-1)


def widen(noise: Tensor, std: float, restarts: Tensor) -> Tensor:
    """Scale noise ``(V, ...)`` to a standard deviation, times three for each of a victim's restarts."""
    spread = std * _WIDER ** restarts.to(noise)
    return noise * spread.view(-1, *[1] * (noise.ndim - 1))
