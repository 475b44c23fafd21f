"""Victims made from a data set of labelled images."""

from __future__ import annotations

import hashlib
import os
import typing
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from leakage.clients.losses import LOSSES
from leakage.clients.protocol import check_local_steps
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.errors import check_choice, check_count, check_flag
from leakage.models import LeNet
from leakage.seeds import derive_seed

# Victims whose images one worker decodes at a time.
_DECODED_AT_ONCE = 64
# Victims whose reconstructions are scored at a time.
_SCORED_AT_ONCE = 256


class LabelledImages(typing.Protocol):
    """Items ``(image, label)``: float ``(C, H, W)`` in [0, 1], and a class index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


class ImageVictims(VictimDataModule):
    r"""Clients that each hold ``num_images`` images of a data set, no image twice.

    With :math:`\pi_s` a permutation of the data set drawn from the seed alone, victim i holds the
    images :math:`\pi_s(iN), \ldots, \pi_s(iN + N - 1)`: the same whatever the number of victims,
    the lanes, the workers or the processes. The global random state is left as it was.

    A subclass supplies :meth:`open_images`.

    Args:
        victims: number of victims.
        num_images: N, the images behind one gradient.
        seed: decides images and networks.
        lanes: victims that are attacked at once, see :class:`VictimDataModule`.
        model: the clients' network, images in [0, 1] to logits; by default a
            :class:`~leakage.LeNet` that fits images and classes.
        weights: ``"own"`` gives every victim a freshly drawn network, ``"shared"`` all of them
            the weights of ``model``. By default own without a ``model``, else shared.
        loss: the clients' training loss, a key of :data:`leakage.clients.losses.LOSSES`.
        reduction: over the images of a step, ``"mean"`` or ``"sum"``.
        local_steps, learning_rate, local_batch_size: the clients' local training, see :class:`~leakage.Victim`.
        reveal_labels: tell the attacker the labels.
        num_workers: processes that decode images.

    Raises:
        ValueError: at construction, an unknown choice or a count out of range; at ``setup``, more
            images wanted than there are, or a model that does not fit images and classes.
    """

    def __init__(
        self,
        *,
        victims: int = 100,
        num_images: int = 1,
        seed: int = 0,
        lanes: int | str = "auto",
        model: nn.Module | None = None,
        weights: str | None = None,
        loss: str = "cross_entropy",
        reduction: str = "mean",
        local_steps: int = 1,
        learning_rate: float | None = None,
        local_batch_size: int | None = None,
        reveal_labels: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(lanes=lanes)
        check_count(victims=victims)
        check_local_steps(num_images, local_steps, learning_rate, local_batch_size)
        check_count(0, seed=seed, num_workers=num_workers)
        check_flag(reveal_labels=reveal_labels)
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}.")
        if weights is None:
            weights = "own" if model is None else "shared"
        check_choice("weights", weights, ("own", "shared"))
        check_choice("loss", loss, LOSSES)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.victims = victims
        self.num_images = num_images
        self.seed = seed
        self.model = model
        self.weights = weights
        self.loss = loss
        self.reduction = reduction
        self.local_steps = local_steps
        self.learning_rate = learning_rate
        self.local_batch_size = local_batch_size
        self.reveal_labels = reveal_labels
        self.num_workers = num_workers

    @abstractmethod
    def open_images(self) -> tuple[LabelledImages, int]:
        """The images, each decoded when it is asked for, and the number of classes."""

    def setup(self, stage: str | None = None) -> None:
        """Draw the victims' images and build their network; later calls do nothing."""
        if hasattr(self, "victim"):
            return
        self._images, num_classes = self.open_images()
        available, wanted = len(self._images), self.victims * self.num_images
        if wanted > available:
            raise ValueError(
                f"Expected `victims` * `num_images` to be at most the {available} images of the data set, "
                f"but got {self.victims} * {self.num_images} = {wanted}."
            )
        order = torch.randperm(available, generator=torch.Generator().manual_seed(self.seed))
        self._order = order[:wanted].view(self.victims, self.num_images)
        channels, height, width = self._images[int(self._order[0, 0])][0].shape
        model = self.model
        if model is None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed)
                model = LeNet(channels=channels, image_size=(height, width), num_classes=num_classes)
        victim = Victim(
            model,
            image_shape=(channels, height, width),
            num_images=self.num_images,
            loss=self.loss,
            reduction=self.reduction,
            local_steps=self.local_steps,
            learning_rate=self.learning_rate,
            local_batch_size=self.local_batch_size,
        )
        if victim.protocol.num_classes < num_classes:
            raise ValueError(
                f"Expected `model` to have a logit for each of the {num_classes} classes of the data set, "
                f"but got {victim.protocol.num_classes}."
            )
        if self.weights == "own":
            victim.fresh_states([self.seed])  # a module that can't be drawn anew shall fail now
        self.check_images(self._order.flatten().tolist(), victim.protocol.image_shape)
        self.victim = victim

    def check_images(self, indices: list[int], image_shape: tuple[int, ...]) -> None:
        """Raise an error for an image that can't be used; a data set known to be sound needs no check.

        Args:
            indices: the images of all victims.
            image_shape: ``(C, H, W)`` of the first victim's first image.
        """

    def share(self, victims: Sequence[int]) -> SharedGradient:
        """The gradients of the victims at these places, in the precision of their network."""
        truth = GroundTruth.cat(list(self._load(victims, _DECODED_AT_ONCE)))
        states = None
        if self.weights == "own":
            states = self.victim.fresh_states([derive_seed(self.seed, victim, "weights") for victim in victims])
        return self.victim.share(
            truth.images.to(next(self.victim.model.parameters()).dtype),
            truth.labels,
            states=states,
            ids=truth.ids,
            reveal_labels=self.reveal_labels,
        )

    def val_dataloader(self) -> DataLoader[GroundTruth]:
        """The ground truth of the victims that are audited, in order."""
        return self._load(range(self.victims) if self.audited is None else self.audited, _SCORED_AT_ONCE)

    def _load(self, victims: Sequence[int], batch_size: int) -> DataLoader[GroundTruth]:
        return DataLoader(
            _VictimImages(self._images, self._order),
            batch_size=batch_size,
            sampler=_Just(victims),
            num_workers=self.num_workers,
            collate_fn=GroundTruth.cat,
            generator=torch.Generator(),  # else the loader advances the global one
        )

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """As in the base class, with what the victims' images, networks and losses depend on."""
        self.setup("fit")
        first = _VictimImages(self._images, self._order)[0]
        return super().configuration | {
            "num_images": self.num_images,
            "seed": self.seed,
            "weights": self.weights if self.weights == "own" else digest(self.victim.state),
            "loss": self.loss,
            "reduction": self.reduction,
            "local_steps": self.local_steps,
            "learning_rate": self.learning_rate,
            "local_batch_size": self.victim.protocol.local_batch_size,
            "reveal_labels": self.reveal_labels,
            "first_victim": digest({"images": first.images, "labels": first.labels}),
        }


