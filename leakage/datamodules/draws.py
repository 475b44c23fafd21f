"""Draws the images of a labelled data set that each victim holds."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from leakage.errors import check_choice, check_count
from leakage.seeds import derive_seed

_DIRICHLET = "dirichlet:"
_CHOICES = ("uniform", "single-class", "distinct", f"{_DIRICHLET}A")


def draw_victims(
    labels: Tensor, *, victims: int, num_images: int, distribution: str = "uniform", seed: int = 0
) -> Tensor:
    r"""Draw the images that each victim holds from a labelled data set.

    No victim holds an image twice, but two victims may hold the same image. The images of victim i depend
    on ``seed``, i and the other arguments, not on the number of victims. They come in random order.

    ================ ========================================================================
    ``distribution`` a victim's images
    ================ ========================================================================
    ``uniform``      any images of the data set: on average they have its class frequencies
    ``single-class`` all of one class, chosen among those with at least N images
    ``distinct``     each of a different class
    ``dirichlet:A``  its own class proportions :math:`p \sim \mathrm{Dirichlet}(A, \dots, A)`, then
                     labels drawn from p: a few classes for A = 0.1, nearly equal shares for A = 100
    ================ ========================================================================

    The Dirichlet distribution is over the classes that occur. In Hsu et al. its parameters are :math:`\alpha` times
    the prior of each class, so :math:`\alpha = K A` for K classes with equal priors. If a class has fewer images than
    were drawn from it, the missing ones are drawn again from the other classes, in proportion to p.

    Args:
        labels: ``(M,)``, the class indices of the data set.
        victims: V.
        num_images: N, the number of images of each victim.
        distribution: see above. A is a positive number, as in ``"dirichlet:0.1"``.
        seed: determines all draws.

    Returns:
        ``(V, N)`` int64, indices of images, from 0 to M - 1.

    Raises:
        ValueError: the labels are empty or not whole numbers of shape ``(M,)``; there are fewer than N images
            (``single-class``: in every class), or fewer than N classes (``distinct``); the distribution is unknown; or
            a count is out of range.

    References:
        Hsu et al., *Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification*, 2019, https://arxiv.org/abs/1909.06335.

    Example:
        >>> labels = torch.arange(1000) % 10
        >>> drawn = draw_victims(labels, victims=3, num_images=8, distribution="single-class")
        >>> drawn.shape, [len(row.unique()) for row in labels[drawn]]
        (torch.Size([3, 8]), [1, 1, 1])
    """
    check_count(0, victims=victims, seed=seed)
    check_count(num_images=num_images)
    concentration = check_distribution("distribution", distribution)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"Expected `labels` of shape (M,) with M at least 1, but got {tuple(labels.shape)}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"Expected `labels` as whole numbers, but got {labels.dtype}.")
    if num_images > len(labels):
        raise ValueError(
            f"Expected at most {len(labels)} images for each victim, the size of the data set, but got {num_images}."
        )
    classes = labels.cpu().numpy()
    members = [np.flatnonzero(classes == label) for label in np.unique(classes)]
    if distribution == "single-class":
        most = max(map(len, members))
        if num_images > most:
            raise ValueError(
                f"Expected at most {most} images for each victim, the size of the largest class, since "
                f"'single-class' takes them all from one class, but got {num_images}."
            )
        members = [images for images in members if len(images) >= num_images]
    if distribution == "distinct" and num_images > len(members):
        raise ValueError(
            f"Expected at most {len(members)} images for each victim, the number of classes, since 'distinct' takes at "
            f"most one image of each class, but got {num_images}."
        )

    drawn = np.empty((victims, num_images), dtype=np.int64)
    for victim in range(victims):
        rng = np.random.default_rng(derive_seed(seed, victim, "victim's images"))
        if concentration is not None:
            drawn[victim] = _dirichlet(members, num_images, concentration, rng)
        elif distribution == "distinct":
            chosen = rng.choice(len(members), num_images, replace=False)
            drawn[victim] = [rng.choice(members[label]) for label in chosen]
        else:
            images = members[rng.integers(len(members))] if distribution == "single-class" else len(labels)
            drawn[victim] = rng.choice(images, num_images, replace=False)
    return torch.from_numpy(drawn)


def _dirichlet(
    members: list[np.ndarray], num_images: int, concentration: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw images ``(N,)`` with class proportions from a Dirichlet; ``members`` are the images of each class."""
    sizes = np.array([len(images) for images in members])
    counts = np.zeros_like(sizes)
    proportions = rng.dirichlet(np.full(len(members), concentration))
    while missing := num_images - counts.sum():
        proportions = np.where(counts < sizes, proportions, 0.0)
        if not proportions.sum():
            # The remaining proportions underflowed to zero: draw them from a Dirichlet over the remaining classes.
            proportions[counts < sizes] = rng.dirichlet(np.full((counts < sizes).sum(), concentration))
        counts += rng.multinomial(missing, proportions / proportions.sum())
        counts = np.minimum(counts, sizes)
    chosen = [rng.choice(images, count, replace=False) for images, count in zip(members, counts, strict=True) if count]
    return rng.permutation(np.concatenate(chosen))


def check_distribution(name: str, distribution: str) -> float | None:
    """Return A of ``dirichlet:A``, or None for the other distributions.

    Raises:
        ValueError: the distribution is unknown; the message calls it ``name``.
    """
    if not isinstance(distribution, str) or not distribution.startswith(_DIRICHLET):
        check_choice(name, distribution, _CHOICES)
        return None
    concentration = 0.0
    with contextlib.suppress(ValueError):
        concentration = float(distribution.removeprefix(_DIRICHLET))
    # Larger numbers, far beyond any use, would overflow. This rejects NaN too.
    if not 0 < concentration <= 1e100:
        raise ValueError(
            f"Expected `{name}` as 'dirichlet:A' with a positive number A up to 1e100, but got {distribution!r}."
        )
    return concentration
