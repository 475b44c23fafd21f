"""Images layer by layer, from the gradient of a chain."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form.features import check_separable, separate_features
from leakage.closed_form.layer_by_layer import invert_layers
from leakage.closed_form.stages import find_chain

# The layers of several images are seldom determined, and then further iterations find nothing more.
_ITERATIONS_OF_BATCHES = 300


def check_layers(victim: Victim) -> None:
    """Raise a ``ValueError`` unless the images of such victims can be found layer by layer."""
    check_separable(victim)
    protocol = victim.protocol
    if protocol.loss == "mean_squared_error" and protocol.num_images > 1:
        raise ValueError(
            "Expected one image with loss 'mean_squared_error', which can't tell apart the features of several images "
            f"whose labels repeat, but got {protocol.num_images}."
        )
    find_chain(victim)


def images_by_layers(shared: SharedGradient, victim: Victim, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images by inverting the layers, clamped to [0, 1], and whether that gave numbers, ``(V,)``."""
    separated = separate_features(shared, victim, labels, seed=seed)
    several = shared.protocol.num_images > 1
    iterations = {"max_iterations": _ITERATIONS_OF_BATCHES} if several else {}
    images = invert_layers(shared, victim, separated, **iterations).images
    return images.clamp(0, 1), torch.isfinite(images).flatten(1).all(1)
