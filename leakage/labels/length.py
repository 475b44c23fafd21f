"""Estimate how long a gradient was before it was shortened, using that label counts are whole numbers."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.defenses.base import Defense, known_defenses, known_noise
from leakage.labels.auxiliary import KnownFeatures
from leakage.labels.last_layer import LastLayer, mean_gradient

# Range and number of the lengths to try, relative to the length expected for random labels. The upper end is
# multiplied by the square root of the number of images, since few distinct labels make gradients longer.
_SHORTEST, _LONGEST, _TRIED = 0.3, 2.0, 2000
# Parameters of the Dirichlet distributions of the clients' labels, from nearly a single class to nearly uniform.
_DIRICHLET = (0.1, 0.5, 2.0, 10.0, 100.0)
# Standard deviation of counts from whole numbers at the true length, and what each image adds to it. Chosen on
# FashionMNIST with LeNet and ConvNet and 8 to 128 images.
_ROUGHNESS, _ROUGHNESS_OF_IMAGES = 0.1, 0.001
# Noise counts as strong above this share of the squared length.
_MUCH_NOISE = 0.05
# Numbers and victims processed at once; this limits the memory and does not change the result.
_NUMBERS_AT_ONCE, _VICTIMS_AT_ONCE = 2**23, 64


def noise_of_shortened(shared: SharedGradient) -> Tensor | None:
    """Return the known variance of the noise on an entry of the last layer's gradients, ``(V,)``.

    Return None if the clients are not known to shorten their gradients.
    """
    protocol, known = shared.protocol, known_to_attackers(shared.protocol)
    if not any(defense.shortens for defense in known):
        return None
    noise = known_noise(known, shared)
    unit = mean_gradient(protocol, torch.ones_like(noise), torch.zeros_like(noise))  # see `last_layer`
    return noise * unit.square()


def restore_length(layer: LastLayer, known: KnownFeatures, noise: Tensor) -> LastLayer:
    r"""Scale the gradients of the last layer back to the length they had before the clients shortened them.

    Let c be the unknown factor, :math:`g = c \, \tilde g`. The ratio of the two gradients does not depend on c.
    It gives the mean feature, and this gives the mean prediction :math:`\bar p` (as in
    :func:`~leakage.labels.calibrated.mean_feature`). The counts are then

    .. math:: n(c) = N (\bar p - c \, \tilde g_b).

    The function takes the most probable c of at least 1. Counts are non-negative whole numbers, and their prior is a
    mixture of Dirichlet-multinomial distributions. Known noise makes it matter less that counts are whole numbers. If
    the noise is strong, c is the factor at which the counts are as uneven as random labels, reduced by the share of
    the noise, so that the noise is not mistaken for labels. This method was developed for this library.

    Args:
        layer: last layer with both gradients.
        known: features of the attacker's own images.
        noise: ``(V,)``, variance of the noise on an entry of the gradients.

    Returns:
        The layer with scaled gradients.
    """
    victims = torch.arange(len(layer), device=layer.weight.device)
    size = max(1, min(_VICTIMS_AT_ONCE, _NUMBERS_AT_ONCE // (_TRIED * layer.num_classes)))
    deviations = known.features - known.features.mean(1, keepdim=True)
    parts = []
    for part in torch.split(victims, size):
        own = deviations[part] if layer.own_weights else deviations
        parts.append(_factors(layer.select(part), own, noise[part].double()))
    factor = torch.cat(parts).to(layer.push)
    return dataclasses.replace(
        layer, weight_gradient=layer.rows * factor[:, None, None], bias_gradient=layer.push * factor[:, None]
    )


def _factors(layer: LastLayer, deviations: Tensor, noise: Tensor) -> Tensor:
    """Return the factors c, ``(V,)``, in double precision."""
    push, count, classes = layer.push.double(), layer.num_images, layer.num_classes
    squares = push.square().sum(1).clamp(min=torch.finfo(push.dtype).tiny)
    mean = (torch.einsum("vk,vkd->vd", push, layer.rows.double()) / squares[:, None]).to(layer.push)
    logits = torch.einsum("vd,vkd->vk", mean, layer.weight.expand(len(push), -1, -1)) + layer.bias
    predictions = (logits[:, None] + deviations @ layer.weight.mT).softmax(2).mean(1).double()
    share = classes * noise / squares
    # The expected squared length of N (p - n / N) for random labels, relative to the observed one without noise.
    uneven = count * (1 - 1 / classes) + count**2 * (predictions - 1 / classes).square().sum(1)
    expected = (uneven / (squares * (1 - share).clamp(min=1e-4))).sqrt() / count
    ends = math.log(_SHORTEST), math.log(_LONGEST * math.sqrt(count))
    relative = torch.linspace(*ends, _TRIED, dtype=push.dtype, device=push.device).exp()
    tried = (expected[:, None] * relative).clamp(min=1)
    best = _log_probability(layer.protocol, predictions, push, noise, tried).argmax(1, keepdim=True)
    cautious = (expected * (1 - share).clamp(min=0)).clamp(min=1)
    return torch.where(share > _MUCH_NOISE, cautious, tried.gather(1, best).squeeze(1))


def _log_probability(protocol: Protocol, predictions: Tensor, push: Tensor, noise: Tensor, factors: Tensor) -> Tensor:
    """Return the log-probability of the factors ``(V, T)``, up to a constant."""
    count, classes = protocol.num_images, push.shape[1]
    counts = protocol.counts(predictions[:, None] - factors[..., None] * push[:, None])
    rough = _ROUGHNESS**2 + (_ROUGHNESS_OF_IMAGES * count) ** 2 + (count * factors) ** 2 * noise[:, None]
    # How near the counts are to whole numbers; this is ignored if the roughness is large.
    places = torch.arange(-2, 3, dtype=counts.dtype, device=counts.device)
    apart = (counts - counts.round())[..., None] - places
    near = (-apart.square() / (2 * rough[..., None, None])).logsumexp(3) - (2 * math.pi * rough[..., None]).log() / 2
    near = torch.where(rough[..., None] > 1, 0.0, near).sum(2)
    near = near - counts.clamp(max=0).square().sum(2) / (2 * rough)
    # How probable such counts are.
    whole = counts.round().clamp(min=0)
    mixed = [
        (whole + parameter).lgamma().sum(2)
        + (math.lgamma(classes * parameter) - classes * math.lgamma(parameter))
        - math.lgamma(count + classes * parameter)
        for parameter in _DIRICHLET
    ]
    ways = -(whole + 1).lgamma().sum(2)
    # Change of variables: the longer the gradient was, the smaller the shared error that a given error of the counts
    # corresponds to.
    return near + ways + torch.stack(mixed).logsumexp(0) + (classes - 1) * factors.log()


def known_to_attackers(protocol: Protocol) -> list[Defense]:
    """Return the defenses that can be rebuilt from the protocol; custom defenses are left out."""
    found: list[Defense] = []
    for defense in protocol.defenses:
        try:
            found += known_defenses([defense])
        except ValueError:
            continue
    return found
