"""The last layer of clients that left out entries of their gradients."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.defenses.random_pruning import RandomPruning
from leakage.defenses.top_k import TopK
from leakage.labels.auxiliary import KnownFeatures
from leakage.labels.last_layer import LastLayer
from leakage.labels.length import known_to_attackers

_ITERATIONS = 3


def leave_out(protocol: Protocol) -> bool:
    """Return whether clients are known to leave out entries of their gradients."""
    return any(isinstance(defense, TopK | RandomPruning) for defense in known_to_attackers(protocol))


def complete(layer: LastLayer, known: KnownFeatures) -> LastLayer:
    r"""Fill in the entries of the last layer's gradients that clients left out.

    The bias gradient is the sum of :math:`p_i - y_i` over the images, and row k of the weight gradient is nearly its
    entry k times the mean feature, :math:`g_W \approx g_b \, \bar h^\top`. So a few entries of each row that were sent
    determine the bias gradient, and all rows together the mean feature, by alternating least squares from the mean
    feature of the attacker's own images. Classes of which nothing was sent share what the sum of the bias gradient over
    the classes, which is 0, leaves for them. Entries that were sent remain. Top-k keeps the largest entries, which are
    not typical of their rows, so that this works less well than for entries left out at random. This method was
    developed for this library.

    Args:
        layer: last layer that shares a weight gradient.
        known: features of the attacker's own images.
    """
    rows, means = layer.rows, known.features.mean(1)
    sent = rows != 0
    push = layer.bias_gradient if layer.bias_gradient is not None else torch.zeros_like(rows[..., 0])
    sent_push = push != 0
    features = means.expand(len(rows), -1)
    for _ in range(_ITERATIONS):
        along = torch.einsum("vkd,vd->vk", rows, features) + push
        lengths = torch.einsum("vkd,vd->vk", sent.to(rows), features.square()) + sent_push.to(rows)
        found = torch.where(lengths > 0, along / torch.where(lengths > 0, lengths, 1), 0)
        silent = lengths == 0
        rest = -found.sum(1, keepdim=True) / silent.sum(1, keepdim=True).clamp(min=1)
        found = torch.where(silent, rest, found)
        # Features stay at those of the attacker's images where nothing says otherwise.
        squares = torch.einsum("vkd,vk->vd", sent.to(rows), found.square())
        ridge = found.square().mean(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        errors = torch.einsum("vkd,vk->vd", torch.where(sent, rows - _outer(found, means), 0), found)
        features = means + errors / (squares + ridge)
    filled = torch.where(sent, rows, _outer(found, features))
    bias = None if layer.bias_gradient is None else torch.where(sent_push, push, found)
    return dataclasses.replace(layer, weight_gradient=filled, bias_gradient=bias)


def _outer(push: Tensor, features: Tensor) -> Tensor:
    return push[..., None] * features[:, None]
