"""The plan of an audit: which attacks run, and how they share the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from leakage.attacks import (
    ContinuationAttack,
    DLGAttack,
    GaussNewtonAttack,
    GradientInversion,
    GradInversionAttack,
    InvertingGradientsAttack,
    RGAPAttack,
)
from leakage.audit.client import Client
from leakage.audit.subject import Subject
from leakage.clients.inspection import with_targets
from leakage.clients.losses import OWN
from leakage.clients.smoothing import has_kinks
from leakage.clients.victim import Victim
from leakage.dummies import InferredLabels, Target
from leakage.errors import check_choice
from leakage.labels import Auxiliary
from leakage.objectives import GaussianPrior

#: The attacks of an audit. Those without a search come first. On a network with kinks, such as ReLU, ``gauss_newton``
#: comes after the other searches, as it finds less there.
ATTACKS = ("labels", "rgap", "gauss_newton", "continuation", "inverting_gradients", "grad_inversion", "dlg")
# Steps of a search with Adam: the number in the papers, and the fewest that are worth a run.
_MOST_STEPS, _FEWEST_STEPS = 4800, 300
# Networks with kinks and at most this many weights: continuation instead of Inverting Gradients.
_SMALL = 300_000
# What continuation is expected to need, as evaluations of its least squares.
_CONTINUED = 130
# The most values an image may have for a normal distribution to be fitted.
_MOST_PIXELS = 3072
# The images a class needs to get its own mean and covariance.
_OF_A_CLASS = 8
# Evaluations that Gauss-Newton is expected to need.
_NEWTON = 20
# Restarts of Gauss-Newton. Its default of three is meant for single hard victims.
_RESTARTS = 1
# A search gets shorter until this many victims fit into its share of the budget.
_WORTHWHILE = 8


@dataclass
class Candidate:
    """An attack that an audit may run.

    Attributes:
        name: a member of :data:`ATTACKS`.
        make: a function that returns a fresh attack, with a given number of steps if ``shortens``; None for ``labels``.
        evaluations: the approximate number of evaluations for one victim, unless the attack is shortened.
        shortens: whether the attack can be made with fewer steps.
        passes: the approximate number of forward and backward passes in one evaluation. It decides whether there is
            time for a trial.
        trial: a function that returns the attack for this trial; None for ``make``.
    """

    name: str
    make: Callable[..., GradientInversion] | None
    evaluations: int = 1
    shortens: bool = False
    passes: int = 3
    trial: Callable[[], GradientInversion] | None = None


def candidates(
    subject: Subject,
    client: Client,
    victim: Victim,
    *,
    seed: int,
    success_threshold: float,
    surrogate: bool = True,
    chosen: Sequence[str] | None = None,
) -> list[Candidate]:
    """Return the attacks for a client, in the order in which they run. Labels are read once and passed on.

    Args:
        subject: the audited network and data.
        client: the declared client.
        victim: the simulated client.
        seed: the seed of the attacks' starts.
        success_threshold: an image counts as reconstructed if its MSE is below this.
        surrogate: whether attackers have images of the same kind, which are the auditor's own.
        chosen: names from :data:`ATTACKS`, to return only these attacks.
    """
    for name in chosen or ():
        check_choice("attacks", name, ATTACKS)
    auxiliary = subject.auxiliary() if surrogate else None
    common: dict[str, Any] = {"seed": seed, "success_threshold": success_threshold}
    readable = client.reveal_labels or _readable(victim, auxiliary, seed)
    protocol = victim.protocol
    counted = readable and not client.reveal_labels and protocol.label_kind == "classes"
    found = [Candidate("labels", None)] if counted else []
    # For several images, Gauss-Newton starts from R-GAP's solution.
    closed = protocol.loss != OWN and protocol.label_kind == "classes" and client.local_steps == client.images == 1
    if readable and closed and not victim.defenses:
        found.append(Candidate("rgap", partial(RGAPAttack, **common)))
    newton: dict[str, Any] = {"underdetermined": True, "restarts": _RESTARTS}
    newton |= common if readable else common | {"joint_labels": True}
    if victim.defenses and surrogate and (prior := _prior(subject)) is not None:
        newton |= {"prior": prior, "restarts": 0}
    second_order = Candidate("gauss_newton", partial(GaussNewtonAttack, **newton), _NEWTON, passes=150)
    kinked = has_kinks(victim.model, *with_targets(subject.own_images[:2], victim.protocol))
    if not kinked:
        found.append(second_order)
    if readable:
        # One of the two, unless the auditor asks for the other.
        small = kinked and _is_small(victim)
        if small or "continuation" in (chosen or ()):
            made: Callable[..., GradientInversion] = partial(ContinuationAttack, **common)
            # The start is so much cheaper than the rest that a trial without it tells more.
            trial = partial(made, start_steps=0)
            found.append(Candidate("continuation", made, _CONTINUED, passes=100, trial=trial))
        if not small or "inverting_gradients" in (chosen or ()):
            made = partial(_with_steps, InvertingGradientsAttack, common)
            found.append(Candidate("inverting_gradients", made, _MOST_STEPS, shortens=True))
        if any(isinstance(layer, _BatchNorm) and layer.track_running_stats for layer in victim.model.modules()):
            made = partial(_with_steps, GradInversionAttack, {**common, "seeds": 4, "rule": "auto"})
            found.append(Candidate("grad_inversion", made, _MOST_STEPS, shortens=True))
    else:
        found.append(Candidate("dlg", partial(DLGAttack, restarts=_RESTARTS, **common), 2000))
    if kinked:
        found.append(second_order)
    return [candidate for candidate in found if chosen is None or candidate.name in chosen]


def _is_small(victim: Victim) -> bool:
    """Return whether products with the Jacobian are cheap, and nothing is known to make continuation fail."""
    weights = sum(parameter.numel() for parameter in victim.model.parameters())
    batch_norm = any(isinstance(layer, _BatchNorm) for layer in victim.model.modules())
    return weights <= _SMALL and not batch_norm and victim.protocol.local_steps == 1


def _with_steps(kind: Callable[..., GradientInversion], options: dict[str, Any], steps: int = 0) -> GradientInversion:
    return kind(**options, **({"steps": steps} if steps else {"steps": _MOST_STEPS}))


def _readable(victim: Victim, auxiliary: Auxiliary | None, seed: int) -> bool:
    try:
        InferredLabels("auto", auxiliary, seed).check(Target(victim.without_secrets()))
    except ValueError:
        return False
    return True


def _prior(subject: Subject) -> GaussianPrior | None:
    """Return a prior fitted to the auditor's images; None if there are too few of them or they are too large."""
    images, labels = subject.own_images, subject.own_classes
    if images[0].numel() > _MOST_PIXELS or len(images) < 2 * _OF_A_CLASS:
        return None
    if labels is None:
        return GaussianPrior(Auxiliary(images))
    counts = labels.bincount()
    classes = bool((counts[counts > 0] >= _OF_A_CLASS).all()) and len(counts) == subject.num_classes
    return GaussianPrior(Auxiliary(images, labels if classes and bool((counts > 0).all()) else None))


