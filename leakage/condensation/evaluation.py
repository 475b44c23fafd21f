"""Evaluation of a synthetic set: the test accuracy of new networks that are trained on it alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leakage.condensation.augmentation import SiameseAugmentation
from leakage.condensation.networks import default_network
from leakage.condensation.synthetic_set import SyntheticSet, make_ready
from leakage.condensation.training import NetworkResult, TrainingOptions, evaluation_options, train_and_test
from leakage.files.text import write_json
from leakage.metrics.estimates import mean_interval
from leakage.models import draw_state
from leakage.pieces import stable_repr
from leakage.seeds import derive_seed

if TYPE_CHECKING:
    from leakage.datamodules.labelled import LabelledImages


@dataclass
class Evaluation:
    """Test accuracies of R networks that differ only in their random numbers.

    Attributes:
        accuracies: ``(R,)``, from 0 to 1, in double precision.
        training_seconds: seconds spent on training all networks.
        testing_seconds: seconds spent on testing all networks.

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
        """R, the number of networks."""
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        """Mean accuracy, from 0 to 1."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """Sample standard deviation over the networks (divided by R - 1); NaN for one network."""
        return float(self.accuracies.std()) if self.networks > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean by Student's t-distribution; NaN for one network.

        It covers the randomness of the networks, for this synthetic set and this test set.
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

    @classmethod
    def of(cls, tested: Sequence[NetworkResult]) -> Evaluation:
        """Collect the results of networks."""
        accuracies = torch.tensor([one.accuracy for one in tested], dtype=torch.float64)
        training, testing = (
            math.fsum(getattr(one, name) for one in tested) for name in ("training_seconds", "testing_seconds")
        )
        return cls(accuracies, training, testing)


def evaluate(
    synthetic: SyntheticSet,
    data: LabelledImages,
    *,
    network: nn.Module | None = None,
    networks: int = 10,
    epochs: int | None = None,
    augmentation: SiameseAugmentation | str | None = "dc",
    stacked: bool | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    cache: str | os.PathLike[str] | None = None,
    **training: Any,
) -> Evaluation:
    """Train new networks on a synthetic set alone and test them on the whole real test set.

    This is the protocol of Dataset Condensation (DC): every network is drawn anew and trained by SGD, with a tenth of
    the learning rate in the second half. The protocol of its successor (DSA) differs only in the ``augmentation``.
    Network r depends on ``seed`` and r alone: not on the number of networks, their grouping, or (up to rounding) the
    device. The set, the network and the global random state do not change.

    Args:
        synthetic: the set to train on; its decoded images are used (:meth:`SyntheticSet.decoded`).
        data: the data set whose test images are used; prepared (``prepare_data``, ``setup``) if necessary.
        network: an architecture for the data's images and classes, whose modules with weights have
            ``reset_parameters``, such as those of :mod:`leakage.models` and torchvision; by default
            :class:`~leakage.models.ConvNet`. Its current weights are not used, and all weights are trained.
        networks: R, the number of networks.
        epochs: epochs of training; by default, as in both papers, 300, or 1,000 with augmentation.
        augmentation: transforms the images of each batch. ``"dc"`` is the evaluation of DC: shifts, scales and
            rotations for MNIST, none for other data sets. ``"dsa"`` is that of DSA: :meth:`SiameseAugmentation.dsa`.
            Or pass your own augmentation, or None.
        stacked: whether to train all networks at once, as one network with stacked weights, or one after the other. By
            default the faster way: stacked on GPUs, if the network allows it; one after the other on the CPU.
        device: by default the first CUDA GPU if there is one, else the CPU.
        progress: whether to show a progress bar.
        cache: a folder that keeps the accuracy of each network as soon as it is known. A result is read from there if
            everything that determines it is unchanged.
        **training: learning rate, momentum, weight decay, batch size, seed and precision, see :class:`TrainingOptions`.

    Returns:
        Accuracies from 0 to 1.

    Raises:
        ValueError: the synthetic set or the network does not fit the data set, an option is out of range,
            ``stacked=True`` with a network that ``torch.func`` can't stack, or a cache file is damaged.
        FloatingPointError: a loss or weight is no longer finite; the message names the network and the epoch.
        OSError: the cache can't be written.

    References:
        Zhao, Mopuri, Bilen, *Dataset Condensation with Gradient Matching*, ICLR 2021,
        https://arxiv.org/abs/2006.05929; Zhao and Bilen, *Dataset Condensation with Differentiable Siamese
        Augmentation*, ICML 2021, https://arxiv.org/abs/2102.08259.

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
    options = evaluation_options(data.name, epochs, augmentation, **training)
    make_ready(data)
    synthetic.check(data)
    seen = synthetic.decoded()
    return _test(seen.images, seen.labels, data, network, networks, options, stacked, device, progress, cache)


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
    """Train new networks on the whole real training set and test them: the upper bound for a synthetic set.

    With the few epochs of the default the result is close to this bound but below it. There is no augmentation by
    default.

    Args:
        data, network, networks, stacked, device, progress, cache: as for :func:`evaluate`.
        epochs: passes over the whole training set.
        **training: all other options of :class:`TrainingOptions`.

    Raises:
        ValueError: as for :func:`evaluate`.
        FloatingPointError: as for :func:`evaluate`.
        OSError: as for :func:`evaluate`.
    """
    options = TrainingOptions(epochs, **training)
    make_ready(data)
    seen = data.train.images, data.train.labels
    return _test(*seen, data, network, networks, options, stacked, device, progress, cache)


def _test(
    images: Tensor,
    labels: Tensor,
    data: LabelledImages,
    network: nn.Module | None,
    networks: int,
    options: TrainingOptions,
    stacked: bool | None,
    device: torch.device | str | None,
    progress: bool,
    cache: str | os.PathLike[str] | None,
) -> Evaluation:
    """Train and test the networks that are not in the cache."""
    network = default_network(data) if network is None else network
    training = images, labels, data, network, networks, options, stacked, device, progress
    if cache is None:
        return Evaluation.of(train_and_test(*training))
    path = Path(cache) / f"{_digest(images, labels, data, network, options)}.json"
    known = _read(path)
    if len(known) < networks:
        known = train_and_test(*training, known, lambda tested: write_json(path, [asdict(one) for one in tested]))
    return Evaluation.of(known[:networks])


def _read(path: Path) -> list[NetworkResult]:
    if not path.is_file():
        return []
    try:
        found = [NetworkResult(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
        if not all(isinstance(value, float) for one in found for value in vars(one).values()):
            raise TypeError("numbers")
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected a complete JSON file in the cache, but got '{path}'. Delete it.") from error
    return found


def _digest(images: Tensor, labels: Tensor, data: LabelledImages, network: nn.Module, options: TrainingOptions) -> str:
    """Hash everything that determines the result of network r, up to the device."""
    first = draw_state(network, derive_seed(options.seed, 0, "evaluation network"))
    tests = [data.test.images, data.test.labels, data.mean, data.std]
    content = stable_repr([images, labels, *tests, repr(network), first, options])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
