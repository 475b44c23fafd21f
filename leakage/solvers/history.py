"""The limited memory of L-BFGS for many victims: ring buffers, and directions by batched products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from leakage.pieces import State
from leakage.solvers.solver import Solver

# Initial number of slots; it doubles up to `size`, so that short searches need little memory.
_FIRST_SLOTS = 16
# Bytes of pairs to process at once: per thread of a CPU, so few that they stay in the cache from the first product to
# the last; on a GPU, enough to keep it busy.
_AT_ONCE_ON_A_CPU, _AT_ONCE = 2**22, 2**29

# Multiplies vectors (V, D) by a symmetric, positive definite matrix.
Preconditioner = Callable[[Tensor], Tensor]
HISTORY = ("s", "y", "inverse", "scale", "pairs", "row")


class Remembering(Solver):
    """Base class of solvers whose lanes have a history of up to ``history_size`` pairs."""

    history_size: int

    def match(self, fresh: State, lanes: State) -> State:
        """Give fresh histories the length of the present ones, and rows after theirs."""
        grow(fresh, lanes["s"].shape[1])
        if "row" in fresh:
            fresh["row"] += len(lanes["row"])
        return fresh

    def largest(self, like: Tensor) -> State:
        """Return a fresh state with room for a full history."""
        fresh = self.fresh(like)
        grow(fresh, self.history_size)
        return fresh


def fresh_history(victims: int, unknowns: int, size: int, like: Tensor) -> State:
    """Return an empty history of up to ``size`` pairs (s, y) for each victim.

    ``s`` and ``y`` are ring buffers ``(V, slots, D)``. Slots without a pair are ignored, but must be finite.
    """
    buffer = like.new_zeros(victims, min(size, _FIRST_SLOTS), unknowns)
    pairs = torch.zeros(victims, dtype=torch.long, device=like.device)
    return {"s": buffer, "y": buffer.clone(), "scale": like.new_ones(victims), "pairs": pairs}


def fresh_products(history: State) -> State:
    """Return the entries that :func:`push_and_direct` needs in addition to an empty history.

    ``inverse (V, slots, slots)`` is the transposed inverse of R, with rows and columns ordered by slot, not by age; it
    is zero for slots without a pair. ``row (V,)`` is the position of a victim's history in ``s``, ``y`` and
    ``inverse``; victims that began earlier come first.
    """
    s = history["s"]
    victims, slots, _ = s.shape
    return {"inverse": s.new_zeros(victims, slots, slots), "row": torch.arange(victims, device=s.device)}


def grow(state: State, slots: int) -> None:
    """Enlarge the buffers to at least ``slots`` slots; a ring that has wrapped around never grows."""
    victims, present, unknowns = state["s"].shape
    if slots <= present:
        return
    for name in ("s", "y"):
        larger = state[name].new_zeros(victims, slots, unknowns)
        larger[:, :present] = state[name]
        state[name] = larger
    if "inverse" in state:
        inverse = fresh_products(state)["inverse"]
        inverse[:, :present, :present] = state["inverse"]
        state["inverse"] = inverse


def forget(state: State, lanes: Tensor) -> None:
    """Clear the histories of the lanes at these indices, or of a boolean mask."""
    state["pairs"][lanes] = 0
    state["scale"][lanes] = 1
    state["inverse"][state["row"][lanes]] = 0


def begin_anew(state: State, lanes: Tensor) -> None:
    """Clear the histories of the lanes at these indices, and move them after all others."""
    others = torch.ones_like(state["row"], dtype=torch.bool)
    others[lanes] = False
    pack(state, others.nonzero().squeeze(1))
    state["row"][lanes] = torch.arange(len(others) - len(lanes), len(others), device=lanes.device)
    forget(state, lanes)


def keep(state: State, lanes: Tensor) -> State:
    """Return the histories of the lanes at these indices, in place if they fill over half of the memory."""
    pack(state, lanes)
    kept = {name: state[name][lanes] for name in ("scale", "pairs", "row")}
    for name in ("s", "y", "inverse"):
        part = state[name][: len(lanes)]
        kept[name] = part if 2 * part.nbytes > part.untyped_storage().nbytes() else part.clone()
    return kept


def pack(state: State, lanes: Tensor) -> None:
    """Move the histories of the lanes at these indices to the front, keeping their order."""
    lanes = lanes[state["row"][lanes].argsort()]
    rows, places = state["row"][lanes], torch.arange(len(lanes), device=lanes.device)
    stay = int((rows == places).sum())  # those before the first gap
    pairs = state["pairs"][lanes[stay:]].clamp(1, state["s"].shape[1]).tolist()
    for first, last, used in _neighbours(pairs, _bytes_per_pair(state), lanes.device):
        # Histories yet to be moved lie behind all rows written here.
        source, place = rows[stay + first : stay + last], places[stay + first : stay + last]
        for name in ("s", "y"):
            state[name][place, :used] = state[name][source, :used]
        state["inverse"][place] = state["inverse"][source]
    state["row"][lanes] = places


def times(preconditioner: Preconditioner | None, vectors: Tensor) -> Tensor:
    """Return the preconditioned vectors; None is the identity."""
    return vectors if preconditioner is None else preconditioner(vectors)


def _push(
    state: State, size: int, pushed: Tensor, s: Tensor, y: Tensor, preconditioner: Preconditioner | None = None
) -> list[int]:
    """Store new pairs in the ring buffers, and return how many pairs each victim has had in all."""
    lanes = pushed.nonzero().squeeze(1)
    if not len(lanes):
        return state["pairs"].tolist()
    state["pairs"] += pushed
    had: list[int] = state["pairs"].tolist()
    if max(had) > state["s"].shape[1]:
        grow(state, min(size, 2 * state["s"].shape[1]))
    row = state["row"][lanes] if "row" in state else lanes
    slot = (state["pairs"][lanes] - 1) % size
    state["s"][row, slot] = s[lanes]
    state["y"][row, slot] = y[lanes]
    scale = (s * y).sum(1) / (y * times(preconditioner, y)).sum(1)
    state["scale"] = torch.where(pushed, scale, state["scale"])
    if "inverse" in state and max(had) > size:  # the oldest pair has left
        state["inverse"][row, :, slot] = 0
    return had


def _slots_by_age(state: State, size: int, used: int) -> Tensor:
    """Return the slot of each victim's pair at each age, oldest first."""
    pairs = state["pairs"]
    ages = torch.arange(used, device=pairs.device)
    return torch.where((pairs > size)[:, None], (pairs[:, None] + ages) % size, ages)


