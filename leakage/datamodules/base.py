"""What DataModules have in common: their configuration; and victims, the truth apart from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from leakage.clients.low_rank import has_low_rank
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_count
from leakage.files.tensors import brief


@dataclass
class GroundTruth:
    """What only the auditor knows of B victims.

    Attributes:
        ids: ``(B,)``, the victims' numbers.
        images: ``(B, N, C, H, W)``, values in [0, 1].
        labels: ``(B, N)``, class indices.
    """

    ids: Tensor
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def cat(parts: Sequence[GroundTruth]) -> GroundTruth:
        """Victims of several parts after one another."""
        return GroundTruth(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


class ConfiguredDataModule(LightningDataModule, ABC):
    """A DataModule that tells a checkpoint what it gives, and refuses to go on from one of other data.

    Attributes:
        holds: what the data are called in the refusal.
    """

    holds: ClassVar[str] = "data"

    @cached_property
    @abstractmethod
    def configuration(self) -> dict[str, Any]:
        """All that decides what the batches hold, as plain numbers and words."""

    def state_dict(self) -> dict[str, Any]:
        """The configuration, for a checkpoint."""
        return dict(self.configuration)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's configuration with this one.

        Raises:
            ValueError: they differ; the message names each entry that does.
        """
        here = self.configuration
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"Expected a checkpoint of the same {self.holds}, but got {brief(repr(state_dict))}.")
        differing = [
            f"{brief(name)} {brief(repr(state_dict.get(name)))} in the checkpoint and {here.get(name)!r} here"
            for name in {**here, **state_dict}
            # by their words, since tensors have no single answer
            if repr(state_dict.get(name)) != repr(here.get(name))
        ]
        if differing:
            raise ValueError(f"Expected a checkpoint of the same {self.holds}, but got {'; '.join(differing)}.")


class VictimDataModule(ConfiguredDataModule):
    """Victims for an attack: what they shared for training, their images for validation.

    Training gives the :class:`~leakage.SharedGradient` of the victims that are :attr:`wanted`, once, and
    ``()`` as long as none are, without end: the attack goes on with the victims it has, asks for
    further ones when it has room and stops the training itself. So one epoch is all victims.
    Validation gives :class:`GroundTruth` of the victims :attr:`audited`, where it is known. The two never share
    a batch.

    A subclass sets :attr:`victim` and :attr:`victims` in ``setup``, :attr:`reveal_labels` and :attr:`own_weights` where
    they hold, and supplies :meth:`share`.

    Attributes:
        victim: the clients' model and protocol, after ``setup``.
        victims: the number of victims.
        reveal_labels: whether what is shared tells the labels.
        own_weights: whether each victim has a network of its own, after ``setup``.
        wanted: the victims of the next training batch by their places from 0 on, None for none.
        audited: the victims that validation shows, None for all; several processes have different ones.

    Args:
        lanes: victims that are attacked at once at most, in each process; ``"auto"`` finds how many pay and fit into
            the memory (:func:`leakage.inversion.memory.choose_lanes`). What becomes of a victim does not depend on it,
            but for rounding.

    Raises:
        ValueError: ``lanes`` that are no whole number of at least 1 and not ``"auto"``.
    """

    holds = "victims"
    victim: Victim
    victims: int
    reveal_labels: bool = False
    own_weights: bool = False

    def __init__(self, *, lanes: int | str = "auto") -> None:
        super().__init__()
        if lanes != "auto":
            if isinstance(lanes, str):
                raise ValueError(f"Expected `lanes` to be a whole number of at least 1 or 'auto', but got {lanes!r}.")
            check_count(lanes=lanes)
        self.lanes = lanes
        self.wanted: Sequence[int] | None = None
        self.audited: Sequence[int] | None = None

    @property
    def low_rank(self) -> bool:
        """Whether attacks may take the gradient of the last layer in fewer numbers, after ``setup``."""
        return has_low_rank(self.victim)

    @abstractmethod
    def share(self, victims: Sequence[int]) -> SharedGradient:
        """What the victims at these places shared, in this order."""

    def train_dataloader(self) -> DataLoader[SharedGradient | tuple[()]]:
        """The victims that are wanted, once each time; else ``()``, without end."""
        # The default would make a list of the empty tuple, and a loader without a generator advances the global one.
        return DataLoader(_Wanted(self), batch_size=None, collate_fn=lambda batch: batch, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[GroundTruth] | list[Any]:
        """The ground truth of the victims that are audited, in order; an empty list where it is not known."""
        return []

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """All that decides which victims there are and what they share, as plain numbers and words."""
        self.setup("fit")
        return {"data": type(self).__name__, "victims": self.victims, "network": self.victim.fingerprint()}


class _Wanted(IterableDataset[SharedGradient | tuple[()]]):
    def __init__(self, datamodule: VictimDataModule) -> None:
        self.datamodule = datamodule

    def __iter__(self) -> Iterator[SharedGradient | tuple[()]]:
        data = self.datamodule
        while True:
            victims, data.wanted = data.wanted, None
            yield data.share(victims) if victims else ()
