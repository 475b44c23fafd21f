"""Which attacks an audit runs, and on how many victims, so that its budget is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from leakage.attacks import (
    DLGAttack,
    GaussNewtonAttack,
    GradientInversion,
    GradInversionAttack,
    InvertingGradientsAttack,
    RGAPAttack,
)
from leakage.audit.client import Client
from leakage.audit.subject import Subject
from leakage.clients.victim import Victim
from leakage.dummies import InferredLabels, Target
from leakage.errors import check_choice
from leakage.labels import Auxiliary
from leakage.objectives import GaussianPrior

#: The attacks of an audit, in the order in which they are run: what needs no search first.
ATTACKS = ("labels", "rgap", "gauss_newton", "inverting_gradients", "grad_inversion", "dlg")
# Steps of searches by Adam: those of the papers, and the fewest that are worth a run.
_MOST_STEPS, _FEWEST_STEPS = 4800, 300
# Below so many weights, Inverting Gradients searches by least squares.
_SMALL = 300_000
# A normal distribution is fitted to images with no more values than this.
_MOST_PIXELS = 3072
# Images of a class that its own mean and covariance need.
_OF_A_CLASS = 8
# Evaluations that Gauss-Newton is expected to take.
_NEWTON = 20
# Restarts of Gauss-Newton: the default's three are for single hard victims.
_RESTARTS = 1
# Victims that shorter searches are chosen for.
_WORTHWHILE = 8


@dataclass
class Candidate:
    """An attack that an audit may run.

    Attributes:
        name: a member of :data:`ATTACKS`.
        make: a fresh attack, of so many steps where it can be made with fewer; None for labels alone.
        evaluations: of one victim, about, unless it is made with fewer.
        shortens: whether it can be.
        passes: of the network, forth and back, in an evaluation, about: tells whether there is time for a trial.
    """

    name: str
    make: Callable[..., GradientInversion] | None
    evaluations: int = 1
    shortens: bool = False
    passes: int = 3


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
    """The attacks for a client, in the order in which they are run; labels are read once and handed on.

    Args:
        subject: what is audited.
        client: as declared.
        victim: the same, as it is simulated.
        seed: of their starts.
        success_threshold: an image counts as reconstructed if its MSE is below this.
        surrogate: whether attackers have images of the same kind: the auditor's own.
        chosen: names of :data:`ATTACKS`, where only these are wanted.
    """
    for name in chosen or ():
        check_choice("attacks", name, ATTACKS)
    auxiliary = Auxiliary(subject.own_images, subject.own_labels) if surrogate else None
    common: dict[str, Any] = {"seed": seed, "success_threshold": success_threshold}
    readable = client.reveal_labels or _readable(victim, auxiliary, seed)
    found = [Candidate("labels", None)] if readable and not client.reveal_labels else []
    # Of several images, Gauss-Newton begins there.
    if readable and not victim.defenses and client.local_steps == client.images == 1:
        found.append(Candidate("rgap", partial(RGAPAttack, **common)))
    newton: dict[str, Any] = {"underdetermined": True, "restarts": _RESTARTS}
    newton |= common if readable else common | {"joint_labels": True}
    if victim.defenses and surrogate and (prior := _prior(subject)) is not None:
        newton |= {"prior": prior, "restarts": 0}
    found.append(Candidate("gauss_newton", partial(GaussNewtonAttack, **newton), _NEWTON, passes=150))
    if readable:
        found.append(_inverting_gradients(victim, common))
        if any(isinstance(layer, _BatchNorm) and layer.track_running_stats for layer in victim.model.modules()):
            made = partial(_with_steps, GradInversionAttack, {**common, "seeds": 4, "rule": "auto"})
            found.append(Candidate("grad_inversion", made, _MOST_STEPS, shortens=True))
    else:
        found.append(Candidate("dlg", partial(DLGAttack, restarts=_RESTARTS, **common), 2000))
    return [candidate for candidate in found if chosen is None or candidate.name in chosen]


def _inverting_gradients(victim: Victim, common: dict[str, Any]) -> Candidate:
    weights = sum(parameter.numel() for parameter in victim.model.parameters())
    norms = any("Norm" in type(layer).__name__ for layer in victim.model.modules())
    if weights <= _SMALL and not norms and victim.protocol.local_steps == 1:
        made: Callable[..., GradientInversion] = partial(InvertingGradientsAttack, protocol="robust", **common)
        return Candidate("inverting_gradients", made, 112, passes=100)
    made = partial(_with_steps, InvertingGradientsAttack, common)
    return Candidate("inverting_gradients", made, _MOST_STEPS, shortens=True)


def _with_steps(kind: Callable[..., GradientInversion], options: dict[str, Any], steps: int = 0) -> GradientInversion:
    return kind(**options, **({"steps": steps} if steps else {"steps": _MOST_STEPS}))


def _readable(victim: Victim, auxiliary: Auxiliary | None, seed: int) -> bool:
    try:
        InferredLabels("auto", auxiliary, seed).check(Target(victim.as_told()))
    except ValueError:
        return False
    return True


def _prior(subject: Subject) -> GaussianPrior | None:
    """What images look like, for networks that share too little; None where there are too few images for their size."""
    images, labels = subject.own_images, subject.own_labels
    if images[0].numel() > _MOST_PIXELS or len(images) < 2 * _OF_A_CLASS:
        return None
    counts = labels.bincount()
    classes = bool((counts[counts > 0] >= _OF_A_CLASS).all()) and len(counts) == subject.num_classes
    return GaussianPrior(Auxiliary(images, labels if classes and bool((counts > 0).all()) else None))


@dataclass
class Share:
    """What an attack is given of the budget.

    Attributes:
        seconds: of the budget.
        steps: of a search that was shortened, else 0.
        seconds_of_one: that a victim is expected to take.
        expected_seconds: of all victims, or of as many as the seconds are enough for.
    """

    seconds: float
    steps: int
    seconds_of_one: float
    expected_seconds: float


def share_out(budget: float, needs: Sequence[tuple[Candidate, float]], victims: Sequence[int]) -> list[Share]:
    """Share a budget out among attacks: all that they ask for where that is little, the same for each of the rest.

    A search that can do with fewer steps is given fewer where it would not come to the end with eight victims.

    Args:
        budget: seconds.
        needs: each attack with its seconds for one evaluation of one victim.
        victims: of each attack at most.

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
