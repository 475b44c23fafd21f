"""The limited memory of L-BFGS for many victims: a ring buffer, and directions by batched products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Slots a history begins with; it doubles until `size`, so that short searches stay small.
_FIRST_SLOTS = 16

State = dict[str, Tensor]
# Multiplies vectors (V, D) by a symmetric, positive definite matrix.
Preconditioner = Callable[[Tensor], Tensor]
HISTORY = ("s", "y", "sy", "scale", "pairs")


def fresh_history(victims: int, unknowns: int, size: int, like: Tensor) -> State:
    """An empty history of up to ``size`` pairs (s, y) for each victim.

    ``s`` and ``y`` are ring buffers ``(V, slots, D)``. ``sy (V, slots, slots)`` holds the products
    ``s_i . y_j`` for i not younger than j, oldest first; the rest of it is never read.
    """
    slots = min(size, _FIRST_SLOTS)
    return {
        "s": like.new_zeros(victims, slots, unknowns),
        "y": like.new_zeros(victims, slots, unknowns),
        "sy": torch.eye(slots, dtype=like.dtype, device=like.device).repeat(victims, 1, 1),
        "scale": like.new_ones(victims),
        "pairs": torch.zeros(victims, dtype=torch.long, device=like.device),
    }


def grow(state: State, slots: int) -> None:
    """Give the buffers at least ``slots`` slots (a buffer only grows before it has gone round)."""
    victims, present, unknowns = state["s"].shape
    if slots <= present:
        return
    for name in ("s", "y"):
        state[name] = torch.cat([state[name], state[name].new_zeros(victims, slots - present, unknowns)], dim=1)
    if "sy" not in state:
        return
    sy = torch.eye(slots, dtype=state["sy"].dtype, device=state["sy"].device).repeat(victims, 1, 1)
    sy[:, :present, :present] = state["sy"]
    state["sy"] = sy


def forget(state: State, lanes: Tensor) -> None:
    """Empty the histories of the lanes of a boolean mask."""
    if not bool(lanes.any()):
        return
    state["s"][lanes] = 0
    state["y"][lanes] = 0
    state["sy"][lanes] = torch.eye(state["sy"].shape[1], dtype=state["sy"].dtype, device=state["sy"].device)
    state["scale"][lanes] = 1
    state["pairs"][lanes] = 0


def times(preconditioner: Preconditioner | None, vectors: Tensor) -> Tensor:
    """Their product, where None is the identity."""
    return vectors if preconditioner is None else preconditioner(vectors)


def _push(
    state: State, size: int, pushed: Tensor, s: Tensor, y: Tensor, preconditioner: Preconditioner | None = None
) -> Tensor:
    """Store new pairs in the ring buffers; returns the lanes that stored one."""
    lanes = pushed.nonzero().squeeze(1)
    if not len(lanes):
        return lanes
    pairs = state["pairs"][lanes]
    needed = int(pairs.max()) + 1
    if needed > state["s"].shape[1]:
        grow(state, min(size, 2 * state["s"].shape[1]))
    if "sy" in state and bool((pairs >= size).any()):
        full = lanes[pairs >= size]  # the oldest pair leaves: its row and column move out at the front
        state["sy"][full, :-1, :-1] = state["sy"][full, 1:, 1:]
    slot = pairs % size
    state["s"][lanes, slot] = s[lanes]
    state["y"][lanes, slot] = y[lanes]
    state["pairs"][lanes] += 1
    state["scale"][lanes] = ((s * y).sum(1) / (y * times(preconditioner, y)).sum(1))[lanes]
    return lanes


def _slots_by_age(state: State, size: int, used: int) -> Tensor:
    """Slot of each victim's pair at each age, oldest first: the identity until its ring has gone round."""
    pairs = state["pairs"]
    ages = torch.arange(used, device=pairs.device)
    return torch.where((pairs > size)[:, None], (pairs[:, None] + ages) % size, ages)


