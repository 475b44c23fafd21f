"""How condensation searches: the protocol of the paper, and the fast one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from leakage.errors import check_choice, check_count, check_flag, check_positive

# (outer, inner) loops of the paper by images per class.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
# Synthetic images of a class from which on `fast` matches so many real ones: on MNIST, 10 per class, 256 give 96.7 %
# after 600 updates (6,000 held-out images); 32 gave 95.5 % after 1,000 (1,200 held-out images).
_SEVERAL, _MANY_REAL_IMAGES = 10, 256
INITIALIZATIONS = ("noise", "real", "kmeans")
REAL_IMAGES = ("random", "kmeans")


@dataclass(frozen=True)
class CondensationProtocol:
    """How condensation searches; by default as the paper does.

    Attributes:
        iterations: freshly drawn networks, one after another; with a ``pool`` visits to a state of one.
        batch_size: real images of each class that are matched at a time, unless the DataModule has a
            ``batch_size`` of its own.
        network_reuse: updates of the images in a row against the same network and the same gradients of the
            real images. The paper makes one; each further one saves almost all that an update costs.
        learning_rate: of the synthetic images, which are normalised. That of ``"fast"`` is 0.2 for one image per
            class and grows with their number, since each has only its share in the mean gradient.
        momentum: likewise, from 0 to below 1.
        decay: whether the learning rate falls to zero in equal steps over the run. Each network pulls the images
            its own way; smaller and smaller steps take the mean over the last ones.
        initialization: ``"noise"`` from N(0, 1), ``"real"`` images of the class, or ``"kmeans"``, the real images of
            :func:`~leakage.condensation.kmeans_images`.
        real_images: that are matched: ``"random"`` ones of each class, or ``"kmeans"``, those nearest to the centres
            of as many clusters of what the network makes of some, see :class:`~leakage.condensation.kmeans.Clusters`;
            chosen anew in each step, and with a ``pool`` once for each state.
        factor: each synthetic image holds ``factor**2`` smaller ones, see :func:`~leakage.condensation.decode`; it
            divides their size. 1 for images as they are.
        synthetic_batch_size: synthetic images of each class, as decoded, that are matched at a time; all take part in
            turn, in random order. None for all at a time.
        pool: networks that are trained on real images and kept in several states with their gradients, see
            :class:`~leakage.condensation.pool.NetworkPool`. 0 for networks drawn anew.
        pool_passes: visits to each state, after which new networks take the place of those in the pool. None for
            never: then the images in time learn what is peculiar to these networks.
        network_width: channels of the network that images are condensed with, if it is the default one. Half of the
            128 with which they are tested cost less than half of the time and condense as well.

    Raises:
        ValueError: a value out of its range.
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
    """Raise a ``ValueError`` unless it is from 0 to below 1."""
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
    """The protocol of that name, with values replaced where they are not None.

    The learning rate of ``"fast"`` is proportional to ``images_per_class``, and for 10 and more it matches 256 real
    images of each class instead of 32: what few of them say of trained networks is mostly noise.
    """
    check_choice("protocol", name, PROTOCOLS)
    named = PROTOCOLS[name]
    if name == "fast":
        batch_size = _MANY_REAL_IMAGES if images_per_class >= _SEVERAL else named.batch_size
        rate = named.learning_rate * images_per_class
        named = dataclasses.replace(named, learning_rate=rate, batch_size=batch_size)
    return replace_given(named, **replaced)


def replace_given(protocol: CondensationProtocol, **replaced: Any) -> CondensationProtocol:
    """The protocol with values replaced where they are not None."""
    return dataclasses.replace(protocol, **{key: value for key, value in replaced.items() if value is not None})


def schedule(images_per_class: int, loops: tuple[int, int] | list[int] | None, pool: int = 0) -> tuple[int, int]:
    """Outer steps per network, and epochs it is trained for between two of them: those given, else the paper's.

    With a pool a visit is one step, after which nothing is trained.
    """
    if pool:
        if loops is not None:
            raise ValueError(
                f"Expected no `loops` with a pool of networks, which no synthetic images train, but got {loops!r}."
            )
        return 1, 0
    if loops is None:
        if images_per_class not in LOOPS:
            raise ValueError(
                f"Expected `loops` (outer, inner) with images_per_class={images_per_class}, but got None: the paper "
                f"has them only for {list(LOOPS)}."
            )
        return LOOPS[images_per_class]
    if not isinstance(loops, tuple | list) or len(loops) != 2:
        raise ValueError(f"Expected `loops` as two whole numbers (outer, inner), but got {loops!r}.")
    for number in loops:
        check_count(loops=number)
    return loops[0], loops[1]
