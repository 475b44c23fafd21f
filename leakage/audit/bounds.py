r"""Bounds on what any attacker can achieve against a declared mechanism. They look at no gradient and run no attack.

**The game.** One image z, the *target*, is drawn from a prior. The attacker knows the prior, the network, the mechanism
and all other images, sees what the mechanism releases, and names an image. It is a success if that image is near enough
to z, by a measure and a threshold that were declared beforehand. ``prior``, :math:`\kappa`, is the highest probability
of success of a guess that does not look at the release: 1/K for K equally likely images that are to be told apart.

**The proof.** Let the mechanism release :math:`\mu` without the target and :math:`\nu_z` with it. Under :math:`\mu` the
release says nothing of z: any attacker only guesses, with success :math:`\kappa` at most. Let f be the trade-off
function between the two: an event of probability a under :math:`\mu` has a probability of 1 - f(a) at most under
:math:`\nu_z`, for every z. Then, as 1 - f is concave, no attacker's success exceeds :math:`1 - f(\kappa)`.

**Adjacency.** So reconstruction compares a release with the target to one *without* it, and never the releases of two
possible targets. If the gradient of each image is clipped to the norm C and noise of standard deviation
:math:`\sigma C` is added to their sum, the noiseless two are at most C apart: :math:`1 / \sigma` in units of the noise.
Those of two targets may be 2 C apart; that does not matter, as both are within C of the release without a target.

**What must hold** for a bound to mean anything:

- The other images say nothing of the target, or :math:`\kappa` is that of a guess by someone who knows them: two
  pictures of one person in a batch are not independent.
- :math:`\kappa` is that of the *best* guess, by someone who knows the label too if attackers may. If it was measured,
  the upper end of its interval belongs here.
- The mechanism ran as declared: every gradient clipped by itself, fresh noise, and nothing else released.

A bound is for one image of a client. The expected share of its images that are rebuilt keeps below it as well; the
probability that at least one of N is rebuilt is at most N times as large.

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

# How far apart two neighbouring data sets are, in units of the clipping norm C.
_DISTANCES = {"add-remove": 1.0, "replace-one": 2.0}

# The distribution of the privacy loss: probability and loss by which it may be off, and points of its grid.
_PROBABILITY_ERROR = 1e-9
_LOSS_ERROR = 1e-3
_POINTS = 2**21

# Numbers of steps that took the target in, of which each is looked at by itself; more of them are grouped.
_GROUPS = 4096


def gaussian_success_bound(
    prior: float, noise_multiplier: float, steps: int = 1, adjacency: str = "add-remove"
) -> float:
    r"""The highest success of any attacker on T noisy sums of clipped gradients, with the target in each.

    .. math:: \Phi\Bigl(\Phi^{-1}(\kappa) + \frac{\sqrt T}{\sigma} \cdot \frac{\Delta}{C}\Bigr)

    with :math:`\Phi` the distribution function of the standard normal distribution and :math:`\Delta` the distance
    between the noiseless sums of neighbouring data sets.

    The mechanism is :class:`leakage.defenses.DPSGD` on full batches: the gradient of each image is clipped to the norm
    C, and noise of standard deviation :math:`\sigma C` is added to their sum. The weights may depend on earlier
    releases, and the sum may be divided by a public number. Training in shuffled epochs takes each image once in each:
    there T is the number of epochs. Where images are drawn at random for each step, the bound is lower:
    :func:`subsampled_success_bound`.

    Args:
        prior: :math:`\kappa`, the success of the best guess without the releases, from 0 to 1.
        noise_multiplier: :math:`\sigma`, positive.
        steps: T, the number of releases with the target.
        adjacency: ``"add-remove"`` compares releases with and without the target, :math:`\Delta = C`. Reconstruction
            needs no more, and it cannot be lowered: whoever is to tell apart two equally likely images whose gradients
            are opposite and of norm C meets the bound exactly. ``"replace-one"`` compares with another image in the
            target's place, :math:`\Delta = 2 C`. It holds as well and is larger; it is for mechanisms of which only
            that distance is known.

    Returns:
        A probability, from ``prior`` to 1.

    Raises:
        ValueError: an argument out of its range.

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
    # Rounding must not put it below the guess.
    return max(prior, float(ndtr(ndtri(prior) + _DISTANCES[adjacency] * math.sqrt(steps) / noise_multiplier)))


