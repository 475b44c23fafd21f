"""The gradients of many clients at once, before their defenses, including their secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import vmap

from leakage.clients.local_steps import Secrets, draw_orders
from leakage.models.drawing import draw

if TYPE_CHECKING:  # a victim shares what is captured here
    from leakage.clients.victim import Victim

# Number of victims whose gradients are captured at once; it bounds the memory and does not change the result.
_AT_ONCE = 64


def capture(
    victim: Victim,
    states: Mapping[str, Tensor],
    own_weights: bool,
    images: Tensor,
    targets: Tensor,
    ids: Sequence[int],
    rate: float | None,
    seed: int,
) -> dict[str, Tensor]:
    """Return what V clients would share without defenses, name to ``(V, *shape)``.

    Args:
        victim: the model and the protocol of the clients.
        states: weights and buffers by name, with a leading victims' dimension if ``own_weights`` is true.
        own_weights: whether each victim has its own network.
        images: ``(V, N, C, H, W)``.
        targets: class probabilities ``(V, N, K)``.
        ids: ids of the clients; with ``seed`` they decide what each client draws.
        rate: the secret learning rate of clients that share an update; None if clients share a gradient.
        seed: seed of the draws.
    """
    protocol = victim.protocol
    own: dict[str, Tensor] = {}
    if (orders := draw_orders(protocol, ids, seed)) is not None:
        own["order"] = orders.to(images.device)
    if victim.draws:
        rows = protocol.local_steps * protocol.step_size
        own["drawn"] = draw(victim.draws, rows, ids, seed).to(images)

    def steps(state: dict[str, Tensor], images: Tensor, targets: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
        secrets = Secrets(rate, order=own.get("order"), drawn=own.get("drawn"))
        return victim.evaluate(state, images, targets, secrets=secrets)[0]

    of_all = vmap(steps, in_dims=(0 if own_weights else None, 0, 0, 0), chunk_size=_AT_ONCE)
    with torch.no_grad():
        gradients: dict[str, Tensor] = of_all(dict(states), images, targets, own)
    if rate is None:
        return gradients
    return {name: rate * protocol.local_steps * tensor for name, tensor in gradients.items()}
