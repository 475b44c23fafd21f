"""Training and testing of several newly drawn networks on the same images.

This has its own training loop, since Lightning's overhead of some milliseconds per step is more than a step takes, and
since Lightning supports neither networks trained as one (stacked, by ``vmap``) nor batches split to fit a CPU's cache.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leakage.condensation.augmentation import SiameseAugmentation
from leakage.condensation.networks import check_network
from leakage.condensation.protocols import check_momentum
from leakage.condensation.stacking import SingleNetwork, StackedNetworks, stacking_error, works_image_by_image
from leakage.errors import check_choice, check_count, check_not_negative, check_positive
from leakage.models import draw_state
from leakage.seeds import derive_seed

if TYPE_CHECKING:
    from leakage.datamodules.labelled import LabelledImages

# The evaluations of the papers, which differ only in the augmentation.
EVALUATIONS = ("dc", "dsa")
# Epochs without and with augmentation, in both papers.
_EPOCHS, _EPOCHS_AUGMENTED = 300, 1000
# Images at once on the CPU, as many as fit its caches: twice as fast as 256, both in training and in testing.
_PIECE = 16
# Images times networks at once when testing on a GPU; each takes one or two megabytes.
_TESTED_AT_ONCE = 2048
# Epochs between two checks of the losses, since each check waits for the GPU.
_CHECK_EVERY = 20
# Training takes about three times as long as testing per image; used for the progress bar.
_TRAINING_WORK = 3
# Seconds between updates of the bar; longer in a file or a pipe, where updates do not replace one another.
_PAUSE, _PAUSE_IN_A_FILE = 0.1, 30.0
PRECISIONS = ("32-true", "bf16-mixed")
# Advice for training that diverges.
_ADVICE = "Lower `learning_rate`, or check the images."


@dataclass(frozen=True)
class TrainingOptions:
    """Options of SGD on shuffled batches, with the learning rate divided by 10 halfway.

    Attributes:
        epochs: passes over the images.
        learning_rate: learning rate up to epoch ``epochs // 2`` (counted from 0); a tenth of it afterwards.
        momentum: from 0 to below 1.
        weight_decay: at least 0.
        batch_size: images in a batch; a set with at most this many images is a single batch.
        augmentation: transforms each image of each batch, or None.
        seed: seed of weights, orders and transforms; those of network r depend on (seed, r) alone.
        precision: ``"32-true"``, or ``"bf16-mixed"`` for autocast to bfloat16 in training. Weights and tests stay in
            single precision.
    """

    epochs: int
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augmentation: SiameseAugmentation | None = None
    seed: int = 0
    precision: str = "32-true"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_count(epochs=self.epochs, batch_size=self.batch_size)
        check_count(0, seed=self.seed)
        check_positive(learning_rate=self.learning_rate)
        check_momentum(self.momentum)
        check_not_negative(weight_decay=self.weight_decay)
        if self.augmentation is not None and not isinstance(self.augmentation, SiameseAugmentation):
            raise ValueError(
                f"Expected `augmentation` to be a SiameseAugmentation or None, but got {self.augmentation!r}."
            )


def evaluation_options(
    dataset: str, epochs: int | None = None, augmentation: SiameseAugmentation | str | None = "dc", **training: Any
) -> TrainingOptions:
    """Return the training options of an evaluation.

    Raises:
        ValueError: an option is out of range.
    """
    if isinstance(augmentation, str):
        check_choice("augmentation", augmentation, EVALUATIONS)
        if augmentation == "dsa":
            augmentation = SiameseAugmentation.dsa(dataset)
        else:
            augmentation = SiameseAugmentation.mnist_evaluation() if dataset == "mnist" else None
    if epochs is None:
        epochs = _EPOCHS if augmentation is None else _EPOCHS_AUGMENTED
    return TrainingOptions(epochs, augmentation=augmentation, **training)


@dataclass(frozen=True)
class NetworkResult:
    """The result of one network.

    Attributes:
        accuracy: accuracy on the test set, from 0 to 1.
        training_seconds: seconds of training; an equal share if several networks were trained at once.
        testing_seconds: seconds of testing; an equal share if several networks were tested at once.
    """

    accuracy: float
    training_seconds: float
    testing_seconds: float


def train_and_test(
    images: Tensor,
    labels: Tensor,
    data: LabelledImages,
    network: nn.Module,
    networks: int,
    options: TrainingOptions,
    stacked: bool | None,
    device: torch.device | str | None,
    progress: bool,
    known: Sequence[NetworkResult] = (),
    keep: Callable[[list[NetworkResult]], None] = lambda tested: None,
) -> list[NetworkResult]:
    """Train newly drawn networks on images, uint8 or in the data's scale, and test them on the test set of ``data``.

    Args:
        known: results of the first networks, if they were trained before.
        keep: called with all results so far whenever there are new ones.

    The other arguments are those of :func:`leakage.condensation.evaluate`.
    """
    check_count(networks=networks)
    if stacked not in (None, True, False):
        raise ValueError(f"Expected `stacked` to be True, False or None, but got {stacked!r}.")
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    cuda = [torch.cuda.current_device() if place.index is None else place.index] if place.type == "cuda" else []
    # Be independent of the caller, which may be in a validation loop or in mixed precision. Dropout draws from the
    # global random state, which is restored afterwards.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(place.type, enabled=False),
        torch.random.fork_rng(devices=cuda),
    ):
        model = copy.deepcopy(network).float()
        check_network(model, data, place)
        at_once = networks if _choose_stacked(stacked, model, data, networks, place) else 1
        run = _Run(model, images, labels, data, options, place)
        with _bar(networks * (_TRAINING_WORK * options.epochs * len(labels) + len(data.test)), progress) as bar:
            return run.all(networks, at_once, bar, list(known), keep)


@dataclass
class _Run:
    """One evaluation: the data and options that its groups of networks share."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    data: LabelledImages
    options: TrainingOptions
    device: torch.device

    def __post_init__(self) -> None:
        # Labels are copied, since the loss saves them for backward, which inference tensors do not allow.
        self.images, self.labels = self.images.detach().to(self.device), self.labels.clone().to(self.device)
        test = self.data.test
        self.test_images, self.test_labels = test.images.to(self.device), test.labels.to(self.device)
        in_pieces = self.device.type == "cpu" and works_image_by_image(self.model, self.data.image_shape)
        self.piece = _PIECE if in_pieces else None

    def all(
        self,
        networks: int,
        at_once: int,
        bar: Any,
        tested: list[NetworkResult],
        keep: Callable[[list[NetworkResult]], None],
    ) -> list[NetworkResult]:
        """Train and test the remaining networks, ``at_once`` at a time, or fewer if memory runs out."""
        while len(tested) < networks:
            numbers = range(len(tested), min(len(tested) + at_once, networks))
            bar.n = bar.total * len(tested) / networks
            try:
                tested += self._group(numbers, networks, bar)
                keep(tested)
                continue
            except torch.OutOfMemoryError:
                if len(numbers) == 1:
                    raise
            torch.cuda.empty_cache()  # outside the except block: the frames of the error keep the tensors alive
            at_once = math.ceil(len(numbers) / 2)
        return tested

    def _group(self, numbers: Sequence[int], networks: int, bar: Any) -> list[NetworkResult]:
        seed = self.options.seed
        states = [draw_state(self.model, derive_seed(seed, r, "evaluation network")) for r in numbers]
        group: SingleNetwork | StackedNetworks
        if len(numbers) == 1:
            group = SingleNetwork(self.model, states[0], self.device, self.piece)
            dropout = derive_seed(seed, numbers[0], "evaluation dropout")
            torch.default_generator.manual_seed(dropout)
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(dropout)
        else:
            group = StackedNetworks(self.model, states, self.device)
        which = f"network {numbers[0] + 1}{'' if len(numbers) == 1 else f' to {numbers[-1] + 1}'} of {networks}"
        began = time.perf_counter()
        bar.set_description_str(f"Training {which}")
        train(
            group,
            numbers,
            lambda indices: self._normalise(self.images[indices]),
            self.labels,
            self.options,
            lambda count: bar.update(_TRAINING_WORK * count),
        )
        trained = time.perf_counter()
        bar.set_description_str(f"Testing {which}")
        images_at_once = _PIECE if self.device.type == "cpu" else max(_PIECE, _TESTED_AT_ONCE // len(group))
        correct = torch.zeros(len(group), dtype=torch.int64, device=self.device)
        for chosen in torch.split(torch.arange(len(self.test_labels), device=self.device), images_at_once):
            found = group.logits(self._normalise(self.test_images[chosen])).argmax(-1)
            correct += (found == self.test_labels[chosen]).sum(-1)
            bar.update(len(chosen) * len(group))
        accuracies = (correct.cpu().double() / len(self.test_labels)).tolist()
        seconds = [spent / len(numbers) for spent in (trained - began, time.perf_counter() - trained)]
        return [NetworkResult(accuracy, *seconds) for accuracy in accuracies]

    def _normalise(self, images: Tensor) -> Tensor:
        return self.data.normalise(images).float()


def train(
    networks: SingleNetwork | StackedNetworks,
    numbers: Sequence[int],
    fetch: Callable[[Tensor], Tensor],
    labels: Tensor,
    options: TrainingOptions,
    tick: Callable[[int], None],
) -> None:
    """Train the networks of these ``numbers`` on the same images, each with its own order and transforms.

    ``fetch`` returns normalised images ``(*shape, C, H, W)`` for indices of any shape. ``tick`` is called after each
    batch with the number of images times networks.

    Raises:
        FloatingPointError: a loss or a weight is not finite.
    """
    optimizer = torch.optim.SGD(
        networks.parameters(), lr=options.learning_rate, momentum=options.momentum, weight_decay=options.weight_decay
    )
    whole = len(labels) <= options.batch_size
    everything = fetch(torch.arange(len(labels), device=labels.device)) if whole else None
    streams = ("evaluation order", "evaluation augmentation")
    orders, transforms = (
        [torch.Generator().manual_seed(derive_seed(options.seed, r, stream)) for r in numbers] for stream in streams
    )
    losses: list[Tensor] = []
    for epoch in range(options.epochs):
        if epoch == options.epochs // 2 + 1:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        of_epoch = torch.zeros(len(networks), device=labels.device, dtype=torch.float32)
        for batch in _batches(len(labels), options.batch_size, orders, labels.device):
            # If the batch is the whole set, its order does not affect the loss, and all networks share the images.
            images, their = (everything, labels) if everything is not None else (fetch(batch), labels[batch])
            if options.augmentation is not None:
                images, their = _augment(images, their, options.augmentation, transforms)
            optimizer.zero_grad()
            # No cache: within an outer autocast context it would outlive the step and hold outdated weights.
            mixed = options.precision == "bf16-mixed"
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
                of_epoch += networks.backward(images, their)
            optimizer.step()
            tick(batch.numel())
        losses.append(of_epoch)
        if len(losses) == _CHECK_EVERY or epoch + 1 == options.epochs:
            _check_losses(torch.stack(losses), numbers, epoch + 1 - len(losses), options.epochs)
            losses.clear()
    for name, tensor in networks.state():
        finite = torch.isfinite(tensor).reshape(len(networks), -1).all(1).tolist()
        if not all(finite):
            raise FloatingPointError(
                f"Expected finite weights after training, but got NaN or inf in {name!r} of network "
                f"{numbers[finite.index(False)]} after epoch {options.epochs} of {options.epochs}. {_ADVICE}"
            )


def _batches(count: int, size: int, orders: list[torch.Generator], device: torch.device) -> Iterator[Tensor]:
    """Yield the indices ``(R, B)`` of each batch of one epoch."""
    if count <= size:
        yield torch.arange(count, device=device).expand(len(orders), count)
        return
    order = torch.stack([torch.randperm(count, generator=generator) for generator in orders]).to(device)
    yield from torch.split(order, size, dim=1)


def _augment(
    images: Tensor, labels: Tensor, augmentation: SiameseAugmentation, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Augment a batch separately for each network: images ``(R, B, C, H, W)`` and labels ``(R, B)``."""
    shared = images.ndim == 4
    moved = [
        augmentation.draw(generator, num_images=labels.shape[-1])(images if shared else images[index])
        for index, generator in enumerate(generators)
    ]
    return torch.stack(moved), labels.expand(len(generators), -1) if shared else labels


def _check_losses(losses: Tensor, numbers: Sequence[int], first: int, epochs: int) -> None:
    """Raise a ``FloatingPointError`` unless the losses ``(E, R)`` of the epochs from ``first`` on are finite."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        epoch, index = bad[0].tolist()
        raise FloatingPointError(
            f"Expected finite losses in training, but got {losses[epoch, index].item()} for network "
            f"{numbers[index]} in epoch {first + epoch + 1} of {epochs}. {_ADVICE}"
        )


def _choose_stacked(
    stacked: bool | None, model: nn.Module, data: LabelledImages, networks: int, device: torch.device
) -> bool:
    if stacked is False or networks == 1 or (stacked is None and device.type == "cpu"):
        return False
    error = stacking_error(model, data.image_shape, device)
    if stacked and error is not None:
        raise ValueError(
            f"Expected a `network` that torch.func can stack for stacked=True, but got {type(model).__name__}, for "
            f"which it fails: {error} Use stacked=False or None."
        )
    return error is None


def _bar(total: int, progress: bool) -> Any:
    # Imported here because it takes a second.
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

    pause = _PAUSE if sys.stderr.isatty() else _PAUSE_IN_A_FILE
    return Tqdm(
        total=total,
        disable=not progress,
        file=sys.stderr,
        bar_format="{desc}: {percentage:3.0f} %|{bar}| {elapsed}<{remaining}",
        dynamic_ncols=True,
        mininterval=pause,
        maxinterval=max(pause, 10),
    )