def approximate_success_bound(prior: float, epsilon: float, delta: float) -> float:
    r"""The highest success of any attacker on a mechanism of which only its :math:`(\varepsilon, \delta)` is known.

    .. math:: \min\bigl(1,\; \kappa e^\varepsilon + \delta,\; 1 - e^{-\varepsilon} (1 - \kappa - \delta)\bigr)

    The second term bounds the probability of success, the third that of failure; the third is the smaller one for large
    :math:`\kappa`. If more is known of the mechanism, the other bounds are lower.

    The mechanism is any that is :math:`(\varepsilon, \delta)` differentially private for the target, all its releases
    taken together. Either adjacency will do if :math:`(\varepsilon, \delta)` was told for it: a release without the
    target and one with a fixed image in its place say nothing of the target, either of them.

    Args:
        prior: :math:`\kappa`, the success of the best guess without the release, from 0 to 1.
        epsilon: :math:`\varepsilon`, at least 0.
        delta: :math:`\delta`, from 0 to 1.

    Returns:
        A probability, from ``prior`` to 1.

    Raises:
        ValueError: an argument out of its range.

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
    # e^epsilon itself may be beyond all numbers.
    success = math.exp(min(0.0, math.log(prior) + epsilon)) if prior > 0 else 0.0
    failure = 1 - prior - delta
    # Rounding must not put it below the guess.
    return max(prior, min(1.0, success + delta, 1 - failure * math.exp(-epsilon)))


def subsampled_success_bound(prior: float, noise_multiplier: float, sample_rate: float, steps: int) -> float:
    r"""The highest success of any attacker on T steps of DP-SGD, with the target in each with probability q.

    It is the smaller one of two bounds. The first hides in which steps the target was:

    .. math:: \inf_{\varepsilon \in \mathbb R} \; \kappa e^\varepsilon + \delta(\varepsilon), \qquad
        \delta(\varepsilon) = \sup_E \, \nu(E) - e^\varepsilon \mu(E)

    where :math:`\mu = N(0, \sigma^2)^T` are steps without the target and :math:`\nu = \bigl((1 - q)\, N(0, \sigma^2) +
    q\, N(1, \sigma^2)\bigr)^T` steps with it. No :math:`\delta` is to be chosen. The functions of Opacus' PRV
    accountant compute it from the distribution of the privacy loss :math:`\log \nu / \mu`, and their errors are added.
    The second is for attackers who are told in which steps the target was,

    .. math:: \sum_{k=0}^T \binom{T}{k} q^k (1 - q)^{T - k} \; \Phi\bigl(\Phi^{-1}(\kappa) + \sqrt k / \sigma\bigr)

    and is exact for one step and for q = 1; these need no Opacus. It is the smaller one where there is little noise.

    The mechanism is :class:`leakage.defenses.DPSGD` on images that are drawn for each step independently of one another
    and of other steps, and it is not told which. (Shuffled epochs and batches of a fixed size are other mechanisms; for
    epochs see :func:`gaussian_success_bound`.) The gradient of each image is clipped to the norm C, noise of standard
    deviation :math:`\sigma C` is added to their sum, and it is divided by a public number if at all, such as the
    expected number of images. Adjacency is add-remove, as reconstruction needs no other.

    Args:
        prior: :math:`\kappa`, the success of the best guess without the releases, from 0 to 1.
        noise_multiplier: :math:`\sigma`, positive.
        sample_rate: q, the probability with which an image is in a step, above 0 and at most 1.
        steps: T, of training.

    Returns:
        A probability, from ``prior`` to 1, and never below the exact one. With Opacus it is above the exact one by a
        thousandth of itself, by some hundredths for a million steps and more; below 1e-9 it tells no differences.

    Raises:
        ValueError: an argument out of its range.
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
    told = _told_which_steps(prior, noise_multiplier, sample_rate, steps)
    if steps == 1:
        return told
    return min(told, _by_privacy_loss(prior, noise_multiplier, sample_rate, steps))


