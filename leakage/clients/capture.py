"""The gradients of many clients at once, before their defenses, with all that they keep to themselves."""

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

# Victims whose gradients are captured at once; bounds the memory of a capture, not its result.
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
    """What V clients would share without defenses, name to ``(V, *shape)``.

    Args:
        victim: what they do.
        states: weights and buffers by name, with a leading victims' dimension where these have ``own_weights``.
        own_weights: see ``states``.
        images: ``(V, N, C, H, W)``.
        targets: class probabilities ``(V, N, K)``.
        ids: of the clients; with the seed they decide what each draws.
        rate: the learning rate, where they keep it to themselves and share an update.
        seed: see ``ids``.
    """
    protocol = victim.protocol
    own: dict[str, Tensor] = {}
    if (orders := draw_orders(protocol, ids, seed)) is not None:
        own["order"] = orders.to(images.device)
    if victim.draws:
        rows = protocol.local_steps * (protocol.local_batch_size or protocol.num_images)
        own["drawn"] = draw(victim.draws, rows, ids, seed).to(images)

    def steps(state: dict[str, Tensor], images: Tensor, targets: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
        return victim.evaluate(state, images, targets, secrets=Secrets(rate, **own))[0]

    of_all = vmap(steps, in_dims=(0 if own_weights else None, 0, 0, 0), chunk_size=_AT_ONCE)
    with torch.no_grad():
        gradients: dict[str, Tensor] = of_all(dict(states), images, targets, own)
    if rate is None:
        return gradients
    return {name: rate * protocol.local_steps * tensor for name, tensor in gradients.items()}
