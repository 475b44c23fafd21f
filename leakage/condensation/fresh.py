"""Networks as the paper has them: drawn anew, and trained on the synthetic images between two steps."""

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
    """What the synthetic images move towards in one step.

    Attributes:
        targets: what real images say, ``(K, *shape)`` by name.
        transforms: what the images of each class went through, or None.
        real_images: that were looked at for it.
    """

    targets: dict[str, Tensor]
    transforms: list[Transform] | None
    real_images: int


@dataclass
class Networks:
    """The networks that images are matched on, one after another, all with the modules of ``network``.

    Attributes:
        network: takes the weights of each.
        data: real images.
        matching: what real and synthetic images shall have in common.
        clusters: that the real images are chosen from, or None for those of the batch.
        augmentation: for real and synthetic images of a class alike, or None.
        options: of the condensation, by the names of its arguments.
        loops: (outer, inner).
        clock: counts the time of a part of the run.
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
        """Put the network of a step into its place, and take what there is to match."""
        raise NotImplementedError

    def after(self, step: int, images: Tensor) -> None:
        """What becomes of the network once the synthetic images have made their step; ``step`` are complete.

        Images are ``(K * M, C, H, W)`` as networks get them, class by class.
        """

    def generator(self, index: int, stream: str) -> torch.Generator:
        """Random numbers of one purpose and one index."""
        return torch.Generator().manual_seed(derive_seed(self.options["seed"], index, stream))

    def take(self, index: int, classes: Sequence[Tensor]) -> Goal:
        """What real images of each class say, under transforms of their own where there is augmentation."""
        transforms: list[Transform] | None = None
        if self.augmentation is not None:  # the same for real and synthetic images of a class
            generator = self.generator(index, "augmentation")
            transforms = [self.augmentation.draw(generator) for _ in classes]
        with self.clock("real"):
            if self.clusters is not None:
                classes = self.clusters.choose(self.network, self.generator(index, "clusters"))
            prepare = [self._prepare(transform) for transform in transforms or [nn.Identity()] * len(classes)]
            targets = self.matching.targets(self.network, classes, prepare)
        return Goal(targets, transforms, sum(map(len, classes)))

    def match(self, goal: Goal, images: Tensor) -> tuple[Tensor, Tensor]:
        """Distances ``(K,)`` of synthetic images ``(K, M, C, H, W)`` to the goal, and their derivatives."""
        return self.matching.match(self.network, goal.targets, images, goal.transforms)

    def split(self, batch: ClassBatch) -> tuple[Tensor, ...]:
        """The images of each class."""
        return torch.split(batch.images, torch.bincount(batch.labels, minlength=self.data.num_classes).tolist())

    def normalise(self, images: Tensor) -> Tensor:
        """Real images as the network takes them."""
        return self.data.normalise(images).to(next(self.network.parameters()).dtype)

    def _prepare(self, transform: Transform) -> Transform:
        return lambda images: transform(self.normalise(images))


class FreshNetworks(Networks):
    """Each network is drawn anew and has ``outer`` steps, between which it is trained on the synthetic images."""

    def goal(self, batch: ClassBatch) -> Goal:
        """Draw the network at the first step of an iteration; what the batch says."""
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
