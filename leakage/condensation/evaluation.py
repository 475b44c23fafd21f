"""How good a synthetic set is: the test accuracy of new networks that are trained on it alone."""

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
from leakage.pieces import tell
from leakage.seeds import derive_seed

if TYPE_CHECKING:
    from leakage.datamodules.labelled import LabelledImages


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

    @classmethod
    def of(cls, tested: Sequence[NetworkResult]) -> Evaluation:
        """What came of these networks."""
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

    The protocol of Dataset Condensation (DC): every network is drawn anew and trained by SGD, with a tenth of the
    learning rate from half-way on. That of its successor (DSA) is the same but for the ``augmentation``. Network r
    depends on ``seed`` and r alone: not on how many there are, on how they are grouped, or (up to rounding) on the
    device. Neither the set, the network nor any global random state is changed.

    Args:
        synthetic: what the networks are trained on, as :meth:`SyntheticSet.decoded`.
        data: whose test set they are tested on; made ready (``prepare_data``, ``setup``) if it is not yet.
        network: an architecture for the data's images and classes, whose modules with weights have
            ``reset_parameters``, such as those of :mod:`leakage.models` and torchvision; by default
            :class:`~leakage.models.ConvNet`. Its own weights play no part, and all are trained.
        networks: R.
        epochs: as in both papers 300 by default, 1,000 with augmentation.
        augmentation: transforms the images of each batch. ``"dc"``, the evaluation of DC: shifts, scales and rotations
            for MNIST, none for other data sets. ``"dsa"``, that of DSA: :meth:`SiameseAugmentation.dsa`. Or one of your
            own, or None.
        stacked: all networks at once, as one network with stacked weights, or one after the other. By default
            whichever is faster: stacked on GPUs, if the network allows it; one after the other on the CPU.
        device: by default the first GPU of CUDA if there is one, else the CPU.
        progress: show a bar.
        cache: a folder that keeps the accuracy of each network as soon as it is known, by all that decides it, and
            from which those are read that are known.
        **training: learning rate, momentum, weight decay, batch size, seed and precision, see :class:`TrainingOptions`.

    Returns:
        Accuracies from 0 to 1.

    Raises:
        ValueError: a synthetic set that does not fit the data set, a network that does not fit either, an option
            out of its range, ``stacked=True`` with a network that ``torch.func`` can't stack, or a file of the cache
            that is broken.
        FloatingPointError: training that is no longer finite; network and epoch are named.
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
    """:func:`evaluate` with the whole real training set: the upper bound for a synthetic set.

    The few epochs of the default come close to it, not all the way. There is no augmentation but one that is given.

    Args:
        data, network, networks, stacked, device, progress, cache: as for :func:`evaluate`.
        epochs: of the whole training set.
        **training: all others of :class:`TrainingOptions`.

    Raises:
        ValueError: as :func:`evaluate`.
        FloatingPointError: as :func:`evaluate`.
        OSError: as :func:`evaluate`.
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
    """Train and test the networks that the cache does not know."""
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
        raise ValueError(f"Expected a whole JSON file in the cache, but got '{path}'. Delete it.") from error
    return found


def _digest(images: Tensor, labels: Tensor, data: LabelledImages, network: nn.Module, options: TrainingOptions) -> str:
    """Of all that decides what comes of network r, on whatever device."""
    first = draw_state(network, derive_seed(options.seed, 0, "evaluation network"))
    tests = [data.test.images, data.test.labels, data.mean, data.std]
    told = tell([images, labels, *tests, repr(network), first, options])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
