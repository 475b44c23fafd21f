"""A score over victims as an estimate: its value, a 95 % confidence interval and the number of victims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, cast

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.wrappers.abstract import WrapperMetric

# The quantiles of a two-sided 95 % interval leave 2.5 % on each side.
_QUANTILE = 0.975


class Estimate(NamedTuple):
    """A mean over victims with the ends of its 95 % confidence interval; NaN where there is none."""

    value: float
    low: float
    high: float
    victims: int


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    r"""Compute Wilson's 95 % confidence interval of a share of n victims.

    .. math::
        \frac{1}{1 + z^2 / n} \left( p + \frac{z^2}{2 n}
        \pm z \sqrt{\frac{p (1 - p)}{n} + \frac{z^2}{4 n^2}} \right), \quad z = 1.96

    The interval stays within [0, 1] and does not shrink to a point at 0 % and 100 %.

    Args:
        share: p, from 0 to 1.
        n: number of victims.

    Returns:
        The ends of the interval, both from 0 to 1; (NaN, NaN) if n is 0.

    Raises:
        ValueError: ``share`` is outside [0, 1], or ``n`` is negative.

    References:
        Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, 1927,
        https://doi.org/10.1080/01621459.1927.10502953.

    Example:
        >>> [round(end, 4) for end in wilson_interval(1.0, 1000)]
        [0.9962, 1.0]
    """
    if n < 0:
        raise ValueError(f"Expected `n` to be at least 0, but got {n}.")
    if n == 0:
        return math.nan, math.nan
    if not 0 <= share <= 1:
        raise ValueError(f"Expected `share` in [0, 1], but got {share}.")
    z2 = float(ndtri(_QUANTILE)) ** 2
    centre = share + z2 / (2 * n)
    spread = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    low, high = ((centre + sign * spread) / (1 + z2 / n) for sign in (-1, 1))
    # Rounding must not move an end past the share itself.
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def mean_interval(values: Tensor) -> tuple[float, float]:
    r"""Compute Student's 95 % confidence interval of the mean of V independent values.

    .. math:: \bar x \pm t_{0.975,\, V - 1} \; s / \sqrt{V}

    with :math:`s` the standard deviation of the sample. It is exact for normal values. It is always
    symmetric, so the interval of an MSE, whose distribution is far from normal, can extend below 0.

    Args:
        values: ``(V,)``, in any unit; the interval has the same unit.

    Returns:
        The ends of the interval; (NaN, NaN) for fewer than two values, or if one is infinite.

    Raises:
        ValueError: ``values`` has another shape or contains NaN.

    References:
        Student, *The Probable Error of a Mean*, 1908, https://doi.org/10.1093/biomet/6.1.1.

    Example:
        >>> [round(end, 3) for end in mean_interval(torch.tensor([1.0, 2.0, 3.0]))]
        [-0.484, 4.484]
    """
    _check_values(values)
    n = len(values)
    if n < 2 or not bool(torch.isfinite(values).all()):
        return math.nan, math.nan
    values = values.cpu().double()
    mean, half = values.mean().item(), stdtrit(n - 1, _QUANTILE) * values.std().item() / math.sqrt(n)
    return float(mean - half), float(mean + half)


class _OverVictims(Metric):
    """Metric that keeps one value per victim, so the estimate does not depend on batches and processes."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add the values ``(V,)`` of V further victims."""
        _check_values(values)
        self.values.append(values.detach().to(self.device, self.dtype))

    def compute(self) -> Estimate:
        """Return the estimate over all victims so far, of all processes."""
        # After synchronisation over processes, the state is one tensor; else it is a list, empty before any update.
        # The mean is computed on the CPU in double precision, which some devices lack.
        values = (dim_zero_cat(self.values) if len(self.values) else torch.empty(0)).cpu().double()
        return Estimate(values.mean().item(), *self._interval(values), victims=len(values))

    def _interval(self, values: Tensor) -> tuple[float, float]:
        raise NotImplementedError