def gaussian_renyi_epsilon(
    noise_multiplier: float, steps: int = 1, order: float = 2.0, adjacency: str = "replace-one"
) -> float:
    r""":math:`\varepsilon_\alpha`, the Rényi privacy of T noisy sums of clipped gradients, with the target in each.

    .. math:: \varepsilon_\alpha = \frac{\alpha \, T}{2 \, \sigma^2} \Bigl(\frac{\Delta}{C}\Bigr)^2

    The mechanism is that of :func:`gaussian_success_bound`, whose letters these are.

    Args:
        noise_multiplier: :math:`\sigma`, positive.
        steps: T, the number of releases with the target.
        order: :math:`\alpha`, above 1.
        adjacency: ``"replace-one"``, :math:`\Delta = 2 C`, as :func:`mse_bound` needs it, or ``"add-remove"``,
            :math:`\Delta = C`, as accountants of DP-SGD have it.

    Returns:
        :math:`\varepsilon_\alpha`, positive.

    Raises:
        ValueError: an argument out of its range.

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
    r"""The lowest mean squared error of any *unbiased* attacker.

    .. math:: \mathrm{MSE} \ge \frac{r^2 / 4}{e^{\varepsilon_2} - 1}

    An attacker is unbiased if the image found, averaged over the noise, is the true one, whichever that is. Attackers
    with a prior are not, as they prefer some images. For them this is **no** bound: a grey image has an MSE of r²/4 at
    most, whatever the noise. Use the bounds on success for them.

    The MSE is the mean over pixels, expected over the noise; the bound holds for every true image. It takes pixels that
    may have any value of an interval of length r, whatever the others have. Then there is an image that differs in one
    pixel alone, by r/2 at least, and the inequality of Hammersley, Chapman and Robbins for the two gives the bound of
    that pixel.

    As it compares two images, :math:`\varepsilon_2` is that of replace-one adjacency. For one sum of clipped gradients
    it is :math:`(2 C)^2 / (\sigma C)^2 = 4 / \sigma^2`, four times what accountants of DP-SGD tell:
    :func:`gaussian_renyi_epsilon`.

    Args:
        renyi_epsilon: :math:`\varepsilon_2`, the Rényi privacy of order 2 of all releases together, positive.
        pixel_range: r, positive, 1 for pixels in [0, 1]; where it differs between pixels, the root of the mean of r².

    Returns:
        An MSE in squared units of the pixels, at least 0; it may exceed r², which means that unbiased attackers leave
        the range.

    Raises:
        ValueError: an argument out of its range.

    References:
        Guo, Karrer, Chaudhuri and van der Maaten, *Bounding Training Data Reconstruction in Private (Deep) Learning*,
        ICML 2022, https://arxiv.org/abs/2201.12383.

    Example:
        >>> round(mse_bound(gaussian_renyi_epsilon(noise_multiplier=4.0)), 2)
        0.88
    """
    check_positive(renyi_epsilon=renyi_epsilon, pixel_range=pixel_range)
    # 1 / (e^x - 1), where e^x may be beyond all numbers.
    return pixel_range**2 / 4 * math.exp(-renyi_epsilon) / -math.expm1(-renyi_epsilon)


def _told_which_steps(prior: float, noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """The bound for attackers who know in which steps the target was: a mean over how many there were."""
    if steps <= _GROUPS:
        numbers = np.arange(steps + 1)
        share, left = binom.pmf(numbers, steps, sample_rate), 0.0
    else:
        # Groups count as their largest number; what is left out, and what rounding may lose, as success.
        first, last = (int(end(1e-15, steps, sample_rate)) for end in (binom.ppf, binom.isf))
        numbers = np.unique(np.linspace(first, last, min(last - first + 1, _GROUPS)).round())
        below = binom.cdf(numbers, steps, sample_rate)
        share, left = np.diff(below, prepend=0.0), 1 - below[-1] + _GROUPS * np.finfo(float).eps
    success = ndtr(ndtri(prior) + np.sqrt(numbers) / noise_multiplier)
    return max(prior, min(1.0, float(share @ success + left)))


def _by_privacy_loss(prior: float, noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """The bound by the distribution of the privacy loss, with its errors; 1 where that would be too coarse."""
    try:
        from opacus.accountants.analysis import prv
    except ImportError as error:
        raise ImportError(
            "Expected Opacus, whose accountant the bound of several steps of DP-SGD comes from. Install it by "
            "`pip install leakage[dp]`."
        ) from error
    loss = prv.PoissonSubsampledGaussianPRV(sample_rate, noise_multiplier)
    # Warnings: of orders that only make the grid wider, and of logarithms of 0 outside the distribution.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        largest = prv.compute_safe_domain_size(
            prvs=[loss],
            max_self_compositions=[steps],
            eps_error=_LOSS_ERROR,
            delta_error=_PROBABILITY_ERROR,
        )
        # The grid's width for an error of 1, as the accountant has it.
        width = 1 / math.sqrt(steps * math.log(12 / _PROBABILITY_ERROR) / 2)
        loss_error = max(_LOSS_ERROR, 2 * largest / width / _POINTS)
        if not loss_error < 1:
            return 1.0
        grid = prv.Domain.create_aligned(-largest, largest, loss_error * width)
        one = prv.discretize(prv.TruncatedPrivacyRandomVariable(loss, grid.t_min, grid.t_max), grid)
        total = prv.compose_heterogeneous([one], [steps])
        # From the largest loss down: its probability or more, and delta = E max(0, 1 - e^(epsilon - loss)), which has a
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