def push_and_recurse(state: State, size: int, pushed: Tensor, s: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """As :func:`push_and_direct`, by the two-loop recursion pair after pair, as ``torch.optim.LBFGS`` does it.

    It takes more time, and errs less where a history without line search has become ill-conditioned: each
    product is taken with what the ones before have left.
    """
    _push(state, size, pushed, s, y)
    pairs = state["pairs"]
    used = min(int(pairs.max()), size) if len(pairs) else 0
    slots, victims = _slots_by_age(state, size, used), torch.arange(len(pairs), device=pairs.device)
    present = pairs[:, None] > torch.arange(used, device=pairs.device)
    inverses, alphas = gradient.new_zeros(2, len(gradient), used)
    left = -gradient
    for age in reversed(range(used)):
        old_s, old_y = state["s"][victims, slots[:, age]], state["y"][victims, slots[:, age]]
        inverses[:, age] = torch.where(present[:, age], 1 / (old_s * old_y).sum(1), 0.0)
        alphas[:, age] = inverses[:, age] * (old_s * left).sum(1)
        left = torch.addcmul(left, alphas[:, age, None], old_y, value=-1)
    left = torch.where(pairs > 0, state["scale"], 1.0)[:, None] * left
    for age in range(used):
        old_s, old_y = state["s"][victims, slots[:, age]], state["y"][victims, slots[:, age]]
        beta = inverses[:, age] * (old_y * left).sum(1)
        left = torch.addcmul(left, (alphas[:, age] - beta)[:, None], old_s)
    return left


def push_and_direct(
    state: State,
    size: int,
    pushed: Tensor,
    s: Tensor,
    y: Tensor,
    gradient: Tensor,
    preconditioner: Preconditioner | None = None,
) -> Tensor:
    r"""Store new pairs, and give every victim the quasi-Newton direction :math:`-H g`.

    This is the two-loop recursion written as products and triangular solves over all its pairs at
    once. With :math:`R_{ij} = s_i \cdot y_j` for :math:`i \le j` (oldest first), D its diagonal, P the
    preconditioner and :math:`\gamma = s \cdot y / y \cdot P y` of the newest pair:

    .. math:: \alpha = R^{-1} S g, \quad q = \gamma P (g - Y^T \alpha), \quad
        \delta = R^{-T} (D \alpha - Y q), \quad H g = q + S^T \delta

    Args:
        state: see :func:`fresh_history`; changed in place.
        size: the most pairs to remember.
        pushed: ``(V,)``, which victims store their pair; s . y must be positive for them.
        s: ``(V, D)``, steps.
        y: ``(V, D)``, differences of gradients.
        gradient: ``(V, D)``.
        preconditioner: multiplies ``(V, D)`` by a symmetric, positive definite P; by default the identity.

    Returns:
        ``(V, D)``; for a victim without pairs the negative gradient times P.
    """
    lanes = _push(state, size, pushed, s, y, preconditioner)
    pairs = state["pairs"]
    used = min(int(pairs.max()), size) if len(pairs) else 0
    if not used:
        return -times(preconditioner, gradient)
    s_used, y_used = state["s"][:, :used], state["y"][:, :used]
    slots = _slots_by_age(state, size, used)
    products = torch.bmm(torch.stack([gradient, y], dim=1), s_used.mT)
    products = products.gather(2, slots[:, None].expand(-1, 2, -1))
    if len(lanes):
        newest = torch.clamp(pairs[lanes], max=size) - 1
        state["sy"][lanes, :used, newest] = products[lanes, 1]
    sy = state["sy"][:, :used, :used]
    alpha = torch.linalg.solve_triangular(sy, products[:, 0, :, None], upper=True).squeeze(2)
    by_slot = torch.empty_like(alpha).scatter_(1, slots, alpha)
    scale = torch.where(pairs > 0, state["scale"], 1.0)[:, None]
    left = torch.baddbmm(gradient[:, None], by_slot[:, None], y_used, alpha=-1).squeeze(1)
    q = scale * times(preconditioner, left)
    projected = torch.bmm(q[:, None], y_used.mT).squeeze(1).gather(1, slots)
    right = sy.diagonal(dim1=1, dim2=2) * alpha - projected
    delta = torch.linalg.solve_triangular(sy.mT, right[:, :, None], upper=False).squeeze(2)
    by_slot = torch.empty_like(delta).scatter_(1, slots, delta)
    return -torch.baddbmm(q[:, None], by_slot[:, None], s_used).squeeze(1)