class MeanOverVictims(_OverVictims):
    """The mean of a score over victims, with Student's 95 % confidence interval (:func:`mean_interval`).

    ``update`` takes the scores ``(V,)`` of V further victims; pass each victim once. ``compute`` returns an
    :class:`Estimate` in the unit of the score. Without victims its value is NaN; with fewer than two victims
    its interval is NaN. An infinite score makes the mean infinite and the interval NaN. Values are kept in the
    metric's precision (``set_dtype``), single by default, and averaged in double precision.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: at ``update``, the scores have another shape or contain NaN.

    Example:
        >>> metric = MeanOverVictims()
        >>> metric.update(torch.tensor([20.0, 30.0, 40.0]))
        >>> estimate = metric.compute()
        >>> round(estimate.value, 2), round(estimate.low, 2), round(estimate.high, 2), estimate.victims
        (30.0, 5.16, 54.84, 3)
    """

    def _interval(self, values: Tensor) -> tuple[float, float]:
        return mean_interval(values)


class ShareOverVictims(_OverVictims):
    """A share over victims, such as the success rate, with Wilson's 95 % interval (:func:`wilson_interval`).

    ``update`` takes the shares ``(V,)`` in [0, 1] of V further victims; pass each victim once. For victims with one
    image, shares are 0 or 1. With several images, the interval still counts victims, not images. That
    is conservative: the images of a victim have one gradient and one network in common, and in the worst case
    all of them succeed or fail together. ``compute`` returns an :class:`Estimate`; without victims it is NaN. Values
    are kept in the metric's precision (``set_dtype``), single by default, and averaged in double precision.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: at ``update``, the shares have another shape, contain NaN, or are outside [0, 1].

    Example:
        >>> metric = ShareOverVictims()
        >>> metric.update(torch.tensor([1.0, 1.0, 0.0, 1.0]))
        >>> estimate = metric.compute()
        >>> round(estimate.value, 3), round(estimate.low, 3), round(estimate.high, 3), estimate.victims
        (0.75, 0.301, 0.954, 4)
    """

    def update(self, values: Tensor) -> None:
        """Add the shares ``(V,)`` of V further victims."""
        if not bool(((values >= 0) & (values <= 1) | values.isnan()).all()):
            raise ValueError(
                f"Expected `values` in [0, 1], but got {values.min().item():g} to {values.max().item():g}."
            )
        super().update(values)

    def _interval(self, values: Tensor) -> tuple[float, float]:
        return wilson_interval(values.mean().item(), len(values))


class ScoresOverVictims(WrapperMetric):
    """Metric with an estimate for each score of victims; the scores are attributes of objects of class ``kind``."""

    kind: ClassVar[type]

    def __init__(self, **estimates: _OverVictims) -> None:
        super().__init__()
        self.estimates = nn.ModuleDict(estimates)

    def _metrics(self) -> Iterator[tuple[str, _OverVictims]]:
        return ((name, cast(_OverVictims, metric)) for name, metric in self.estimates.items())

    def update(self, scores: Iterable[Any]) -> None:
        """Add the scores of further victims."""
        scores = list(scores)
        for one in scores:
            if not isinstance(one, self.kind):
                raise TypeError(f"Expected `scores` to hold {self.kind.__name__}s, but got {type(one).__name__}.")
        for name, metric in self._metrics():
            metric.update(torch.tensor([getattr(one, name) for one in scores]))

    def compute(self) -> dict[str, Any]:
        """Return the estimates over all victims so far, by the names of the scores."""
        return {name: metric.compute() for name, metric in self._metrics()}

    def reset(self) -> None:
        """Remove all victims."""
        for _, metric in self._metrics():
            metric.reset()


def _check_values(values: Tensor) -> None:
    if values.ndim != 1:
        raise ValueError(f"Expected `values` of shape (V,), but got {tuple(values.shape)}.")
    missing = int(values.isnan().sum())
    if missing:
        raise ValueError(f"Expected `values` without NaN, but got NaN for {missing} of {len(values)} victims.")
