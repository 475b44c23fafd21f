"""Building blocks of an objective: weighted sums of terms, and the entries that pieces keep, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from leakage.clients.activations import Activation
from leakage.clients.joint_pass import JointPass
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.inversion.simulation import Simulation
from leakage.objectives.terms import Point, Slopes, Term
from leakage.pieces import State
from leakage.solvers import STEERING


def sum_in_a_pass(
    victim: Victim,
    terms: Sequence[tuple[float, Term, Sequence[str], State]],
    shared: SharedGradient,
    images: Tensor,
    targets: Tensor,
    sharpness: Tensor | None,
    simulation: Simulation,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of terms ``(V,)`` and its derivatives by images and targets, with one joint pass.

    Args:
        victim: the victim; its network must support a joint pass.
        terms: for each term its weight, the term, the names of the modules that it watches, and its kept entries.
        shared: shared gradients and weights.
        images: ``(V, N, C, H, W)``.
        targets: class probabilities ``(V, N, K)``.
        sharpness: ``(V,)``, see :func:`leakage.clients.smoothing.smoothed`.
        simulation: defenses to apply to the gradients before they are compared.
    """
    modules = list(dict.fromkeys(name for _, _, watched, _ in terms for name in watched))
    run = JointPass(victim, shared.state, shared.own_weights, images, targets, modules, sharpness)
    activations = {name: Activation(*(side.detach() for side in both)) for name, both in run.activations.items()}
    gradients, pull_back = simulation.for_all(run.gradients, shared.gradients)
    points = Point(images, targets, gradients, shared.gradients, activations, shared.state)
    total, slopes = torch.zeros_like(images[:, 0, 0, 0, 0]), Slopes()
    for weight, term, watched, kept in terms:
        values, by = term.slopes(seen(points, watched), kept, shared.own_weights)
        total += weighted(weight, kept, values)
        for key, slope in by.items():
            slope = weighted(weight, kept, slope)
            slopes[key] = slopes[key] + slope if key in slopes else slope
    by_gradients = pull_back({name: slopes.pop((kind, name)) for kind, name in [*slopes] if kind == "gradients"})
    slopes |= {("gradients", name): slope for name, slope in by_gradients.items()}
    pulled = run.pull_back(slopes)
    given = (slopes.get((name, "")) for name in ("images", "targets"))
    by_images, by_targets = (a if b is None else a + b for a, b in zip(pulled, given, strict=True))
    return total, by_images, by_targets


def seen(point: Point, watched: Sequence[str]) -> Point:
    """Return the point with only the activations of the modules that a term watches."""
    if len(watched) == len(point.activations):
        return point
    return replace(point, activations={name: point.activations[name] for name in watched})


def smooth_and_sharp(kept: State) -> list[Tensor]:
    """Return the indices of the victims whose network is smoothed, and of the others; nothing if all are alike."""
    sharpness = kept.get(f"{STEERING}/sharpness")
    if sharpness is None:
        return []
    groups = [chosen.nonzero().squeeze(1) for chosen in (sharpness.isfinite(), sharpness.isinf())]
    return groups if all(map(len, groups)) else []


def of_lanes(
    lanes: slice | Tensor, shared: SharedGradient, kept: State, unknowns: Mapping[str, Tensor]
) -> tuple[SharedGradient, State, State]:
    """Return the shared gradients, kept entries and unknowns of some lanes."""
    own, values = ({name: tensor[lanes] for name, tensor in part.items()} for part in (kept, unknowns))
    return shared.piece(lanes) if isinstance(lanes, slice) else shared.select(lanes), own, values


def through(pairs: Sequence[tuple[Tensor, Tensor | None]], leaves: Mapping[str, Tensor]) -> State:
    """Return the derivatives by the leaves, from the derivatives by the tensors computed from them."""
    pairs = [(output, by) for output, by in pairs if output.requires_grad and by is not None]
    outputs, by = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), by, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def joined(kept: Mapping[str, State]) -> State:
    """Flatten the tensors of all pieces into one mapping with keys ``piece/name``."""
    return {f"{piece}/{name}": tensor for piece, tensors in kept.items() for name, tensor in tensors.items()}


def parted(kept: State) -> dict[str, State]:
    """Split a mapping with keys ``piece/name`` by piece; the inverse of :func:`joined`."""
    parts: dict[str, State] = {}
    for name, tensor in kept.items():
        piece, _, own = name.rpartition("/")
        parts.setdefault(piece, {})[own] = tensor
    return parts


def weighted(weight: float, kept: State, values: Tensor) -> Tensor:
    """Multiply values ``(V, ...)``, or those of one victim, by the weight and each victim's scale."""
    if "scale" in kept:
        scale = kept["scale"]
        values = scale.view(-1, *[1] * (values.ndim - 1)) * values if scale.ndim else scale * values
    return values if weight == 1 else weight * values


def added(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum of the parts that are not None, or None if there are none."""
    found = [part for part in parts if part is not None]
    return torch.stack(found).sum(0) if found else None