def push_and_recurse(state: State, size: int, pushed: Tensor, s: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Store new pairs and return directions by the two-loop recursion, pair by pair, as ``torch.optim.LBFGS`` does.

    This is slower than :func:`push_and_direct`, but more accurate for the ill-conditioned histories that arise without
    a line search.
    """
    used = min(max(_push(state, size, pushed, s, y), default=0), size)
    pairs = state["pairs"]
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
    r"""Store new pairs, and return the quasi-Newton direction :math:`-H g` of every victim.

    This is the two-loop recursion, written as products over all pairs of a victim at once. With
    :math:`R_{ij} = s_i \cdot y_j` for :math:`i \le j` (oldest first) and zero below, D its diagonal, P the
    preconditioner and :math:`\gamma = s \cdot y / y \cdot P y` of the newest pair:

    .. math:: \alpha = R^{-1} S g, \quad q = \gamma P (g - Y^T \alpha), \quad
        \delta = R^{-T} (D \alpha - Y q), \quad H g = q + S^T \delta

    The inverse of R is stored and updated, never solved for: a new pair adds a row and a column, and dropping the
    oldest pair removes a row and a column. Victims with adjacent histories are processed together, as many as fit into
    the cache.

    Args:
        state: see :func:`fresh_history`, with :func:`fresh_products`; changed in place.
        size: maximum number of pairs to remember.
        pushed: ``(V,)``, which victims store their pair; for these, s . y must be positive.
        s, y: ``(V, D)``, steps and differences of gradients.
        gradient: ``(V, D)``.
        preconditioner: P; by default the identity.
    """
    had = _push(state, size, pushed, s, y, preconditioner)
    if not any(had):
        return -times(preconditioner, gradient)
    lanes = state["row"].argsort()
    filled = [min(had[lane], size) for lane in lanes.tolist()]
    parts = [
        _direct(state, size, slice(first, last), used, lanes[first:last], pushed, y, gradient, preconditioner)
        for first, last, used in _neighbours(filled, _bytes_per_pair(state), lanes.device)
    ]
    return torch.cat(parts)[state["row"]]


def _direct(
    state: State,
    size: int,
    rows: slice,
    used: int,
    lanes: Tensor,
    pushed: Tensor,
    y: Tensor,
    gradient: Tensor,
    preconditioner: Preconditioner | None,
) -> Tensor:
    """Return the directions of the lanes with histories in these rows, the longest with ``used`` pairs."""
    gradient, pairs = gradient[lanes], state["pairs"][lanes, None]
    if not used:
        return -times(preconditioner, gradient)
    old_s, old_y, inverse = state["s"][rows, :used], state["y"][rows, :used], state["inverse"][rows, :used, :used]
    filled = pairs > torch.arange(used, device=lanes.device)
    products = torch.bmm(old_s, torch.stack([gradient, y[lanes]], dim=1).mT).mT  # this order is fastest
    products = torch.where(filled[:, None], products, 0.0)
    alpha, column = torch.bmm(products, inverse).unbind(1)
    # New column of the inverse: 1 / (s . y) of the new pair on the diagonal, and -R^-1 (S y) times that above it.
    slot = (pairs - 1).clamp(min=0) % size
    diagonal = products[:, 1].gather(1, slot)
    column = (-column / diagonal).scatter_(1, slot, 1 / diagonal)
    newest = torch.arange(len(lanes), device=lanes.device), slot[:, 0]
    stored = pushed[lanes, None]
    inverse[newest] = torch.where(stored, column, inverse[newest])
    alpha = torch.where(stored, torch.addcmul(alpha, column, products[:, 0].gather(1, slot)), alpha)
    left = torch.baddbmm(gradient[:, None], alpha[:, None], old_y, alpha=-1).squeeze(1)
    q = (state["scale"][lanes, None] * times(preconditioner, left))[:, None]
    right = alpha / inverse.diagonal(dim1=1, dim2=2) - torch.bmm(q, old_y.mT).squeeze(1)
    delta = torch.bmm(torch.where(filled, right, 0.0)[:, None], inverse.mT)
    return -torch.baddbmm(q, delta, old_s).squeeze(1)


def _bytes_per_pair(state: State) -> int:
    return 2 * state["s"].shape[2] * state["s"].element_size()


def _neighbours(pairs: list[int], bytes_per_pair: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """Yield the first and last of the histories to process together, and the largest number of pairs."""
    at_once = _AT_ONCE_ON_A_CPU * torch.get_num_threads() if device.type == "cpu" else _AT_ONCE
    limit = at_once // bytes_per_pair
    first, used = 0, 0
    for place, present in enumerate(pairs):
        most = max(used, present)
        if place > first and (place - first + 1) * most > limit:
            yield first, place, used
            first, most = place, present
        used = most
    if pairs:
        yield first, len(pairs), used
