"""Labels that fit the gradient: the last layer's equations verify inferred labels, and find those that are wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form.feature_search import (
    FeatureEquations,
    holds_to_rounding,
    linear_start,
    search,
    solve,
    start,
)
from leakage.closed_form.features import check_separable, feature_equations
from leakage.errors import check_count
from leakage.precision import full_precision
from leakage.seeds import derive_seed

# Starts for the given labels, and, in rounds, for labels that may be right where the stages below found none.
_STARTS, _ROUNDS = 2, (2, 6)
# The most steps of a search from one of them; with wrong labels, there is no end.
_STEPS = 80
# Of all labels that could replace wrong ones, those with the least errors at the linear start are searched for some
# steps, the best of them for some more, and so on: how many labels, and how many steps. The best of the last ones get
# further starts, together with the given labels.
_STAGES = ((96, 12), (32, 24), (8, 64))
# Numbers of the equations of all labels whose errors are computed at once.
_NUMBERS = 2**20


@dataclass
class CorrectedLabels:
    """Labels of V victims after :func:`correct_labels`.

    Attributes:
        labels: ``(V, N)``, class indices: those given, with wrong ones replaced.
        verified: ``(V,)`` bool, whether the gradient confirms these labels. If not, they are the given ones.
        changed: ``(V,)``, number of labels that were replaced.
    """

    labels: Tensor
    verified: Tensor
    changed: Tensor


@torch.no_grad()
@full_precision()
def correct_labels(
    shared: SharedGradient, victim: Victim, labels: Tensor, *, most: int = 1, seed: int = 0
) -> CorrectedLabels:
    r"""Verify the labels of each batch by its gradient, and replace those that are wrong.

    The gradient of the last layer gives K (N + 1) equations for the :math:`N^2` numbers that describe the features of
    all N images (:func:`leakage.closed_form.separate_features`). With the right labels they have a solution, up to
    rounding. With a wrong label they have none, as there are more equations than unknowns:

    .. math:: \min_A \sum_k \omega_k^2 \Bigl\lVert \sum_n \delta_{nk}(a_n, y_n) \, [a_n, 1] - G_k \Bigr\rVert^2
        \; \begin{cases} \approx 0 & \text{if } y \text{ is right,} \\ \gg 0 & \text{otherwise.} \end{cases}

    If the given labels leave an error above rounding, all labels that differ from them in one place are tried, and if
    none of them fits, up to ``most`` places. Most of them are excluded by their errors after a few linear solutions,
    the next after a short search. No image is searched for, and no true label is seen. Where no labels fit, because too
    many are wrong, the search did not succeed or the gradient is noisy, the given ones are returned, and ``verified``
    is false. This method is new in this library.

    Args:
        shared: the gradients of V victims.
        victim: their model and protocol, with loss ``"cross_entropy"``.
        labels: ``(V, N)``, class indices, from :func:`leakage.labels.infer_labels` or elsewhere.
        most: largest number of labels to replace per victim, at least 0.
        seed: seed of the random starts.

    Raises:
        ValueError: :func:`leakage.closed_form.check_separable` refuses the victims, the loss is not cross-entropy,
            gradients don't fit the victims, labels have another shape or range, or ``most`` is not a whole number of at
            least 0.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28), num_images=2)
        >>> images = torch.rand(2, 2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        >>> shared = victim.share(images, torch.tensor([[3, 3], [8, 1]]))
        >>> found = correct_labels(shared, victim, torch.tensor([[3, 3], [8, 5]]))
        >>> found.labels.tolist(), found.verified.tolist(), found.changed.tolist()
        ([[3, 3], [8, 1]], [True, True], [0, 1])
    """
    check_separable(victim)
    if victim.protocol.loss != "cross_entropy":
        raise ValueError(
            "Expected a victim with loss 'cross_entropy', whose gradient depends on each label in its own way, but got "
            f"loss {victim.protocol.loss!r}."
        )
    victim.check(dataclasses.replace(shared, labels=labels))
    check_count(0, most=most, seed=seed)
    equations, _, _ = feature_equations(shared, victim, labels)
    seeds = [derive_seed(seed, own, "labels") for own in shared.ids.tolist()]
    verified = solve(equations, seeds, [_STARTS], steps=_STEPS)[2]
    found, changed = labels.clone(), torch.zeros(len(labels), dtype=torch.long)
    for row in torch.where(~verified)[0].tolist():
        one = equations[torch.tensor([row], device=verified.device)]
        given = labels[row].to(verified.device)
        beam = given[None]
        for _ in range(most):
            candidates = _neighbours(beam, given, victim.protocol.num_classes)
            beam, verified[row] = _fitting(one, given, candidates, seeds[row], victim.protocol)
            if verified[row]:
                found[row] = beam[0].to(found)
                changed[row] = (found[row] != labels[row]).sum()
                break
    return CorrectedLabels(found, verified, changed)


def _neighbours(beam: Tensor, given: Tensor, num_classes: int) -> Tensor:
    """Return all labels ``(C, N)`` that differ in one of the given places from one of ``(B, N)``, each set once."""
    found: dict[tuple[int, ...], list[int]] = {}
    for labels in beam.tolist():
        for place in range(len(labels)):
            if labels[place] != int(given[place]):
                continue  # already replaced
            for label in range(num_classes):
                changed = [*labels[:place], label, *labels[place + 1 :]]
                if label != labels[place]:
                    found.setdefault(tuple(sorted(changed)), changed)
    return torch.tensor([*found.values()], device=beam.device)


def _fitting(
    victim: FeatureEquations, given: Tensor, candidates: Tensor, seed: int, protocol: Protocol
) -> tuple[Tensor, bool]:
    """Return the labels ``(B, N)`` that fit the equations best, the best first, and whether they hold to rounding."""

    def equations(labels: Tensor) -> FeatureEquations:
        lanes = victim[torch.zeros(len(labels), dtype=torch.long, device=labels.device)]
        return dataclasses.replace(lanes, labels=protocol.targets(labels, victim.labels.dtype))

    found = []
    for part in torch.split(candidates, max(1, _NUMBERS // victim.target.numel())):
        lanes = equations(part)
        linear = linear_start(lanes)
        found.append((linear, lanes.costs(linear)))
    unknowns, errors = (torch.cat(each) for each in zip(*found, strict=True))
    order = _ascending(errors)[: _STAGES[0][0]]
    candidates, unknowns = candidates[order], unknowns[order]
    unknowns = start(equations(candidates), unknowns, [seed] * len(candidates), [0] * len(candidates))
    for most, steps in _STAGES:
        candidates, unknowns = candidates[:most], unknowns[:most]
        lanes = equations(candidates)
        unknowns, errors = search(lanes, unknowns, steps=steps)
        order = _ascending(errors)
        candidates, unknowns, errors = candidates[order], unknowns[order], errors[order]
        if bool(holds_to_rounding(victim, errors[:1, None])):
            return candidates, True
    some = torch.cat([given[None], candidates])  # further starts may show that nothing is wrong
    for number, count in enumerate(_ROUNDS):
        seeds = [derive_seed(seed, number, "round")] * len(some)
        _, errors, holds = solve(equations(some), seeds, [count], steps=_STEPS)
        if holds.any():
            return some[_ascending(torch.where(holds, errors, torch.inf))], True
    return some[1:][_ascending(errors[1:])], False


def _ascending(errors: Tensor) -> Tensor:
    return torch.where(errors.isfinite(), errors, torch.inf).argsort(stable=True)
