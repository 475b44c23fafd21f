"""Simulated clients with the attacker's labelled images, from which rules learn what gradients mean."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from leakage.labels.auxiliary import LabelledFeatures
from leakage.labels.last_layer import LastLayer, mean_gradient

# Half of the clients have uniform class proportions; each of the others draws its Dirichlet parameter from this range.
_EVEN_SHARE = 0.5
_PARAMETERS = (0.05, 10.0)
# Numbers in the largest tensor of a pass.
_NUMBERS_AT_ONCE = 2**24


def draw_images(labels: Tensor, layer: LastLayer, clients: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the images of each simulated client, independently of how the victims' labels are distributed.

    Half of the clients draw labels uniformly. Each of the others draws class proportions from its own Dirichlet
    distribution, from nearly a single class to nearly uniform. Images of a label are drawn with replacement.

    Args:
        labels: ``(M,)``, in which every class occurs.
        layer: the last layer, which defines N and K.
        clients: number of clients S.
        seed: seed of all draws.

    Returns:
        Indices of images ``(S, N)``, and the counts of their labels ``(S, K)``.
    """
    random = np.random.default_rng(seed)
    classes, count = layer.num_classes, layer.num_images
    low, high = np.log(_PARAMETERS)
    parameters = np.exp(random.uniform(low, high, clients))
    gammas = random.standard_gamma(parameters[:, None].repeat(classes, 1)) + 1e-300
    proportions = gammas / gammas.sum(1, keepdims=True)
    proportions[random.random(clients) < _EVEN_SHARE] = 1 / classes
    counts = random.multinomial(count, proportions)
    held = np.repeat(np.tile(np.arange(classes), clients), counts.ravel()).reshape(clients, count)
    held = random.permuted(held, axis=1)  # the order in which local steps take them
    order = labels.argsort(stable=True).cpu().numpy()
    sizes = labels.bincount(minlength=classes).cpu().numpy()
    starts = np.cumsum(sizes) - sizes
    drawn = order[starts[held] + (random.random(held.shape) * sizes[held]).astype(np.int64)]
    return torch.from_numpy(drawn), torch.from_numpy(counts)


def simulate(layer: LastLayer, known: LabelledFeatures, drawn: Tensor) -> LastLayer:
    """Return what simulated clients that hold the images ``drawn``, ``(S, N)``, would share of the last layer.

    With local steps, the layer is trained according to the protocol while its inputs stay fixed. This is exact for one
    step and a good approximation for small steps.
    """
    held = known.features[0], known.labels
    images, classes, features = drawn.shape[1], layer.num_classes, known.features.shape[2]
    largest = max(images * features, classes * features, 3 * images * classes)
    parts = [_train(layer, *held, part) for part in torch.split(drawn, max(1, _NUMBERS_AT_ONCE // largest))]
    weights, biases = zip(*parts, strict=True)
    # Return only what the victims share, so that no rule learns from a gradient it will not get.
    return dataclasses.replace(
        layer,
        weight_gradient=None if layer.weight_gradient is None else torch.cat(weights),
        bias_gradient=None if layer.bias_gradient is None else torch.cat(biases),
    )


def _train(layer: LastLayer, features: Tensor, labels: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    protocol = layer.protocol
    size = protocol.local_batch_size or drawn.shape[1]
    rate, times = protocol.known_rate, size if protocol.reduction == "sum" else 1
    drawn = drawn.to(features.device)
    # Frozen or missing parameters do not move.
    moving = [layer.weight_gradient is not None, layer.bias_gradient is not None]
    starts = values = [layer.weight, layer.bias]
    velocities = totals = [torch.zeros((), device=features.device)] * 2
    for step in range(protocol.local_steps):
        first = step * size % drawn.shape[1]
        batch = drawn[:, first : first + size]
        inputs = features[batch]
        weight, bias = values
        predictions = (inputs @ weight.mT + bias[:, None]).softmax(dim=2)
        targets = protocol.targets(labels[batch], predictions.dtype)
        error = times * (targets.sum(2, keepdim=True) * predictions - targets) / size
        gradients = [error.mT @ inputs, error.sum(1)]
        velocities = [
            protocol.momentum * velocity + gradient + protocol.weight_decay * value
            for velocity, gradient, value in zip(velocities, gradients, values, strict=True)
        ]
        totals = [total + velocity for total, velocity in zip(totals, velocities, strict=True)]
        values = [
            value - rate * velocity if moves else value
            for value, velocity, moves in zip(values, velocities, moving, strict=True)
        ]
    weights, biases = (
        mean_gradient(protocol, total / protocol.local_steps, start)
        for total, start in zip(totals, starts, strict=True)
    )
    return weights, biases
