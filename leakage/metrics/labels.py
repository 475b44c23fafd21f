"""Scores of inferred labels, for each victim and over victims, and of a guess that does not use the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from leakage.errors import check_count
from leakage.metrics.estimates import ScoresOverVictims, ShareOverVictims, wilson_interval


@dataclass
class LabelScore:
    """The scores of one victim's inferred labels, each from 0 to 1.

    Attributes:
        irec: share of the images whose label is recovered.
        leacc: share of the classes whose presence or absence is right.
        lnacc: share of the classes whose count is right.
        exact: 1 if the counts of all classes are right, else 0. For a trivial guess, the probability of that.
    """

    irec: float
    leacc: float
    lnacc: float
    exact: float


# In the order of the attributes.
_NAMES = tuple(field.name for field in fields(LabelScore))


@torch.no_grad()
def score_labels(counts: Tensor, labels: Tensor, *, present: Tensor | None = None) -> list[LabelScore]:
    r"""Score the inferred counts of V victims against their N private labels.

    With :math:`\hat n_k` the inferred and :math:`n_k` the true number of images of class k, and
    :math:`\hat e_k` whether the rule considers class k present:

    .. math::
        \mathrm{IRec} = \frac{1}{N} \sum_k \min(\hat n_k, n_k), \quad
        \mathrm{LeAcc} = \frac{1}{K} \sum_k [\hat e_k = [n_k > 0]], \quad
        \mathrm{LnAcc} = \frac{1}{K} \sum_k [\hat n_k = n_k]

    Absent classes count as right in the last two scores: with 24 images of 100 classes, a guess without any
    class has about .79 in both. Compare them with :func:`trivial_score`.

    Args:
        counts: ``(V, K)``, whole numbers of at least 0; each row sums to N.
        labels: ``(V, N)``, the true class indices from 0 to K - 1, in any order.
        present: ``(V, K)`` bool, whether the rule considers the class present; by default, whether
            ``counts`` is above 0.

    Returns:
        The scores of each victim, in the victims' order.

    Raises:
        ValueError: the shapes do not match, values are not whole numbers, labels are outside 0 to K - 1, or
            counts are negative or do not sum to N.

    References:
        Ma et al., *Instance-wise Batch Label Restoration via Gradients in Federated Learning*, ICLR
        2023, https://openreview.net/forum?id=FIrQfNSOoTr.

    Example:
        >>> score_labels(torch.tensor([[2, 1, 1, 0]]), torch.tensor([[0, 0, 2, 2]]))
        [LabelScore(irec=0.75, leacc=0.75, lnacc=0.5, exact=0.0)]
    """
    if counts.ndim != 2:
        raise ValueError(f"Expected `counts` of shape (V, K), but got {tuple(counts.shape)}.")
    true = _true_counts(labels, counts.shape[1])
    if len(counts) != len(true):
        raise ValueError(f"Expected `counts` of {len(true)} victims, as many as `labels`, but got {len(counts)}.")
    _check_whole("counts", counts)
    counts = counts.to(true.device)
    num_images = labels.shape[1]
    wrong = (counts.sum(1) != num_images) | (counts < 0).any(1)
    if bool(wrong.any()):
        victim = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected `counts` of at least 0 that sum to the {num_images} images of a victim, but got a sum of "
            f"{int(counts[victim].sum())} with a smallest count of {int(counts[victim].min())} for victim {victim}."
        )
    if present is None:
        present = counts > 0
    elif present.dtype != torch.bool or present.shape != counts.shape:
        raise ValueError(
            f"Expected `present` of shape (V, K) = {tuple(counts.shape)} and torch.bool, "
            f"but got {tuple(present.shape)} and {present.dtype}."
        )
    right = counts == true
    return _per_victim(
        irec=counts.minimum(true).sum(1).double() / num_images,
        leacc=(present.to(true.device) == (true > 0)).double().mean(1),
        lnacc=right.double().mean(1),
        exact=right.all(1).double(),
    )


@torch.no_grad()
def trivial_score(labels: Tensor, num_classes: int) -> list[LabelScore]:
    r"""Score the best guesses that do not use the gradient: what a rule must beat.

    The guesser knows N, K and that labels are uniform. Each score has its own best guess, the
    same for every victim:

    - IRec and ``exact``: counts as even as possible, :math:`\lfloor N / K \rfloor` for every
      class and one more for :math:`N \bmod K` of the classes. For uniform labels, any choice of these
      classes is equally good. The score is the expectation over all choices, so
      it does not depend on how the classes are numbered. For ``exact``, that is the probability of the right
      choice instead of 0 or 1.
    - LeAcc: all classes are present or all are absent, whichever is more likely by
      :math:`1 - (1 - 1/K)^N`, the probability that a class is present (present if it is one half).
    - LnAcc: for every class the most likely count, :math:`\lfloor N / K \rfloor`, a mode of
      Binomial(N, 1/K). These counts need not sum to N.

    For labels that are not uniform, such as those of a single class, the guess is the same, since the guesser does
    not know that.

    Args:
        labels: ``(V, N)``, the true class indices from 0 to K - 1, in any order.
        num_classes: K.

    Returns:
        The scores of each victim, in the victims' order.

    Raises:
        ValueError: ``num_classes`` is below 1, or the labels are outside 0 to K - 1 or have another shape.

    Example:
        >>> trivial_score(torch.arange(24)[None], num_classes=100)[0].leacc
        0.76
    """
    check_count(num_classes=num_classes)
    true = _true_counts(labels, num_classes)
    num_images = labels.shape[1]
    each, left_over = divmod(num_images, num_classes)
    # Among the classes with more than `each` images, the share that the guess also gives one more.
    found = true.clamp(max=each).sum(1) + (true > each).double().sum(1) * left_over / num_classes
    even = ((true == each) | (true == each + 1)).all(1)
    guess_present = (1 - 1 / num_classes) ** num_images <= 0.5
    return _per_victim(
        irec=found / num_images,
        leacc=((true > 0) == guess_present).double().mean(1),
        lnacc=(true == each).double().mean(1),
        exact=even.double() * (1 / math.comb(num_classes, left_over)),
    )


class _ClusteredShareOverVictims(ShareOverVictims):
    """Share over victims with an interval for the effective sample size, see :class:`LabelMetrics`."""

    def _interval(self, values: Tensor) -> tuple[float, float]:
        victims, worth = len(values), len(values)
        if victims > 1 and values.min() < values.max():
            mean, variance = values.mean().item(), values.var().item()
            quantiles = float(ndtri(0.975) / stdtrit(victims - 1, 0.975))
            worth = max(victims, round(victims * mean * (1 - mean) / variance * quantiles**2))
        return wilson_interval(values.mean().item(), worth)


class LabelMetrics(ScoresOverVictims):
    r"""The means of all label scores over victims, each with its 95 % confidence interval.

    ``update`` takes the :class:`LabelScore` of further victims; pass each victim once. ``compute`` returns,
    over all victims of all processes, an :class:`~leakage.metrics.Estimate` for each of ``irec``, ``leacc``, ``lnacc``
    and ``exact``, from 0 to 1.

    The score of a victim is the mean of many yes-or-no outcomes, which may be correlated. Wilson's
    interval for V victims assumes that they are fully correlated, and is five times too wide at an IRec of
    .95. Student's interval misses the mean too often if most victims have 1, and shrinks to a point if
    all have. The interval here is Wilson's for the *effective sample size*

    .. math::
        n = \max\left(V, \; \frac{V \bar x (1 - \bar x)}{s^2} \, \frac{z^2}{t^2}\right), \quad
        z = 1.96, \; t = t_{0.975,\, V - 1}

    with :math:`s` the standard deviation over victims. It is as wide as Student's where that can be trusted,
    stays within [0, 1], and equals Wilson's for scores of 0 or 1. If all victims score the same, n is V, since
    nothing is known about the spread. In simulations of 20 to 1,000 victims and means of .3 to .998, it
    covered the mean in .94 to .98 of the cases for independent images, and in at least .87 for any
    correlation (20 victims with most images right or most wrong: Student's .83).

    Raises:
        TypeError: at ``update``, a score is not a LabelScore.

    References:
        Franco et al., *Comparative Study of Confidence Intervals for Proportions in Complex Sample
        Surveys*, 2019, https://pmc.ncbi.nlm.nih.gov/articles/PMC6690503.

    Example:
        >>> metrics = LabelMetrics()
        >>> metrics.update(score_labels(torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0, 1], [1, 0]])))
        >>> metrics.compute()["irec"].value, metrics.compute()["exact"].value, metrics.compute()["irec"].victims
        (0.75, 0.5, 2)
    """

    kind = LabelScore

    def __init__(self) -> None:
        super().__init__(**{name: _ClusteredShareOverVictims() for name in _NAMES})


def _true_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Count the images per class, ``(V, K)``, from labels ``(V, N)``."""
    if labels.ndim != 2 or labels.shape[1] == 0:
        raise ValueError(f"Expected `labels` of shape (V, N) with N at least 1, but got {tuple(labels.shape)}.")
    _check_whole("labels", labels)
    labels = labels.long()
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise ValueError(
            f"Expected `labels` from 0 to {num_classes - 1}, as there are {num_classes} classes, "
            f"but got {int(labels.min())} to {int(labels.max())}."
        )
    counts = torch.zeros(len(labels), num_classes, dtype=torch.long, device=labels.device)
    return counts.scatter_add(1, labels, torch.ones_like(labels))


def _check_whole(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"Expected `{name}` as whole numbers, but got {tensor.dtype}.")


def _per_victim(**scores: Tensor) -> list[LabelScore]:
    rows = zip(*(scores[name].tolist() for name in _NAMES), strict=True)
    return [LabelScore(*row) for row in rows]
