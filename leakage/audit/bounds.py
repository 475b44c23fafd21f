r"""Bounds on what any attacker can achieve against a declared mechanism. They look at no gradient and run no attack.

**The game.** One image z, the *target*, is drawn from a prior. The attacker knows the prior, the network, the mechanism
and all other images. It sees what the mechanism releases, and names an image. It succeeds if that image is close enough
to z, by a measure and a threshold that were declared beforehand. ``prior``, :math:`\kappa`, is the highest probability
of success of a guess that does not look at the release: 1/K for K equally likely images.

**The proof.** Let the mechanism release :math:`\mu` without the target and :math:`\nu_z` with it. Under :math:`\mu` the
release says nothing about z: any attacker can only guess, with a success of at most :math:`\kappa`. Let f be the
trade-off function between the two: an event with probability a under :math:`\mu` has a probability of at most 1 - f(a)
under :math:`\nu_z`, for every z. As 1 - f is concave, no attacker's success exceeds :math:`1 - f(\kappa)`.

**Adjacency.** Reconstruction therefore compares a release with the target to one *without* it, and never the releases
of two possible targets. If the gradient of each image is clipped to the norm C, and noise of standard deviation
:math:`\sigma C` is added to their sum, the two sums without noise differ by at most C, which is :math:`1 / \sigma` in
units of the noise. The sums for two targets may differ by 2 C. This does not matter, as both are within C of the sum
without a target.

**What must hold** for a bound to mean anything:

- The other images say nothing about the target, or :math:`\kappa` is the success of a guess that knows them. For
  example, two pictures of one person in a batch are not independent.
- :math:`\kappa` is the success of the *best* guess, which also knows the label if attackers may know it. If it was
  measured, use the upper end of its interval.
- The mechanism ran as declared: every gradient was clipped separately, the noise was fresh, and nothing else was
  released.

A bound holds for one image of a client. It also holds for the expected share of the client's images that are rebuilt.
The probability that at least one of N images is rebuilt is at most N times as large.

References:
    Balle, Cherubin and Hayes, *Reconstructing Training Data with Informed Adversaries*, IEEE S&P 2022,
    https://arxiv.org/abs/2201.04845; Hayes, Mahloujifar and Balle, *Bounding Training Data Reconstruction in DP-SGD*,
    NeurIPS 2023, https://arxiv.org/abs/2302.07225; Dong, Roth and Su, *Gaussian Differential Privacy*, 2022,
    https://arxiv.org/abs/1905.02383.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from scipy.signal import lfilter
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from leakage.errors import check_choice, check_count, check_kept, check_not_negative, check_positive

# The distance of the sums of neighbouring data sets, in units of the clipping norm C.
_DISTANCES = {"add-remove": 1.0, "replace-one": 2.0}

# The distribution of the privacy loss: its errors of probability and loss, and the points of its grid.
_PROBABILITY_ERROR = 1e-9
_LOSS_ERROR = 1e-3
_POINTS = 2**21

# The most numbers of steps with the target that are looked at one by one; more are grouped.
_GROUPS = 4096


def gaussian_success_bound(
    prior: float, noise_multiplier: float, steps: int = 1, adjacency: str = "add-remove"
) -> float:
    r"""Bound the success of any attacker on T noisy sums of clipped gradients, with the target in each sum.

    .. math:: \Phi\Bigl(\Phi^{-1}(\kappa) + \frac{\sqrt T}{\sigma} \cdot \frac{\Delta}{C}\Bigr)

    where :math:`\Phi` is the distribution function of the standard normal distribution, and :math:`\Delta` is the
    distance between the sums of neighbouring data sets, without noise.

    The mechanism is :class:`leakage.defenses.DPSGD` on full batches: the gradient of each image is clipped to the norm
    C, and noise of standard deviation :math:`\sigma C` is added to their sum. The weights may depend on earlier
    releases, and the sum may be divided by a public number. Training in shuffled epochs takes each image once per
    epoch, so T is the number of epochs. If images are drawn at random for each step, the bound is lower; see
    :func:`subsampled_success_bound`.

    Args:
        prior: :math:`\kappa`, the success of the best guess without the releases, from 0 to 1.
        noise_multiplier: :math:`\sigma`, positive.
        steps: T, the number of releases with the target.
        adjacency: ``"add-remove"`` compares releases with and without the target, :math:`\Delta = C`. This is all that
            reconstruction needs. The bound cannot be lowered: with two equally likely images whose gradients are
            opposite and have norm C, an attacker reaches it exactly. ``"replace-one"`` compares with another image in
            place of the target, :math:`\Delta = 2 C`. This bound also holds, but is larger. It is for mechanisms
            where only that distance is known.

    Returns:
        A probability, from ``prior`` to 1.

    Raises:
        ValueError: an argument is out of range.

    References:
        Hayes, Mahloujifar and Balle, *Bounding Training Data Reconstruction in DP-SGD*, NeurIPS 2023,
        https://arxiv.org/abs/2302.07225; several releases: Dong, Roth and Su, *Gaussian Differential Privacy*, 2022,
        https://arxiv.org/abs/1905.02383.

    Example:
        >>> round(gaussian_success_bound(0.1, noise_multiplier=1.0), 3)
        0.389
        >>> round(gaussian_success_bound(0.1, noise_multiplier=10.0, steps=100), 3)
        0.389
    """
    _check_probability(prior=prior)
    check_positive(noise_multiplier=noise_multiplier)
    check_count(steps=steps)
    check_choice("adjacency", adjacency, _DISTANCES)
    if prior in (0, 1):
        return float(prior)
    # Rounding must not take it below the guess.
    return max(prior, float(ndtr(ndtri(prior) + _DISTANCES[adjacency] * math.sqrt(steps) / noise_multiplier)))


def approximate_success_bound(prior: float, epsilon: float, delta: float) -> float:
    r"""Bound the success of any attacker on a mechanism if only its :math:`(\varepsilon, \delta)` is known.

    .. math:: \min\bigl(1,\; \kappa e^\varepsilon + \delta,\; 1 - e^{-\varepsilon} (1 - \kappa - \delta)\bigr)

    The second term bounds the probability of success, and the third that of failure. For large :math:`\kappa` the third
    is smaller. If more is known about the mechanism, the other bounds are lower.

    The mechanism may be any whose releases together are :math:`(\varepsilon, \delta)` differentially private for the
    target. Either adjacency will do if :math:`(\varepsilon, \delta)` holds for it: neither a release without the target
    nor one with a fixed image in its place says anything about the target.

    Args:
        prior: :math:`\kappa`, the success of the best guess without the release, from 0 to 1.
        epsilon: :math:`\varepsilon`, at least 0.
        delta: :math:`\delta`, from 0 to 1.

    Returns:
        A probability, from ``prior`` to 1.

    Raises:
        ValueError: an argument is out of range.

    References:
        Balle, Cherubin and Hayes, *Reconstructing Training Data with Informed Adversaries*, IEEE S&P 2022,
        https://arxiv.org/abs/2201.04845; the trade-off function: Dong, Roth and Su, *Gaussian Differential Privacy*,
        2022, https://arxiv.org/abs/1905.02383.

    Example:
        >>> round(approximate_success_bound(0.01, epsilon=2.0, delta=1e-5), 4)
        0.0739
    """
    _check_probability(prior=prior, delta=delta)
    check_not_negative(epsilon=epsilon)
    # e^epsilon may overflow.
    success = math.exp(min(0.0, math.log(prior) + epsilon)) if prior > 0 else 0.0
    failure = 1 - prior - delta
    # Rounding must not take it below the guess.
    return max(prior, min(1.0, success + delta, 1 - failure * math.exp(-epsilon)))


def subsampled_success_bound(prior: float, noise_multiplier: float, sample_rate: float, steps: int) -> float:
    r"""Bound the success of any attacker on T steps of DP-SGD that contain the target with probability q each.

    It is the smaller of two bounds. The first is for attackers who do not know which steps contained the target:

    .. math:: \inf_{\varepsilon \in \mathbb R} \; \kappa e^\varepsilon + \delta(\varepsilon), \qquad
        \delta(\varepsilon) = \sup_E \, \nu(E) - e^\varepsilon \mu(E)

    where :math:`\mu = N(0, \sigma^2)^T` are steps without the target and :math:`\nu = \bigl((1 - q)\, N(0, \sigma^2) +
    q\, N(1, \sigma^2)\bigr)^T` steps with it. No :math:`\delta` has to be chosen. The functions of Opacus' PRV
    accountant compute the bound from the distribution of the privacy loss :math:`\log \nu / \mu`, and their errors are
    added. The second bound is for attackers who know which steps contained the target,

    .. math:: \sum_{k=0}^T \binom{T}{k} q^k (1 - q)^{T - k} \; \Phi\bigl(\Phi^{-1}(\kappa) + \sqrt k / \sigma\bigr)

    and is exact for one step and for q = 1, where Opacus is not needed. It is the smaller one if there is little noise.

    The mechanism is :class:`leakage.defenses.DPSGD` on images that are drawn for each step independently of each other
    and of other steps, and which images were drawn is not released. (Shuffled epochs and batches of a fixed size are
    other mechanisms; for epochs see :func:`gaussian_success_bound`.) The gradient of each image is clipped to the norm
    C, and noise of standard deviation :math:`\sigma C` is added to their sum. The sum may be divided by a public
    number, such as the expected number of images. Adjacency is add-remove, as reconstruction needs no other.

    Args:
        prior: :math:`\kappa`, the success of the best guess without the releases, from 0 to 1.
        noise_multiplier: :math:`\sigma`, positive.
        sample_rate: q, the probability that an image is in a step, above 0 and at most 1.
        steps: T, the number of training steps.

    Returns:
        A probability, from ``prior`` to 1, and never below the exact bound. With Opacus it exceeds the exact bound by
        about 0.1 %, and by a few percent for a million steps and more. It can't resolve values below 1e-9.

    Raises:
        ValueError: an argument is out of range.
        ImportError: Opacus is not installed.

    References:
        Hayes, Mahloujifar and Balle, *Bounding Training Data Reconstruction in DP-SGD*, NeurIPS 2023,
        https://arxiv.org/abs/2302.07225; Gopi, Lee and Wutschitz, *Numerical Composition of Differential Privacy*,
        NeurIPS 2021, https://arxiv.org/abs/2106.02848.

    Example:
        >>> round(subsampled_success_bound(0.1, noise_multiplier=1.0, sample_rate=0.1, steps=20), 2)
        0.24
    """
    _check_probability(prior=prior)
    check_positive(noise_multiplier=noise_multiplier)
    check_kept(sample_rate=sample_rate)
    check_count(steps=steps)
    if prior in (0, 1):
        return float(prior)
    if sample_rate == 1:
        return gaussian_success_bound(prior, noise_multiplier, steps)
    known = _told_which_steps(prior, noise_multiplier, sample_rate, steps)
    if steps == 1:
        return known
    return min(known, _by_privacy_loss(prior, noise_multiplier, sample_rate, steps))


def gaussian_renyi_epsilon(
    noise_multiplier: float, steps: int = 1, order: float = 2.0, adjacency: str = "replace-one"
) -> float:
    r"""Return the Rényi privacy of T noisy sums of clipped gradients, with the target in each sum.

    .. math:: \varepsilon_\alpha = \frac{\alpha \, T}{2 \, \sigma^2} \Bigl(\frac{\Delta}{C}\Bigr)^2

    The mechanism and the symbols are those of :func:`gaussian_success_bound`.

    Args:
        noise_multiplier: :math:`\sigma`, positive.
        steps: T, the number of releases with the target.
        order: :math:`\alpha`, above 1.
        adjacency: ``"replace-one"``, :math:`\Delta = 2 C`, which :func:`mse_bound` needs, or ``"add-remove"``,
            :math:`\Delta = C`, which accountants of DP-SGD use.

    Returns:
        :math:`\varepsilon_\alpha`, positive.

    Raises:
        ValueError: an argument is out of range.

    References:
        Mironov, *Rényi Differential Privacy*, CSF 2017, https://arxiv.org/abs/1702.07476.

    Example:
        >>> gaussian_renyi_epsilon(noise_multiplier=4.0)
        0.25
    """
    check_positive(noise_multiplier=noise_multiplier, order=order)
    check_count(steps=steps)
    check_choice("adjacency", adjacency, _DISTANCES)
    if order <= 1:
        raise ValueError(f"Expected `order` above 1, but got {order!r}.")
    return order * steps / 2 * (_DISTANCES[adjacency] / noise_multiplier) ** 2


def mse_bound(renyi_epsilon: float, pixel_range: float = 1.0) -> float:
    r"""Return the lowest mean squared error that any *unbiased* attacker can reach.

    .. math:: \mathrm{MSE} \ge \frac{r^2 / 4}{e^{\varepsilon_2} - 1}

    An attacker is unbiased if, for every true image, the image that it finds is the true one on average over the noise.
    Attackers with a prior are not unbiased, as they prefer some images. For them this is **not** a bound: a grey image
    has an MSE of at most r²/4, whatever the noise. Use the bounds on success for them.

    The MSE is the mean over pixels, expected over the noise. The bound holds for every true image. It assumes that each
    pixel may have any value of an interval of length r, whatever the values of the others. Then another image differs
    in only one pixel, by at least r/2, and the inequality of Hammersley, Chapman and Robbins for the two images gives
    the bound for that pixel.

    As the proof compares two images, :math:`\varepsilon_2` is for replace-one adjacency. For one sum of clipped
    gradients it is :math:`(2 C)^2 / (\sigma C)^2 = 4 / \sigma^2`, four times the value that accountants of DP-SGD
    report. :func:`gaussian_renyi_epsilon` computes it.

    Args:
        renyi_epsilon: :math:`\varepsilon_2`, the Rényi privacy of order 2 of all releases together, positive.
        pixel_range: r, positive; 1 for pixels in [0, 1]. If it differs between pixels, the root of the mean of r².

    Returns:
        An MSE in squared units of the pixels, at least 0. It may exceed r², which means that unbiased attackers leave
        the range of the pixels.

    Raises:
        ValueError: an argument is out of range.

    References:
        Guo, Karrer, Chaudhuri and van der Maaten, *Bounding Training Data Reconstruction in Private (Deep) Learning*,
        ICML 2022, https://arxiv.org/abs/2201.12383.

    Example:
        >>> round(mse_bound(gaussian_renyi_epsilon(noise_multiplier=4.0)), 2)
        0.88
    """
    check_positive(renyi_epsilon=renyi_epsilon, pixel_range=pixel_range)
    # 1 / (e^x - 1), written so that e^x does not overflow.
    return pixel_range**2 / 4 * math.exp(-renyi_epsilon) / -math.expm1(-renyi_epsilon)


def _told_which_steps(prior: float, noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """Bound for attackers who know which steps contained the target: the mean over the number of these steps."""
    if steps <= _GROUPS:
        numbers = np.arange(steps + 1)
        share, left = binom.pmf(numbers, steps, sample_rate), 0.0
    else:
        # A group counts as its largest number. What is left out, or may be lost by rounding, counts as success.
        first, last = (int(end(1e-15, steps, sample_rate)) for end in (binom.ppf, binom.isf))
        numbers = np.unique(np.linspace(first, last, min(last - first + 1, _GROUPS)).round())
        below = binom.cdf(numbers, steps, sample_rate)
        share, left = np.diff(below, prepend=0.0), 1 - below[-1] + _GROUPS * np.finfo(float).eps
    success = ndtr(ndtri(prior) + np.sqrt(numbers) / noise_multiplier)
    return max(prior, min(1.0, float(share @ success + left)))


def _by_privacy_loss(prior: float, noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """Bound from the distribution of the privacy loss, with its errors added; 1 if the grid would be too coarse."""
    try:
        from opacus.accountants.analysis import prv
    except ImportError as error:
        raise ImportError(
            "Expected Opacus, whose accountant computes the bound for several steps of DP-SGD. Install it with "
            "`pip install leakage[dp]`."
        ) from error
    loss = prv.PoissonSubsampledGaussianPRV(sample_rate, noise_multiplier)
    # Ignored warnings: about orders that only widen the grid, and logarithms of 0 outside the distribution.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        largest = prv.compute_safe_domain_size(
            prvs=[loss],
            max_self_compositions=[steps],
            eps_error=_LOSS_ERROR,
            delta_error=_PROBABILITY_ERROR,
        )
        # The step of the grid for an error of 1, as in the accountant.
        width = 1 / math.sqrt(steps * math.log(12 / _PROBABILITY_ERROR) / 2)
        loss_error = max(_LOSS_ERROR, 2 * largest / width / _POINTS)
        if not loss_error < 1:
            return 1.0
        grid = prv.Domain.create_aligned(-largest, largest, loss_error * width)
        one = prv.discretize(prv.TruncatedPrivacyRandomVariable(loss, grid.t_min, grid.t_max), grid)
        total = prv.compose_heterogeneous([one], [steps])
        # From the largest loss down: the probability of at least it, and delta = E max(0, 1 - e^(epsilon - loss)), by a
        # recursion without differences: delta(t) = e^-w delta(t + w) + (1 - e^-w) P(loss > t).
        losses, above = total.domain.ts[::-1], np.cumsum(total.pmf[::-1].clip(min=0))
        decay = math.exp(-total.domain.dt)
        delta = lfilter([0.0, 1 - decay], [1.0, -decay], above)
        bound = float(np.min(prior * np.exp(losses + loss_error) + delta))
    bound += _PROBABILITY_ERROR + float(np.finfo(float).eps) * (steps + len(losses))
    return bound if bound < 1 else 1.0


def _check_probability(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"Expected `{name}` from 0 to 1, but got {value!r}.")