class _Just(DistributedSampler[GroundTruth]):
    """The victims that are asked for; of this type, so that Lightning does not deal them out to the processes again."""

    def __init__(self, victims: Sequence[int]) -> None:
        self.victims = victims

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(self.victims)

    def __len__(self) -> int:
        return len(self.victims)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the order is always the same."""


class _VictimImages(Dataset[GroundTruth]):
    """The ground truth victim by victim; all that a worker runs."""

    def __init__(self, images: LabelledImages, order: Tensor) -> None:
        self.images = images
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, victim: int) -> GroundTruth:
        images, labels = zip(*(self.images[index] for index in self.order[victim].tolist()), strict=True)
        return GroundTruth(
            ids=torch.tensor([victim]),
            images=torch.stack(images)[None],
            labels=torch.tensor([int(label) for label in labels])[None],
        )


def data_folder(root: str | os.PathLike[str] | None) -> Path:
    """``root``, else the environment variable ``LEAKAGE_DATA``, else ``~/.cache/leakage``."""
    return Path(root or os.environ.get("LEAKAGE_DATA") or "~/.cache/leakage").expanduser()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of tensors, to recognise them.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)}) != digest({"a": torch.ones(2)})
        True
    """
    hashed = hashlib.sha256()
    for name, tensor in tensors.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]
