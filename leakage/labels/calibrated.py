"""Rules that also use dummy images or the attacker's own images."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from leakage.labels.auxiliary import Auxiliary, KnownFeatures, LabelledFeatures, known_features
from leakage.labels.counts import round_counts
from leakage.labels.from_gradients import Found, by_impact
from leakage.labels.last_layer import LastLayer
from leakage.labels.simulation import draw_images, simulate
from leakage.seeds import derive_seed

# Number of noise images; one black and one white image are added.
_DUMMIES = 64
# For `mean_feature`: iterations, images used to estimate how features vary, and victims processed at once.
_ITERATIONS, _IMAGES, _VICTIMS_AT_ONCE = 10, 256, 64
# Bounds on how much the victims' features vary, relative to those of the dummies.
_SPREAD = (0.7, 1.4)
# Number of simulated clients from which the expected updates are learnt.
_SIMULATED = 512
# Weight of the equation for the sum of the counts, relative to the largest coefficient of the others.
_WEIGHT_OF_SUM = 10.0
_TRACE = 1e-6


def llg_star(layer: LastLayer, seed: int) -> Found:
    r"""LLG*: LLG with impact and offset measured on dummy images (black, white and noise).

    For a single image of class k, the sum of row k is :math:`-(1 - p_k) \sum_d h_d`. Its mean over dummies
    and classes, divided by N and multiplied by 1 + 1/K, is the impact. For an image of another class, the sum of
    row k is :math:`p_k \sum_d h_d`. Its mean is the offset of class k.

    Wainakh et al., *User-Level Label Leakage from Gradients in Federated Learning*, PETS 2022,
    https://arxiv.org/abs/2105.09369.
    """
    return _calibrated(layer, _dummies(layer, seed), None)


def llg_plus(layer: LastLayer, known: KnownFeatures) -> Found:
    """LLG+: LLG with impact and offset measured on auxiliary images instead of dummies.

    The impact of a class is measured on images of that class, its offset on images of the other classes. An image
    without a label counts for each class with the predicted probability of that class.

    Wainakh et al., *User-Level Label Leakage from Gradients in Federated Learning*, PETS 2022,
    https://arxiv.org/abs/2105.09369.
    """
    own = known.predictions
    if known.labels is not None:
        own = F.one_hot(known.labels, layer.num_classes).to(own).expand_as(own)
    return _calibrated(layer, known, own)


def _calibrated(layer: LastLayer, known: KnownFeatures, own: Tensor | None) -> Found:
    totals = known.features.sum(2, keepdim=True)
    if_own, if_other = (1 - known.predictions) * totals, known.predictions * totals  # (W, M, K)
    every = torch.ones_like(known.predictions)
    own, other = (every, every) if own is None else (own, 1 - own)
    some = torch.finfo(own.dtype).tiny  # a class may be predicted for no image
    impact = (
        ((if_own * own).sum(1) / own.sum(1).clamp(min=some)).mean(1) * (1 + 1 / layer.num_classes) / layer.num_images
    )
    offset = (if_other * other).sum(1) / other.sum(1).clamp(min=some)
    sums = layer.rows.sum(dim=2)
    return by_impact(layer, sums, impact.expand(len(sums)), offset.expand_as(sums))


def geng(layer: LastLayer, seed: int) -> Found:
    r"""Zero-shot counts: :math:`n_k = N (\bar p_k - g_{b,k})` with :math:`\bar p` the mean prediction on noise.

    Without a bias, the projection of the weight gradient's rows onto the mean feature of the noise replaces
    :math:`g_{b,k}`: :math:`g_{W,k} \cdot \bar h / \lVert \bar h \rVert^2`.

    Geng et al., *Towards General Deep Leakage in Federated Learning*, 2021, https://arxiv.org/abs/2110.09074.
    """
    dummies = _dummies(layer, seed)
    push = layer.bias_gradient
    if push is None:
        mean = dummies.features.mean(1)
        along = torch.einsum("vkd,vd->vk", layer.rows, mean.expand(len(layer), -1))
        push = along / mean.square().sum(1, keepdim=True).clamp(min=torch.finfo(along.dtype).tiny)
    estimates = layer.protocol.counts(dummies.predictions.mean(1) - push)
    return round_counts(estimates, layer.num_images), estimates, None


def rlu(layer: LastLayer, known: LabelledFeatures, seed: int) -> Found:
    r"""RLU: the counts whose expected update of the last bias is closest to the shared one.

    An image of class j is expected to add a vector :math:`c_j` to :math:`N g_b`, so the counts solve

    .. math:: \min_n \Bigl\lVert N g_b - \sum_j n_j c_j \Bigr\rVert^2, \qquad n \ge 0, \quad \sum_j n_j = N.

    For one step, :math:`c_j` is the mean of :math:`p - y` over the labelled images of class j. For several local
    steps, it is learnt by least squares from simulated clients, which hold these images and train their
    last layer according to the protocol. The paper follows the mean of the logits instead.

    Chen and Vikalo, *Recovering Labels from Local Updates in Federated Learning*, ICML 2024,
    https://arxiv.org/abs/2405.00955.
    """
    push = layer.push
    if layer.protocol.local_steps == 1:
        error, own = known.predictions - known.one_hot, known.one_hot
        expected = torch.einsum("wmk,mj->wjk", error, own) / own.sum(0)[:, None]
    else:
        drawn, counts = draw_images(known.labels, layer, _SIMULATED, derive_seed(seed, 0, "expected updates"))
        pushes = simulate(layer, known, drawn).push
        # In double precision on the CPU, where the LAPACK driver handles classes that no client holds.
        solution = torch.linalg.lstsq(counts.double(), layer.num_images * pushes.double().cpu()).solution
        expected = solution[None]
    solved = [
        _on_simplex(matrix, right, layer.num_images)
        for matrix, right in zip(
            expected.mT.expand(len(layer), -1, -1).double().cpu().numpy(),
            (layer.num_images * push).double().cpu().numpy(),
            strict=True,
        )
    ]
    estimates = torch.from_numpy(np.stack(solved)).to(push)
    return round_counts(estimates, layer.num_images), estimates, None


def mean_feature(layer: LastLayer, known: KnownFeatures) -> Found:
    r"""Compute counts from the mean prediction, and the mean prediction from the mean feature of all rows.

    By the bias gradient, the counts are :math:`n = N (\bar p - g_b)` with
    :math:`\bar p` the mean prediction. Let features be :math:`h_i = \bar h + u_i` with the :math:`u_i` of
    dummy images (centred). Labels say little about the features of an untrained network, so

    .. math:: g_{W,k} = g_{b,k} \bar h + C_k - \tfrac{1}{N} \sum_{i: y_i = k} u_i, \qquad
        C = \mathrm{mean}_i \; \mathrm{softmax}(W (\bar h + u_i) + b) \, u_i^\top

    where the last term is noise with a variance proportional to :math:`n_k`. Weighted least squares over the
    K rows gives :math:`\bar h`, and then new predictions, C and counts. This is repeated ten times. The scale of the
    :math:`u_i` is fitted as well. No image of the victims' kind is needed: the dummies are noise with the spectrum
    of natural images, or the auxiliary images if there are any. The rule is nearly exact on untrained networks, for any
    activation and any number of images. Trained networks break the assumption.

    This rule was developed for this library. iLRG computes a feature from each row alone, which is noise where
    :math:`g_{b,k}` is near zero; the least-squares fit to all rows avoids this.
    """
    # Take images at even spacing, because they may be sorted by class.
    features = known.features[:, torch.linspace(0, len(known) - 1, min(_IMAGES, len(known))).long()]
    deviations = features - features.mean(dim=1, keepdim=True)
    parts = [
        _by_mean_feature(layer.select(part).midway(), deviations[part] if layer.own_weights else deviations)
        for part in torch.split(torch.arange(len(layer), device=deviations.device), _VICTIMS_AT_ONCE)
    ]
    estimates = torch.cat(parts)
    return round_counts(estimates, layer.num_images), estimates, None


def _by_mean_feature(layer: LastLayer, deviations: Tensor) -> Tensor:
    rows, push = layer.rows, layer.push
    weights = torch.ones_like(push)
    covariance = torch.zeros_like(rows)
    spread = torch.ones_like(push[:, 0])
    # The logits of the deviations change only in scale.
    apart = deviations @ layer.weight.mT
    estimates = push
    for iteration in range(_ITERATIONS):
        mean = torch.einsum("vk,vkd->vd", weights * push, rows - covariance)
        mean = mean / (weights * push.square()).sum(1, keepdim=True).clamp(min=torch.finfo(push.dtype).tiny)
        logits = torch.einsum("vd,vkd->vk", mean, layer.weight.expand(len(rows), -1, -1)) + layer.bias
        predictions = (logits[:, None] + spread[:, None, None] * apart).softmax(dim=2)
        covariance = torch.einsum("vmk,vmd->vkd", predictions, deviations.expand(len(rows), -1, -1))
        covariance = covariance * (spread / deviations.shape[1])[:, None, None]
        estimates = layer.protocol.counts(predictions.mean(dim=1) - push)
        weights = 1 / (estimates.clamp(min=0) + 0.5)
        if iteration:
            rest = rows - push[..., None] * mean[:, None]
            shared, own = ((weights[..., None] * other * covariance).sum((1, 2)) for other in (rest, covariance))
            ratio = (shared / own.clamp(min=torch.finfo(push.dtype).tiny)).clamp(0.25, 4)
            spread = (spread * ratio.sqrt()).clamp(*_SPREAD)
    return estimates


def _on_simplex(matrix: np.ndarray, right: np.ndarray, total: int) -> np.ndarray:
    """Solve least squares for non-negative counts that sum to ``total``; the sum is one heavily weighted equation."""
    classes = matrix.shape[1]
    weight = _WEIGHT_OF_SUM * max(float(np.abs(matrix).max()), 1e-6)
    # Add a small multiple of the identity: similar classes make the equations singular, which some solvers refuse.
    rows = np.concatenate([matrix, np.full((1, classes), weight), _TRACE * weight * np.eye(classes)])
    solution: np.ndarray = nnls(rows, np.concatenate([right, [weight * total], np.zeros(classes)]))[0]
    return solution


def _dummies(layer: LastLayer, seed: int) -> KnownFeatures:
    """Return the features of a black image, a white image and noise."""
    shape = layer.protocol.image_shape
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, "dummy images"))
    noise = torch.rand(_DUMMIES, *shape, generator=generator)
    images = torch.cat([torch.zeros(1, *shape), torch.ones(1, *shape), noise])
    return known_features(layer, Auxiliary(images), seed)
