"""The privacy guarantee of DP-SGD, computed by the accountants of Opacus."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from leakage.errors import check_choice, check_count, check_kept, check_positive, check_share

ACCOUNTANTS = ("prv", "rdp")


def epsilon(noise_multiplier: float, steps: int, sample_rate: float, delta: float, accountant: str = "prv") -> float:
    r"""Return :math:`\varepsilon` of a number of DP-SGD steps on images that are sampled independently in each step.

    Args:
        noise_multiplier: :math:`\sigma`, positive.
        steps: number of training steps.
        sample_rate: probability that an image is in a step, above 0 and at most 1.
        delta: :math:`\delta`, above 0 and below 1.
        accountant: ``"prv"``, by the distribution of the privacy loss, or ``"rdp"``, by Rényi divergences, which gives
            larger values. Not used with ``sample_rate=1``, where the exact value is known.

    Raises:
        ValueError: an argument is out of its range, or the noise is too small for the accountant.
        ImportError: Opacus is not installed, and ``sample_rate`` is below 1.

    References:
        Gopi, Lee and Wutschitz, *Numerical Composition of Differential Privacy*, NeurIPS 2021,
        https://arxiv.org/abs/2106.02848; Mironov, Talwar and Zhang, *Rényi Differential Privacy of the Sampled Gaussian
        Mechanism*, 2019, https://arxiv.org/abs/1908.10530; exact: Balle and Wang, *Improving the Gaussian Mechanism for
        Differential Privacy*, ICML 2018, https://arxiv.org/abs/1805.06530.

    Example:
        >>> round(epsilon(1.0, steps=1000, sample_rate=0.01, delta=1e-5, accountant="rdp"), 1)
        2.1
    """
    check_positive(noise_multiplier=noise_multiplier)
    check_count(steps=steps)
    check_kept(sample_rate=sample_rate)
    check_share(delta=delta)
    check_choice("accountant", accountant, ACCOUNTANTS)
    if sample_rate == 1:
        return _of_gaussian(steps**0.5 / noise_multiplier, delta)
    try:
        from opacus.accountants import create_accountant
    except ImportError as error:
        raise ImportError(
            "Expected Opacus, which computes the epsilon of DP-SGD, but it is not installed. Install it by "
            "`pip install leakage[dp]`."
        ) from error
    counting = create_accountant(accountant)
    counting.history = [(noise_multiplier, sample_rate, steps)]
    try:
        return float(counting.get_epsilon(delta=delta))
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ValueError(
            f"Expected noise large enough for the accountant {accountant!r}, but got noise_multiplier="
            f"{noise_multiplier} with sample_rate={sample_rate} and steps={steps}: {error}"
        ) from error


def _of_gaussian(distance: float, delta: float) -> float:
    r"""Solve :math:`\delta = \Phi(\mu/2 - \epsilon/\mu) - e^\epsilon \Phi(-\mu/2 - \epsilon/\mu)`, which is exact."""

    def excess(epsilon: float) -> float:
        low, high = -distance / 2 - epsilon / distance, distance / 2 - epsilon / distance
        return float(ndtr(high) - np.exp(epsilon + log_ndtr(low))) - delta

    if excess(0.0) <= 0:
        return 0.0
    most = distance**2 / 2 + distance * (2 * math.log(1 / delta)) ** 0.5 + 1
    return float(brentq(excess, 0.0, most, xtol=1e-12, rtol=1e-12))
