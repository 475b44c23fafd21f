"""Protocols of condensation: the published one, and a fast one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from leakage.errors import check_choice, check_count, check_flag, check_positive

# (outer, inner) loops of the paper (https://arxiv.org/abs/2006.05929) by images per class.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
# From this many synthetic images per class on, `fast` matches this many real ones. On MNIST with 10 per class, 256 give
# 96.7 % after 600 updates (6,000 held-out images); 32 gave 95.5 % after 1,000 (1,200 held-out images).
_SEVERAL, _MANY_REAL_IMAGES = 10, 256
INITIALIZATIONS = ("noise", "real", "kmeans")
REAL_IMAGES = ("random", "kmeans")


@dataclass(frozen=True)
class CondensationProtocol:
    """Settings of the search for synthetic images. The defaults are those of the paper.

    Attributes:
        iterations: number of newly drawn networks; with a ``pool``, number of visits to states of its networks.
        batch_size: real images of each class that are matched at once, unless the DataModule has its own
            ``batch_size``.
        network_reuse: number of consecutive updates of the images with the same network and the same gradients of the
            real images. The paper makes one; a further update costs far less than the first.
        learning_rate: learning rate of the synthetic images, which are normalised. For ``"fast"`` it is 0.2 times the
            number of images per class, since each image has only its share in the mean gradient.
        momentum: momentum of the synthetic images, from 0 to below 1.
        decay: whether the learning rate falls linearly to zero over the run. Each network pulls the images in its own
            direction; shrinking steps average over the last networks.
        initialization: ``"noise"`` from N(0, 1), ``"real"`` images of the class, or ``"kmeans"``, the real images of
            :func:`~leakage.condensation.kmeans_images`.
        real_images: the real images that are matched: ``"random"`` ones of each class, or ``"kmeans"``, those nearest
            to the centres of clusters in the network's embedding, see :class:`~leakage.condensation.kmeans.Clusters`.
            They are chosen anew in each step, or with a ``pool`` once for each state.
        factor: each synthetic image holds ``factor**2`` smaller ones, see :func:`~leakage.condensation.decode`; must
            divide the size of the images. 1 for whole images.
        synthetic_batch_size: decoded synthetic images of each class that are matched at once; all images take part in
            turn, in random order. None for all images at once.
        pool: number of networks that are trained on real images and kept in several states with their gradients, see
            :class:`~leakage.condensation.pool.NetworkPool`. 0 for networks drawn anew.
        pool_passes: visits to each state before new networks replace those in the pool. With None they are never
            replaced, and the images eventually overfit to them.
        network_width: channels of the default network during condensation. Half of the 128 channels of the evaluation
            take less than half of the time and give equally good images.

    Raises:
        ValueError: a value is out of range.
    """

    iterations: int = 1000
    batch_size: int = 256
    network_reuse: int = 1
    learning_rate: float = 0.1
    momentum: float = 0.5
    decay: bool = False
    initialization: str = "noise"
    real_images: str = "random"
    factor: int = 1
    synthetic_batch_size: int | None = None
    pool: int = 0
    pool_passes: int | None = None
    network_width: int = 128

    def __post_init__(self) -> None:
        check_count(iterations=self.iterations, batch_size=self.batch_size, network_reuse=self.network_reuse)
        check_count(factor=self.factor, network_width=self.network_width)
        if self.synthetic_batch_size is not None:
            check_count(synthetic_batch_size=self.synthetic_batch_size)
        check_count(0, pool=self.pool)
        if self.pool_passes is not None:
            check_count(pool_passes=self.pool_passes)
        check_flag(decay=self.decay)
        check_positive(learning_rate=self.learning_rate)
        check_momentum(self.momentum)
        check_choice("initialization", self.initialization, INITIALIZATIONS)
        check_choice("real_images", self.real_images, REAL_IMAGES)


def check_momentum(momentum: float) -> None:
    """Raise a ``ValueError`` unless the momentum is from 0 to below 1."""
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        raise ValueError(f"Expected `momentum` from 0 to below 1, but got {momentum!r}.")


PROTOCOLS = {
    "published": CondensationProtocol(),
    "fast": CondensationProtocol(
        iterations=1000,
        batch_size=32,
        learning_rate=0.2,
        decay=True,
        initialization="kmeans",
        factor=2,
        pool=24,
        network_width=64,
    ),
}


def condensation_protocol(name: str, images_per_class: int = 1, **replaced: Any) -> CondensationProtocol:
    """Return the protocol of that name, with the values in ``replaced`` that are not None.

    The learning rate of ``"fast"`` is proportional to ``images_per_class``. From 10 images per class on it matches 256
    real images of each class instead of 32: on trained networks the gradient of few images is mostly noise.
    """
    check_choice("protocol", name, PROTOCOLS)
    named = PROTOCOLS[name]
    if name == "fast":
        batch_size = _MANY_REAL_IMAGES if images_per_class >= _SEVERAL else named.batch_size
        rate = named.learning_rate * images_per_class
        named = dataclasses.replace(named, learning_rate=rate, batch_size=batch_size)
    return replace_given(named, **replaced)


def replace_given(protocol: CondensationProtocol, **replaced: Any) -> CondensationProtocol:
    """Return the protocol with the values in ``replaced`` that are not None."""
    return dataclasses.replace(protocol, **{key: value for key, value in replaced.items() if value is not None})


def schedule(images_per_class: int, loops: tuple[int, int] | list[int] | None, pool: int = 0) -> tuple[int, int]:
    """Return the loops (outer, inner): those given, else the paper's, or (1, 0) with a pool.

    Outer is the number of steps per network, inner the number of epochs it is trained for between two steps.
    """
    if pool:
        if loops is not None:
            raise ValueError(
                "Expected no `loops` with a pool of networks, which are not trained on synthetic images, but got "
                f"{loops!r}."
            )
        return 1, 0
    if loops is None:
        if images_per_class not in LOOPS:
            raise ValueError(
                f"Expected `loops` (outer, inner) with images_per_class={images_per_class}, but got None. The paper "
                f"gives them only for {list(LOOPS)} images per class."
            )
        return LOOPS[images_per_class]
    if not isinstance(loops, tuple | list) or len(loops) != 2:
        raise ValueError(f"Expected `loops` as two whole numbers (outer, inner), but got {loops!r}.")
    for number in loops:
        check_count(loops=number)
    return loops[0], loops[1]
