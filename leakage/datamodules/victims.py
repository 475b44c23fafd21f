"""Victims that hold images of a labelled data set."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from leakage.clients.losses import OWN
from leakage.clients.protocol import Protocol, protocol_rate
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.datamodules.draws import check_distribution, draw_victims
from leakage.datamodules.sources import AnySource, OpenSource, Source
from leakage.defenses.base import Defense, check_defenses
from leakage.errors import check_choice, check_count, check_flag
from leakage.models import LeNet
from leakage.pieces import digest
from leakage.seeds import derive_seed

# The entries of a protocol that describe the clients' training, not their images or network.
_OF_THE_CLIENT = (
    "num_images",
    "loss",
    "reduction",
    "local_steps",
    "learning_rate",
    "local_batch_size",
    "momentum",
    "weight_decay",
    "shuffle",
    "label_smoothing",
    "class_weights",
    "label_kind",
)
# Victims whose images one worker decodes at a time.
_DECODED_AT_ONCE = 64
# Victims whose reconstructions are scored at a time.
_SCORED_AT_ONCE = 256
# The most images, evenly spaced over the victims, whose hash identifies a data set in a checkpoint.
_RECOGNISED_BY = 8


class Victims(VictimDataModule):
    r"""Clients that each hold a few images of a data set, none of them twice.

    Let :math:`\pi_s` be a permutation of the data set that depends on the seed alone. Victim i holds the images
    :math:`\pi_s(iN), \ldots, \pi_s(iN + N - 1)`, independent of the number of victims, lanes, workers and processes.
    With ``labels`` the images are drawn by :func:`~leakage.datamodules.draw_victims` instead, and two victims may hold
    the same image. The global random state does not change.

    ====================== =================================================================================
    ``dataset``            images
    ====================== =================================================================================
    ``"mnist"``            handwritten digits, 60,000 and 10,000 of (1, 28, 28), 10 classes (LeCun et al. 1998)
    ``"fashion_mnist"``    clothes, same numbers and shape (Xiao et al. 2017, https://arxiv.org/abs/1708.07747)
    ``"cifar10"``          photographs, 50,000 and 10,000 of (3, 32, 32), 10 classes (Krizhevsky 2009)
    ``"cifar100"``         photographs, same numbers and shape, 100 classes (Krizhevsky 2009)
    ``"svhn"``             house numbers, 73,257 and 26,032 of (3, 32, 32), 10 classes (Netzer et al. 2011)
    ``"lfw"``              faces, 13,233 photographs of 5,749 persons, scaled to (3, 32, 32) (Huang et al. 2007);
                           not downloaded; each network has 4.4 million parameters
    ``"sample"``           the bundled sample: 1,000 of FashionMNIST's test images, 100 of each class
    the path of a folder   ``<folder>/<class>/<image>``, or ``<folder>/train/<class>/<image>`` and the same in
                           ``test/``; classes are numbered in the order of their names
    a map-style Dataset    items (image, label): a PIL image, or a tensor ``(C, H, W)`` of uint8 or floats in [0, 1],
                           not normalised and equal on every access; and a class index
    ====================== =================================================================================

    The images of all victims are decoded once at ``setup``, so that a broken image fails before the attack.

    Attributes:
        name: the name of the data set.

    Args:
        dataset: a name, a folder or a Dataset, as in the table above.
        victims: number of victims.
        images: N, the number of images behind one gradient.
        seed: determines the images, the networks and the noise of defenses.
        labels: the distribution of each victim's labels: None for the permutation above, or ``"uniform"``,
            ``"single-class"``, ``"distinct"`` or ``"dirichlet:A"``, see :func:`~leakage.datamodules.draw_victims`.
        lanes: victims that are attacked at once, see :class:`VictimDataModule`.
        model: the clients' network, from images in [0, 1] to logits; by default a
            :class:`~leakage.LeNet` that fits images and classes.
        weights: ``"own"`` draws a new network for every victim; ``"shared"`` gives all of them the weights of
            ``model``. The default is ``"own"`` without a ``model``, else ``"shared"``.
        loss: the clients' training loss, a key of :data:`leakage.clients.losses.LOSSES`, or ``"own"`` for that of the
            model, see :class:`~leakage.Victim`.
        reduction: reduction of the loss over the images of a step, ``"mean"`` or ``"sum"``.
        local_steps, learning_rate, local_batch_size, momentum, weight_decay, shuffle: the clients' local training, see
            :class:`~leakage.Victim`.
        reveal_learning_rate: whether the attacker knows the learning rate; if not, it is searched for together with
            the images.
        reveal_labels: whether the attacker knows the labels.
        defenses: what clients do to their gradients before they share them, see :class:`~leakage.Victim`.
        label_smoothing, class_weights: options of cross-entropy, see :class:`~leakage.Victim`.
        label_kind: what the labels of a Dataset are: ``"classes"``, or with items (image, tensor ``(K,)``)
            ``"probabilities"`` or ``"values"``, see :class:`~leakage.Victim`.
        split: ``"train"`` or ``"test"``, for data sets that have both.
        root: the folder of a named data set; by default the environment variable ``LEAKAGE_DATA``, else
            ``~/.cache/leakage``.
        download: whether to download a torchvision data set if it is missing.
        image_size: height and width to scale and crop a folder's images to; one number for square images. By default
            images are not scaled; they must all have the same size, of at most 2**24 pixels. No image may exceed
            Pillow's safety limit of 89 million pixels.
        channels: channels of a folder's images, 3 for RGB (the default) or 1 for grey; images are converted if needed.
        num_classes: number of classes of a Dataset; by default the number of its ``classes``, else one more than the
            largest of its ``targets`` or ``labels``.
        num_workers: processes that decode images.

    Raises:
        ValueError: at construction, a choice is unknown, a count is out of range, or the data set does not take an
            option; at ``setup``, the data set has too few images, an image can't be used (the message names it),
            images differ in size, there are fewer than two classes, or the model does not fit images and classes.
        FileNotFoundError: at construction, the data set does not exist; at ``prepare_data`` or ``setup``, it is
            missing and can't be downloaded, or is a folder without class folders or images.

    Example:
        >>> data = Victims("sample", victims=3)
        >>> data.setup("fit")
        >>> shared = data.share(range(3))
        >>> len(shared), shared.labels
        (3, None)

        Your own data set:

        >>> from torch.utils.data import TensorDataset
        >>> noise = TensorDataset(torch.rand(40, 3, 16, 16), torch.arange(40) % 4)
        >>> data = Victims(noise, victims=5, images=8, labels="single-class")
        >>> data.setup("fit")
        >>> data.victim.protocol.num_classes
        4
    """

    name: str

    def __init__(
        self,
        dataset: AnySource,
        *,
        victims: int = 100,
        images: int = 1,
        seed: int = 0,
        labels: str | None = None,
        lanes: int | str = "auto",
        model: nn.Module | None = None,
        weights: str | None = None,
        loss: str = "cross_entropy",
        reduction: str = "mean",
        local_steps: int = 1,
        learning_rate: float | None = None,
        local_batch_size: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        shuffle: bool = False,
        reveal_learning_rate: bool = True,
        reveal_labels: bool = False,
        defenses: Sequence[Defense] = (),
        label_smoothing: float = 0.0,
        class_weights: tuple[float, ...] | None = None,
        label_kind: str = "classes",
        split: str = "train",
        root: str | os.PathLike[str] | None = None,
        download: bool = True,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        num_classes: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(lanes=lanes)
        check_count(victims=victims, images=images)
        check_count(0, seed=seed, num_workers=num_workers)
        check_flag(reveal_labels=reveal_labels)
        if labels is not None:
            check_distribution("labels", labels)
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}.")
        if weights is None:
            weights = "own" if model is None else "shared"
        check_choice("weights", weights, ("own", "shared"))
        # Check what can be checked of the protocol before there is a model or an image.
        if isinstance(learning_rate, str):
            raise ValueError(
                f"Expected `learning_rate` as the number that the clients use, but got {learning_rate!r}. To hide it "
                "from the attacker, pass the number and reveal_learning_rate=False."
            )
        rate = protocol_rate(learning_rate, reveal=reveal_learning_rate)
        steps = (local_steps, rate, local_batch_size, momentum, weight_decay, shuffle)
        of_loss: dict[str, Any] = {"label_smoothing": label_smoothing, "class_weights": class_weights}
        of_loss["label_kind"] = label_kind
        classes = len(class_weights) if isinstance(class_weights, list | tuple) else 2
        protocol = Protocol((1, 1, 1), classes, images, loss, reduction, *steps, **of_loss)
        check_choice("split", split, ("train", "test"))
        self.source = Source(
            dataset, root=root, download=download, image_size=image_size, channels=channels, num_classes=num_classes
        )
        if split == "test" and not self.source.parts:
            raise ValueError(
                f"Expected `split` 'train' with {self.source.name!r}, which has no separate test images, but got "
                "'test'."
            )
        if label_kind != "classes" and (self.source.kind != "own" or labels is not None):
            raise ValueError(
                f"Expected a Dataset whose items have labels (K,), and no `labels`, with `label_kind` {label_kind!r}, "
                f"but got {self.source.name!r} and {labels!r}."
            )
        self.name = self.source.name
        self.victims = victims
        self.images = images
        self.seed = seed
        self.labels = labels
        self.model = model
        self.weights, self.own_weights = weights, weights == "own"
        self.client = {name: value for name, value in vars(protocol).items() if name in _OF_THE_CLIENT}
        self.client |= {"learning_rate": learning_rate, "reveal_learning_rate": reveal_learning_rate}
        self.reveal_labels = reveal_labels
        self.defenses = check_defenses(defenses)
        self.split = split
        self.num_workers = num_workers

    def prepare_data(self) -> None:
        """Download the data set unless it is present."""
        self.source.fetch(self.split)

    def setup(self, stage: str | None = None) -> None:
        """Draw the victims' images and build their network. Later calls do nothing."""
        if hasattr(self, "victim"):
            return
        source = self.source.open(self.split, soft=self.client["label_kind"] != "classes")
        order = self._draw(source)
        first = int(order[0, 0])
        channels, height, width = source[first][0].shape
        model = self.model
        if model is None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed)
                model = LeNet(channels=channels, image_size=(height, width), num_classes=source.num_classes)
        of_own: dict[str, Any] = {"num_classes": source.num_classes} if self.client["loss"] == OWN else {}
        shape = (channels, height, width)
        victim = Victim(model, image_shape=shape, defenses=self.defenses, **self.client, **of_own)
        logits = victim.protocol.num_classes
        if logits < source.num_classes or (source.soft and logits != source.num_classes):
            raise ValueError(
                f"Expected `model` to have a logit for each of the {source.num_classes} classes of the data set, "
                f"but got {logits}."
            )
        if self.own_weights:
            victim.fresh_states([self.seed])  # fail now if the weights of a module can't be redrawn
        for index in sorted(set(order.flatten().tolist())):
            source.check_size(source[index][0], victim.protocol.image_shape, index)
        self._images = _VictimImages(source, order)
        self.victim = victim

    def _draw(self, source: OpenSource) -> Tensor:
        """Draw the indices ``(V, N)`` of the images that victims hold."""
        if self.labels is not None:
            counts = {"victims": self.victims, "num_images": self.images}
            return draw_victims(source.labels, distribution=self.labels, seed=self.seed, **counts)
        available, wanted = len(source), self.victims * self.images
        if wanted > available:
            raise ValueError(
                f"Expected `victims` * `images` to be at most the {available} images of the data set, "
                f"but got {self.victims} * {self.images} = {wanted}."
            )
        order = torch.randperm(available, generator=torch.Generator().manual_seed(self.seed))
        return order[:wanted].view(self.victims, self.images)

    def share(self, victims: Sequence[int]) -> SharedGradient:
        """Return the gradients of the victims at these positions, in the precision of their network."""
        truth = GroundTruth.cat(list(self._load(victims, _DECODED_AT_ONCE)))
        states = None
        if self.own_weights:
            states = self.victim.fresh_states([derive_seed(self.seed, victim, "weights") for victim in victims])
        return self.victim.share(
            truth.images.to(next(self.victim.model.parameters()).dtype),
            truth.labels if truth.soft is None else truth.soft,
            states=states,
            ids=truth.ids,
            reveal_labels=self.reveal_labels,
            seed=self.seed,
        )

    def val_dataloader(self) -> DataLoader[GroundTruth] | list[Any]:
        """Load the ground truth of the audited victims, in order."""
        return self._load(range(self.victims) if self.audited is None else self.audited, _SCORED_AT_ONCE)

    def _load(self, victims: Sequence[int], batch_size: int) -> DataLoader[GroundTruth]:
        return DataLoader(
            self._images,
            batch_size=batch_size,
            sampler=_Just(victims),
            num_workers=self.num_workers,
            collate_fn=GroundTruth.cat,
            generator=torch.Generator(),  # without one the loader advances the global generator
        )

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """The configuration of the base class, and what the victims' images, networks and losses depend on."""
        self.setup("fit")
        held = self._images.order.flatten()
        some = held[:: math.ceil(len(held) / _RECOGNISED_BY)].tolist()
        images, labels = zip(*(self._images.source[index] for index in some), strict=True)
        held = torch.stack([torch.as_tensor(label) for label in labels])
        return super().configuration | {
            **self.source.configuration,
            "split": self.split if self.source.parts else None,
            "size": len(self._images.source),
            **self.client,
            "labels": self.labels,
            "seed": self.seed,
            "weights": "own" if self.own_weights else digest(self.victim.state),
            "reveal_labels": self.reveal_labels,
            "defenses": [repr(defense) for defense in self.defenses],
            "content": digest({"images": torch.stack(images), "labels": held}),
        }


class _Just(DistributedSampler[GroundTruth]):
    """Samples the given victims; a DistributedSampler, so that Lightning does not split them over processes again."""

    def __init__(self, victims: Sequence[int]) -> None:
        self.victims = victims

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return iter(self.victims)

    def __len__(self) -> int:
        return len(self.victims)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order is always the same."""


class _VictimImages(Dataset[GroundTruth]):
    """The ground truth of each victim: the only code that a worker process runs."""

    def __init__(self, source: OpenSource, order: Tensor) -> None:
        self.source = source
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, victim: int) -> GroundTruth:
        images, labels = zip(*(self.source[index] for index in self.order[victim].tolist()), strict=True)
        soft = torch.stack(labels) if self.source.soft else None
        return GroundTruth(
            ids=torch.tensor([victim]),
            images=torch.stack(images)[None],
            labels=torch.tensor(labels)[None] if soft is None else soft.argmax(-1)[None],
            soft=None if soft is None else soft[None],
        )