@dataclass
class Share:
    """An attack's share of the budget.

    Attributes:
        seconds: the time that the attack may take.
        steps: the number of steps if the search was shortened, else 0.
        seconds_of_one: the expected time for one victim.
        expected_seconds: the expected time for all victims, or for as many as fit into ``seconds``.
    """

    seconds: float
    steps: int
    seconds_of_one: float
    expected_seconds: float


def share_out(budget: float, needs: Sequence[tuple[Candidate, float]], victims: Sequence[int]) -> list[Share]:
    """Divide the budget among attacks: short ones get all the time they need, the others get equal shares.

    A search that can be shortened gets fewer steps if it could not finish eight victims in its share.

    Args:
        budget: the budget in seconds.
        needs: each attack with the seconds of one evaluation for one victim.
        victims: the largest number of victims of each attack.

    Example:
        >>> needs = [(Candidate("rgap", None), 0.1), (Candidate("gauss_newton", None, 60), 0.1)]
        >>> [round(share.seconds) for share in share_out(61, needs, [10, 100])]
        [1, 60]
    """
    full = [number * each * one.evaluations for (one, each), number in zip(needs, victims, strict=True)]
    allowed, left = [0.0] * len(full), budget
    for place, rank in enumerate(sorted(range(len(full)), key=lambda index: full[index])):
        allowed[rank] = min(full[rank], left / (len(full) - place))
        left -= allowed[rank]
    shares = []
    for (candidate, seconds), number, most, wanted in zip(needs, victims, allowed, full, strict=True):
        steps = candidate.evaluations if candidate.shortens else 0
        if steps and wanted > most:
            steps = max(_FEWEST_STEPS, min(steps, int(most / (seconds * min(number, _WORTHWHILE)))))
        each = seconds * (steps or candidate.evaluations)
        shares.append(Share(most, steps, each, min(most, each * number)))
    return shares
