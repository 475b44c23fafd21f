"""The networks of the published protocol: drawn anew, and trained on the synthetic images between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leakage.condensation.augmentation import SiameseAugmentation
from leakage.condensation.kmeans import Clusters
from leakage.condensation.matching import Matching, Transform
from leakage.condensation.networks import take_statistics, train_on
from leakage.datamodules.labelled import ClassBatch, LabelledImages
from leakage.models import draw_state
from leakage.seeds import derive_seed


@dataclass(frozen=True)
class Goal:
    """The target of the synthetic images in one step.

    Attributes:
        targets: the statistics of the real images, ``(K, *shape)`` by name.
        transforms: the transform of the images of each class, or None.
        real_images: number of real images used for the targets.
    """

    targets: dict[str, Tensor]
    transforms: list[Transform] | None
    real_images: int


@dataclass
class Networks:
    """The sequence of networks that images are matched on, all of the architecture of ``network``.

    Attributes:
        network: the module that is loaded with the weights of each network.
        data: the data set of the real images.
        matching: the statistic to match on real and synthetic images.
        clusters: chooses the real images; None for those of the batch.
        augmentation: applied to real and synthetic images of a class, or None.
        options: arguments of the condensation, by name.
        loops: (outer, inner).
        clock: a context manager that adds the time of a part of the run.
    """

    network: nn.Module
    data: LabelledImages
    matching: Matching
    clusters: Clusters | None
    augmentation: SiameseAugmentation | None
    options: dict[str, Any]
    loops: tuple[int, int]
    clock: Callable[[str], AbstractContextManager[None]]

    def goal(self, batch: ClassBatch) -> Goal:
        """Load the network of a step, and compute the targets of the real images."""
        raise NotImplementedError

    def after(self, step: int, images: Tensor) -> None:
        """Change the network after a step of the synthetic images; ``step`` is the number of complete steps.

        The images are ``(K * M, C, H, W)``, normalised, class by class.
        """

    def generator(self, index: int, stream: str) -> torch.Generator:
        """Return the random generator of one purpose and index."""
        return torch.Generator().manual_seed(derive_seed(self.options["seed"], index, stream))

    def take(self, index: int, classes: Sequence[Tensor]) -> Goal:
        """Compute the targets of the real images, under one random transform per class if there is augmentation."""
        transforms: list[Transform] | None = None
        if self.augmentation is not None:
            generator = self.generator(index, "augmentation")
            transforms = [self.augmentation.draw(generator) for _ in classes]
        with self.clock("real"):
            if self.clusters is not None:
                classes = self.clusters.choose(self.network, self.generator(index, "clusters"))
            prepare = [self._prepare(transform) for transform in transforms or [nn.Identity()] * len(classes)]
            targets = self.matching.targets(self.network, classes, prepare)
        return Goal(targets, transforms, sum(map(len, classes)))

    def match(self, goal: Goal, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances ``(K,)`` of synthetic images ``(K, M, C, H, W)`` to the goal, and their derivatives."""
        return self.matching.match(self.network, goal.targets, images, goal.transforms)

    def split(self, batch: ClassBatch) -> tuple[Tensor, ...]:
        """Split a batch into the images of each class."""
        return torch.split(batch.images, torch.bincount(batch.labels, minlength=self.data.num_classes).tolist())

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise real images, in the precision of the network."""
        return self.data.normalise(images).to(next(self.network.parameters()).dtype)

    def _prepare(self, transform: Transform) -> Transform:
        return lambda images: transform(self.normalise(images))


class FreshNetworks(Networks):
    """Networks drawn anew, each for ``outer`` steps, and trained on the synthetic images between steps."""

    def goal(self, batch: ClassBatch) -> Goal:
        """Draw the network at the first step of an iteration, and compute the targets of the batch."""
        classes = self.split(batch)
        outer, _ = self.loops
        with self.clock("network"):
            if batch.step % outer == 0:
                state = draw_state(self.network, derive_seed(self.options["seed"], batch.step // outer, "network"))
                self.network.load_state_dict(state, strict=False)
            take_statistics(self.network, self.data, classes)
        return self.take(batch.step, classes)

    def after(self, step: int, images: Tensor) -> None:
        """Train the network for ``inner`` epochs, but not after the last step of an iteration."""
        outer, inner = self.loops
        if step % outer == 0:
            return
        with self.clock("network"):
            labels = torch.arange(self.data.num_classes, device=images.device)
            train_on(
                self.network,
                images,
                labels.repeat_interleave(len(images) // len(labels)),
                epochs=inner,
                learning_rate=self.options["network_learning_rate"],
                batch_size=self.options["network_batch_size"],
                generator=self.generator(step, "training"),
                augmentation=self.augmentation,
            )
