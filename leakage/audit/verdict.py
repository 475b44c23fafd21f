"""From figures to a verdict: the user's thresholds, and bounds for declared mechanisms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scipy.stats import binom

from leakage.audit.bounds import gaussian_success_bound
from leakage.audit.client import Client
from leakage.audit.measuring import METRICS
from leakage.audit.report import Bound, Figure, Measured, Threshold
from leakage.defenses import DPSGD
from leakage.errors import check_choice
from leakage.metrics import wilson_interval

#: The δ of the ε that bounds in :class:`~leakage.audit.AuditReport` report.
DELTA = 1e-5
#: The metrics that are shares, from 0 to 1.
SHARES = ("label_accuracy", "success_rate", "identified")
# The largest probability, at the limit, of as many finds as there were, for the limit to count as exceeded.
_CHANCE = 0.05


def check_thresholds(fail_above: Mapping[str, float] | None) -> dict[str, float]:
    """Check limits by metric and return them as floats.

    Raises:
        ValueError: a metric does not exist, or its limit is out of range.
    """
    limits = dict(fail_above or {})
    for metric, limit in limits.items():
        check_choice("fail_above", metric, METRICS)
        number = isinstance(limit, int | float) and not isinstance(limit, bool) and math.isfinite(limit)
        if not number or (metric in SHARES and not 0 <= limit <= 1):
            wanted = "a share from 0 to 1" if metric in SHARES else "a finite number"
            raise ValueError(f"Expected `fail_above` of {metric} as {wanted}, but got {limit!r}.")
    return {metric: float(limit) for metric, limit in limits.items()}


def victims_needed(limit: float) -> float:
    """Return how many victims it takes for the interval of a share to end at the limit if no victim is found.

    Example:
        >>> victims_needed(0.05)
        73
    """
    if limit <= 0:
        return math.inf
    # If none of n victims is found, the interval ends at z² / (n + z²).
    squared = 1 / (1 / wilson_interval(0.0, 1)[1] - 1)
    return math.ceil(squared / limit - squared - 1e-9)


def decide(limit: float, figure: Figure, *, reached: bool, share: bool = True) -> str:
    """Decide on a limit: ``"exceeded"``, ``"within"`` or ``"inconclusive"``.

    It is exceeded if the whole interval lies above it. Intervals of few victims are too narrow, so a ``share`` must
    also be reached in at most 5 % of all audits if the limit were the true rate. It is within if the whole interval
    lies at or below the limit and the budget was enough for all attacks (``reached``). Otherwise it is inconclusive.

    Example:
        >>> decide(0.2, Figure(1.0, *wilson_interval(1.0, 1), 1), reached=True)
        'inconclusive'
        >>> decide(0.2, Figure(1.0, *wilson_interval(1.0, 2), 2), reached=True)
        'exceeded'
    """
    if figure.low > limit:
        found = math.floor(figure.value * figure.victims + 1e-9)
        by_chance = share and binom.sf(found - 1, figure.victims, limit) > _CHANCE
        return "inconclusive" if by_chance else "exceeded"
    return "within" if figure.high <= limit and reached else "inconclusive"


def thresholds(
    limits: Mapping[str, float], clients: Sequence[Client], measured: Sequence[Measured], unreached: set[str]
) -> list[Threshold]:
    """Compare each limit with each figure that it applies to.

    Args:
        limits: the limits by metric.
        clients: the clients of the audit.
        measured: the figures of all attacks.
        unreached: the names of clients with an attack that the budget did not reach.
    """
    found = []
    for metric, limit in limits.items():
        for client in clients:
            own = [one for one in measured if one.client == client.name and metric in one.metrics]
            for one in own:
                figure, reached = one.metrics[metric], client.name not in unreached
                decision = decide(limit, figure, reached=reached, share=metric in SHARES)
                found.append(Threshold(metric, limit, client.name, one.attack, figure, decision))
            if not own:
                nothing = Figure(math.nan, math.nan, math.nan, 0)
                found.append(Threshold(metric, limit, client.name, "", nothing, "inconclusive"))
    return found


def bounds(client: Client, fewest_others: int, guessed: Figure | None) -> list[Bound]:
    """Return bounds that no attacker can exceed against a client with DP-SGD.

    Args:
        client: the declared client.
        fewest_others: the number of images of the rarest class that a reconstruction is compared with.
        guessed: the success rate of guessing the nearest of the auditor's images without a gradient.
    """
    private = next((defense for defense in client.defenses if isinstance(defense, DPSGD)), None)
    if private is None or not private.noise_multiplier:
        return []
    sigma = private.noise_multiplier
    uses = math.ceil(client.local_steps * (client.local_batch_size or client.images) / client.images)  # of each image
    epsilon = private.epsilon(uses, 1.0, DELTA)
    releases = "one release" if uses == 1 else f"{uses} steps with each image"
    mechanism = f"{private!r}, {releases}: ε = {epsilon:.3g} at δ = {DELTA:g}"
    source = "Hayes, Mahloujifar and Balle 2023, https://arxiv.org/abs/2302.07225"
    chance = min(1.0, client.images / (fewest_others + 1))
    kept = [
        Bound(
            *(client.name, mechanism, "identified", gaussian_success_bound(chance, sigma, uses)),
            f"{source}; a guess is right with a probability of {chance:.3g}",
        )
    ]
    if guessed is not None and math.isfinite(guessed.high):
        kept.append(
            Bound(
                *(client.name, mechanism, "success_rate", gaussian_success_bound(guessed.high, sigma, uses)),
                f"{source}; the auditor's nearest image succeeds with a probability of at most {guessed.high:.3g}",
            )
        )
    return kept
