"""How good a synthetic set is: the test accuracy of new networks that are trained on it alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leakage.condensation.augmentation import SiameseAugmentation
from leakage.condensation.networks import default_network
from leakage.condensation.synthetic_set import SyntheticSet, make_ready
from leakage.condensation.training import TrainingOptions, train_and_test
from leakage.files.text import write_json
from leakage.metrics.estimates import mean_interval
from leakage.models import draw_state
from leakage.pieces import tell
from leakage.seeds import derive_seed

if TYPE_CHECKING:
    from leakage.datamodules.labelled import LabelledImages

# Epochs without and with augmentation, as in the paper.
_EPOCHS, _EPOCHS_AUGMENTED = 300, 1000


@dataclass
class Evaluation:
    """Test accuracies of R networks that differ in nothing but their random numbers.

    Attributes:
        accuracies: ``(R,)``, from 0 to 1, in double precision.
        training_seconds: spent on training all of them.
        testing_seconds: spent on testing all of them.

    Example:
        >>> evaluation = Evaluation(torch.tensor([0.70, 0.71, 0.69]))
        >>> print(evaluation)
        70.0 % ± 1.0 (3 networks, 95 % interval of the mean 67.5 to 72.5)
    """

    accuracies: Tensor
    training_seconds: float = math.nan
    testing_seconds: float = math.nan

    def __post_init__(self) -> None:
        self.accuracies = torch.as_tensor(self.accuracies, dtype=torch.float64, device="cpu")

    @property
    def networks(self) -> int:
        """R."""
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        """Mean accuracy, from 0 to 1."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the sample of networks (divided by R - 1); NaN for one network."""
        return float(self.accuracies.std()) if self.networks > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean, after Student; NaN for one network.

        It is about the networks' random numbers, given this synthetic set and this test set.
        """
        return mean_interval(self.accuracies)

    def __str__(self) -> str:
        mean = f"{100 * self.mean:.1f} %"
        if self.networks == 1:
            return f"{mean} (1 network)"
        low, high = self.interval
        return (
            f"{mean} ± {100 * self.std:.1f} ({self.networks} networks, 95 % interval of the mean "
            f"{100 * low:.1f} to {100 * high:.1f})"
        )


def evaluate(
    synthetic: SyntheticSet,
    data: LabelledImages,
    *,
    network: nn.Module | None = None,
    networks: int = 10,
    epochs: int | None = None,
    augmentation: SiameseAugmentation | None = None,
    stacked: bool | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **training: Any,
) -> Evaluation:
    """Train new networks on a synthetic set alone and test them on the whole real test set.

    The protocol of Dataset Condensation: every network is drawn anew and trained by SGD, with a tenth of the
    learning rate from half-way on. Network r depends on ``seed`` and r alone: not on how many there are, on how
    they are grouped, or (up to rounding) on the device. Everything is computed in float32. Neither the set, the
    network nor any global random state is changed.

    Args:
        synthetic: what the networks are trained on.
        data: whose test set they are tested on; made ready (``prepare_data``, ``setup``) if it is not yet.
        network: an architecture for the data's images and classes, whose modules with weights have
            ``reset_parameters``, such as those of :mod:`leakage.models` and torchvision; by default
            :class:`~leakage.models.ConvNet`. Its own weights play no part, and all are trained.
        networks: R.
        epochs: 300 by default, 1,000 with ``augmentation``.
        augmentation: transforms each image of each batch on its own, such as
            :meth:`SiameseAugmentation.mnist_evaluation` in the paper's numbers for MNIST.
        stacked: all networks at once, as one network with stacked weights, or one after the other. By default
            whichever is faster: stacked on GPUs, if the network allows it; one after the other on the CPU.
        device: by default the first GPU of CUDA if there is one, else the CPU.
        progress: show a bar.
        **training: learning rate, momentum, weight decay, batch size and seed, see :class:`TrainingOptions`.

    Returns:
        Accuracies from 0 to 1.

    Raises:
        ValueError: a synthetic set that does not fit the data set, a network that does not fit either, an option
            out of its range, or ``stacked=True`` with a network that ``torch.func`` can't stack.
        FloatingPointError: training that is no longer finite; network and epoch are named.

    References:
        Zhao, Mopuri, Bilen, *Dataset Condensation with Gradient Matching*, ICLR 2021, https://arxiv.org/abs/2006.05929.

    Example:
        >>> from leakage.condensation import random_images
        >>> from leakage.datamodules import LabelledImages
        >>> from leakage.models import ConvNet
        >>> data = LabelledImages("sample")
        >>> random = random_images(data, images_per_class=1)
        >>> evaluation = evaluate(
        ...     random, data, network=ConvNet(width=4), networks=2, epochs=3, device="cpu", progress=False
        ... )
        >>> evaluation.networks, 0 <= evaluation.mean <= 1
        (2, True)
    """
    if not isinstance(synthetic, SyntheticSet):
        raise ValueError(f"Expected `synthetic` to be a SyntheticSet, but got {type(synthetic).__name__}.")
    if epochs is None:
        epochs = _EPOCHS if augmentation is None else _EPOCHS_AUGMENTED
    options = TrainingOptions(epochs, augmentation=augmentation, **training)
    make_ready(data)
    synthetic.check(data)
    network = default_network(data) if network is None else network
    return Evaluation(
        *train_and_test(synthetic.images, synthetic.labels, data, network, networks, options, stacked, device, progress)
    )


def evaluate_full(
    data: LabelledImages,
    *,
    network: nn.Module | None = None,
    networks: int = 1,
    epochs: int = 5,
    stacked: bool | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    cache: str | os.PathLike[str] | None = None,
    **training: Any,
) -> Evaluation:
    """:func:`evaluate` with the whole real training set: the upper bound for a synthetic set.

    The few epochs of the default come close to it, not all the way.

    Args:
        data, network, networks, stacked, device, progress: as for :func:`evaluate`.
        epochs: of the whole training set.
        cache: a folder for results, one JSON file each. What was worked out before, with the same data, network and
            options (on whatever device), is read from there.
        **training: all others of :class:`TrainingOptions`.

    Raises:
        ValueError: as :func:`evaluate`; or a file of the cache that is broken.
        FloatingPointError: as :func:`evaluate`.
        OSError: the cache can't be written.
    """
    options = TrainingOptions(epochs, **training)
    make_ready(data)
    network = default_network(data) if network is None else network
    path = None if cache is None else Path(cache) / f"full_{_digest(data, network, networks, options)}.json"
    if path is not None and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return Evaluation(**{field.name: found[field.name] for field in fields(Evaluation)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected a whole JSON file in the cache, but got '{path}'. Delete it.") from error
    images, labels = data.train.images, data.train.labels
    evaluation = Evaluation(
        *train_and_test(images, labels, data, network, networks, options, stacked, device, progress)
    )
    if path is not None:
        write_json(path, vars(evaluation) | {"accuracies": evaluation.accuracies.tolist()})
    return evaluation


def _digest(data: LabelledImages, network: nn.Module, networks: int, options: TrainingOptions) -> str:
    """Of all that decides the result."""
    # How it draws batches of classes plays no part.
    of_data = {name: value for name, value in data.configuration.items() if name not in ("batch_size", "seed")}
    first = draw_state(network, derive_seed(options.seed, 0, "evaluation network"))
    told = tell([of_data, data.test.images[::97], data.test.labels, repr(network), first, networks, options])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
