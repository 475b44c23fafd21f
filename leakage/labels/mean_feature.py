"""Counts from the batch's mean feature, which the gradient itself gives away."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.labels.auxiliary import KnownFeatures
from leakage.labels.counts import round_counts
from leakage.labels.from_gradients import Found
from leakage.labels.last_layer import LastLayer

_ITERATIONS = 10
# Images that show how features vary, and victims looked at together.
_IMAGES, _VICTIMS_AT_ONCE = 256, 64
# The victims' features vary this many times as much as the dummies' at the least and at the most.
_SPREAD = (0.7, 1.4)


def mean_feature(layer: LastLayer, known: KnownFeatures) -> Found:
    r"""Counts are what the mean prediction leaves over, and the mean prediction follows from the mean feature.

    Summed over the images, the bias' gradient says that :math:`n = N (\bar p - g_b)` with
    :math:`\bar p` the mean prediction. Let features be :math:`h_i = \bar h + u_i` with the :math:`u_i` of
    dummy images (centred). As labels say little about the features of an untrained network,

    .. math:: g_{W,k} = g_{b,k} \bar h + C_k - \tfrac{1}{N} \sum_{i: y_i = k} u_i, \qquad
        C = \mathrm{mean}_i \; \mathrm{softmax}(W (\bar h + u_i) + b) \, u_i^\top

    where the last term is noise of variance proportional to :math:`n_k`. So weighted least squares over the
    K rows gives :math:`\bar h`, then new predictions, C and counts, ten times over. The size of the u is
    fitted as well. No image of the victims' kind is needed: the dummies are noise with the spectrum
    of natural images (with auxiliary images, those). Nearly exact on untrained networks of any activation and
    any number of images; trained networks break the assumption.

    This library's own. iLRG takes a feature from each row alone, which is noise where :math:`g_{b,k}` is
    near zero; all rows together are not.
    """
    # Spread over all of them, which may come class by class.
    features = known.features[:, torch.linspace(0, len(known) - 1, min(_IMAGES, len(known))).long()]
    deviations = features - features.mean(dim=1, keepdim=True)
    parts = [
        _estimates(layer.select(part).midway(), deviations[part] if layer.own_weights else deviations)
        for part in torch.split(torch.arange(len(layer), device=deviations.device), _VICTIMS_AT_ONCE)
    ]
    estimates = torch.cat(parts)
    return round_counts(estimates, layer.num_images), estimates, None


def _estimates(layer: LastLayer, deviations: Tensor) -> Tensor:
    rows, push, count = layer.weight_gradient, layer.bias_gradient, layer.num_images
    assert rows is not None  # as the rule needs them
    assert push is not None
    weights = torch.ones_like(push)
    covariance = torch.zeros_like(rows)
    spread = torch.ones_like(push[:, 0])
    # Logits of deviations do not change but for their size.
    apart = deviations @ layer.weight.mT
    estimates = push
    for iteration in range(_ITERATIONS):
        mean = torch.einsum("vk,vkd->vd", weights * push, rows - covariance)
        mean = mean / (weights * push.square()).sum(1, keepdim=True).clamp(min=torch.finfo(push.dtype).tiny)
        logits = torch.einsum("vd,vkd->vk", mean, layer.weight.expand(len(rows), -1, -1)) + layer.bias
        predictions = (logits[:, None] + spread[:, None, None] * apart).softmax(dim=2)
        covariance = torch.einsum("vmk,vmd->vkd", predictions, deviations.expand(len(rows), -1, -1))
        covariance = covariance * (spread / deviations.shape[1])[:, None, None]
        estimates = count * (predictions.mean(dim=1) - push)
        weights = 1 / (estimates.clamp(min=0) + 0.5)
        if iteration:
            rest = rows - push[..., None] * mean[:, None]
            shared, own = ((weights[..., None] * other * covariance).sum((1, 2)) for other in (rest, covariance))
            ratio = (shared / own.clamp(min=torch.finfo(push.dtype).tiny)).clamp(0.25, 4)
            spread = (spread * ratio.sqrt()).clamp(*_SPREAD)
    return estimates
