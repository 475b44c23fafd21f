"""Labels that fit the gradient: the last layer's equations verify inferred labels, and find those that are wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form.feature_search import FeatureEquations, linear_start, search, solve, start
from leakage.closed_form.features import check_separable, feature_equations
from leakage.errors import check_count
from leakage.precision import full_precision
from leakage.seeds import derive_seed

# Starts for labels that may be right, in rounds.
_ROUNDS = (2, 6)
# Of all labels that could replace wrong ones, those with the least errors at the linear start are searched for some
# steps, and those that are best then, from all starts.
_BRIEFLY, _STEPS, _THOROUGHLY = 96, 12, 8
# Labels whose errors at the linear start are computed at once.
_AT_ONCE = 1024


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
    verified = solve(equations, seeds, _ROUNDS)[2]
    found, changed = labels.clone(), torch.zeros(len(labels), dtype=torch.long)
    for row in torch.where(~verified)[0].tolist():
        one = equations[torch.tensor([row], device=verified.device)]
        beam = labels[row : row + 1].to(verified.device)
        for count in range(1, most + 1):
            beam, holds = _fitting(one, _neighbours(beam, labels[row], victim.protocol.num_classes), seeds[row])
            if holds:
                found[row], verified[row], changed[row] = beam[0].to(found), True, count
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


def _fitting(victim: FeatureEquations, candidates: Tensor, seed: int) -> tuple[Tensor, bool]:
    """Return the labels ``(B, N)`` that fit the equations best, the best first, and whether it holds to rounding."""

    def equations(labels: Tensor) -> FeatureEquations:
        lanes = victim[torch.zeros(len(labels), dtype=torch.long, device=labels.device)]
        return dataclasses.replace(lanes, labels=F.one_hot(labels, victim.labels.shape[2]).to(victim.labels))

    def best(labels: Tensor, errors: Tensor, most: int) -> Tensor:
        order = torch.where(errors.isfinite(), errors, torch.inf).argsort(stable=True)
        return labels[order[:most]]

    parts = [equations(part) for part in torch.split(candidates, _AT_ONCE)]
    costs = torch.cat([part.costs(linear_start(part)) for part in parts])
    candidates = best(candidates, costs, _BRIEFLY)
    if len(candidates) > _THOROUGHLY:
        some = equations(candidates)
        begin = start(some, linear_start(some), [seed] * len(candidates), [0] * len(candidates))
        candidates = best(candidates, search(some, begin, steps=_STEPS)[1], _THOROUGHLY)
    _, errors, holds = solve(equations(candidates), [seed] * len(candidates), _ROUNDS)
    errors = torch.where(holds, errors, errors + 1)
    order = errors.argsort(stable=True)
    return candidates[order], bool(holds[order[0]])
