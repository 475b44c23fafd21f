"""Base classes of the DataModules: a configuration for checkpoints, and victims kept apart from their ground truth."""

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
from leakage.files.tensors import shorten


@dataclass
class GroundTruth:
    """What only the auditor knows about B victims.

    Attributes:
        ids: ``(B,)``, the victims' numbers.
        images: ``(B, N, C, H, W)``, values in [0, 1].
        labels: ``(B, N)``, class indices; for soft labels and values, the index of the largest one.
        soft: ``(B, N, K)``, labels that are not classes; otherwise None.
    """

    ids: Tensor
    images: Tensor
    labels: Tensor
    soft: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def cat(parts: Sequence[GroundTruth]) -> GroundTruth:
        """Concatenate the victims of several parts."""
        held = [name for name, value in vars(parts[0]).items() if value is not None]
        return GroundTruth(**{name: torch.cat([vars(part)[name] for part in parts]) for name in held})


class ConfiguredDataModule(LightningDataModule, ABC):
    """A DataModule that saves its configuration in checkpoints and rejects checkpoints of other data.

    Attributes:
        holds: what the error message calls the data.
    """

    holds: ClassVar[str] = "data"

    @cached_property
    @abstractmethod
    def configuration(self) -> dict[str, Any]:
        """Everything that determines the contents of the batches, as plain numbers and strings."""

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration, for a checkpoint."""
        return dict(self.configuration)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint has the configuration of this DataModule.

        Raises:
            ValueError: the configurations differ; the message names every entry that does.
        """
        here = self.configuration
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"Expected a checkpoint of the same {self.holds}, but got {shorten(repr(state_dict))}.")
        differing = [
            f"{shorten(name)} {shorten(repr(state_dict.get(name)))} in the checkpoint and {here.get(name)!r} here"
            for name in {**here, **state_dict}
            # Compare the reprs, since comparing tensors does not give a single bool.
            if repr(state_dict.get(name)) != repr(here.get(name))
        ]
        if differing:
            raise ValueError(f"Expected a checkpoint of the same {self.holds}, but got {'; '.join(differing)}.")


class VictimDataModule(ConfiguredDataModule):
    """Victims for an attack: their shared gradients for training, their images for validation.

    A training batch holds the :class:`~leakage.SharedGradient` of the victims in :attr:`wanted`, once. While none are
    wanted the batches are ``()``, without end: the attack works on the victims it has, asks for more when it has room,
    and stops the training itself. One epoch therefore covers all victims. A validation batch holds the
    :class:`GroundTruth` of the victims in :attr:`audited`, if it is known. The two never share a batch.

    A subclass sets :attr:`victim` and :attr:`victims` in ``setup``, sets :attr:`reveal_labels` and :attr:`own_weights`
    where they are true, and implements :meth:`share`.

    Attributes:
        victim: the clients' model and protocol, after ``setup``.
        victims: the number of victims.
        reveal_labels: whether the labels are shared along with the gradients.
        own_weights: whether each victim has its own network, after ``setup``.
        wanted: positions (from 0) of the victims in the next training batch; None for no victims.
        audited: positions of the victims in validation; None for all. It differs between processes.

    Args:
        lanes: the most victims that each process attacks at once; ``"auto"`` chooses as many as are worthwhile and fit
            into memory (:func:`leakage.inversion.memory.choose_lanes`). The result for a victim does not depend on it,
            except for rounding.

    Raises:
        ValueError: ``lanes`` is neither ``"auto"`` nor a whole number of at least 1.
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
        """Whether attacks may represent the gradient of the last layer by fewer numbers, after ``setup``."""
        return has_low_rank(self.victim)

    @abstractmethod
    def share(self, victims: Sequence[int]) -> SharedGradient:
        """Return what the victims at these positions shared, in this order."""

    def train_dataloader(self) -> DataLoader[SharedGradient | tuple[()]]:
        """Load the victims in :attr:`wanted` once each time they are set; otherwise ``()``, without end."""
        # The default collation turns the empty tuple into a list, and a loader without a generator advances the global
        # one.
        return DataLoader(_Wanted(self), batch_size=None, collate_fn=lambda batch: batch, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[GroundTruth] | list[Any]:
        """Load the ground truth of the audited victims in order; an empty list if it is not known."""
        return []

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Everything that determines the victims and what they share, as plain numbers and strings."""
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
