"""What DP-SGD promises, by the accountants of Opacus."""

from __future__ import annotations

from leakage.errors import check_choice, check_count, check_kept, check_positive, check_share

ACCOUNTANTS = ("prv", "rdp")


def epsilon(noise_multiplier: float, steps: int, sample_rate: float, delta: float, accountant: str = "prv") -> float:
    r""":math:`\varepsilon` of so many steps of DP-SGD on images that are drawn independently for each of them.

    Args:
        noise_multiplier: :math:`\sigma`, positive.
        steps: of training.
        sample_rate: the probability with which an image is in a step, above 0 and at most 1.
        delta: :math:`\delta`, above 0 and below 1.
        accountant: ``"prv"``, by the distribution of the privacy loss, or ``"rdp"``, by Rényi divergences: larger.

    Raises:
        ValueError: an argument out of its range.
        ImportError: Opacus is not installed.

    References:
        Gopi, Lee and Wutschitz, *Numerical Composition of Differential Privacy*, NeurIPS 2021,
        https://arxiv.org/abs/2106.02848; Mironov, Talwar and Zhang, *Rényi Differential Privacy of the Sampled Gaussian
        Mechanism*, 2019, https://arxiv.org/abs/1908.10530.

    Example:
        >>> round(epsilon(1.0, steps=1000, sample_rate=0.01, delta=1e-5, accountant="rdp"), 1)
        2.1
    """
    check_positive(noise_multiplier=noise_multiplier)
    check_count(steps=steps)
    check_kept(sample_rate=sample_rate)
    check_share(delta=delta)
    check_choice("accountant", accountant, ACCOUNTANTS)
    try:
        from opacus.accountants import create_accountant
    except ImportError as error:
        raise ImportError(
            "Expected Opacus, whose accountants tell the epsilon of DP-SGD. Install it by `pip install leakage[dp]`."
        ) from error
    counting = create_accountant(accountant)
    counting.history = [(noise_multiplier, sample_rate, steps)]
    return float(counting.get_epsilon(delta=delta))
