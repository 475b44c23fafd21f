"""Rules that infer labels from the last layer's gradient and weights alone."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from leakage.labels.counts import one_by_one, round_counts, spread_evenly
from leakage.labels.last_layer import LastLayer

# Counts, scores and the classes that are present, each (V, K); the last is None if the counts say the same.
Found = tuple[Tensor, Tensor, Tensor | None]

# For `rlg`: singular values below the first share of the largest one, and margins below the second, count as zero.
_RANK_TOLERANCE, _MARGIN = 1e-5, 1e-4


def idlg(layer: LastLayer) -> Found:
    r"""iDLG: the gradient of one image's logits, :math:`p - y`, is negative only for its class. This is exact.

    The bias gradient equals :math:`p - y`. A network may be so confident that :math:`p_y - 1` and other predictions are
    rounded to zero. If several classes then share the smallest value, zero, the label is the one with the largest
    logit, computed from the feature :math:`h = g_{W,k} / g_{b,k}` of the largest entry. Only a gradient that is zero
    everywhere reveals nothing. Without a bias, the rows of the weight gradient are multiples of one vector,
    and the label is the class whose row points in the opposite direction to all others. With two classes, it is the one
    whose row has a negative sum, which is exact if the features can't be negative.

    With label smoothing, other entries may be negative too. The label is then the largest entry of :math:`p - g_b`,
    where p is computed from the feature.

    Zhao, Mopuri and Bilen, *iDLG*, 2020, https://arxiv.org/abs/2001.02610.
    """
    push = layer.bias_gradient
    if layer.protocol.label_smoothing:
        push = layer.push - logits_of_one(layer.midway()).softmax(1).to(layer.push)
    elif push is None:
        push = _against_the_others(layer.rows)
    elif layer.weight_gradient is not None:
        lowest = push == push.amin(dim=1, keepdim=True)
        tied = (lowest.sum(dim=1, keepdim=True) > 1) & (push != 0).any(dim=1, keepdim=True)
        push = torch.where(tied & lowest, -_largest_logits(layer), push)
    counts = torch.zeros_like(push, dtype=torch.long).scatter_(1, push.argmin(dim=1, keepdim=True), 1)
    return counts, -push, None


def row_minimum(layer: LastLayer) -> Found:
    r"""GradInversion: the N classes whose rows of the weight gradient have the smallest entries.

    Each of these classes gets one image. If the features can't be negative, only a class that is present can have a
    negative entry in its row. If fewer than N rows have one, the images are spread evenly over their classes.

    Yin et al., *See through Gradients*, CVPR 2021, https://arxiv.org/abs/2104.07586.
    """
    scores = -layer.rows.amin(dim=2)
    lowest = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < layer.num_images
    present = lowest & (scores > 0)
    return spread_evenly(present, scores, layer.num_images), scores, present


def llg(layer: LastLayer) -> Found:
    r"""LLG: counts from the sums of the weight gradient's rows.

    Every class whose row has a negative sum gets one image. Then the class with the most negative sum gets another one,
    until N images are counted. One image lowers the sum :math:`s_k` of its class by about the *impact*

    .. math:: m = \frac{1}{N} \left( 1 + \frac{1}{K} \right) \sum_{k: s_k < 0} s_k,

    which is added back each time the class is counted.

    Wainakh et al., *User-Level Label Leakage from Gradients in Federated Learning*, PETS 2022,
    https://arxiv.org/abs/2105.09369.
    """
    sums = layer.rows.sum(dim=2)
    impact = -sums.clamp(max=0).sum(1) * (1 + 1 / layer.num_classes) / layer.num_images
    return by_impact(layer, sums, impact, torch.zeros_like(sums))


def by_impact(layer: LastLayer, sums: Tensor, impact: Tensor, offset: Tensor) -> Found:
    """Count labels as LLG does: classes with negative sums first, then the lowest sum less its offset, one by one."""
    negative = (sums < 0).long()
    # There can be more negative classes than images only if features are negative; the lowest N are kept.
    order = sums.argsort(dim=1, stable=True).argsort(dim=1)
    counts = negative * (order < layer.num_images)
    push = sums + counts * impact[:, None] - offset
    found = one_by_one(push, impact, counts, layer.num_images)
    # With an impact of zero, images can't be counted, but classes can still be ranked.
    return found, ((offset - sums) / impact[:, None].clamp(min=torch.finfo(sums.dtype).tiny)).nan_to_num(), None


def ilrg(layer: LastLayer) -> Found:
    r"""iLRG: features of each class from ratios of gradients, then predictions, then counts by least squares.

    The row of a class comes mostly from its own images, so the mean feature is about
    :math:`\bar h_j = g_{W,j} / g_{b,j}`, and its prediction is
    :math:`\hat p_j = \mathrm{softmax}(W \bar h_j + b)`. The counts n solve

    .. math:: \sum_j n_j \hat p_j - n = N g_b, \qquad \sum_j n_j = N

    in the least-squares sense and are rounded. If features can't be negative, only classes whose rows have
    a negative entry are considered; this is how this library reads the paper. A class that is present but far rarer
    than predicted may have no such entry, and is then missed.

    Ma et al., *Instance-wise Batch Label Restoration via Gradients in Federated Learning*, ICLR 2023,
    https://openreview.net/forum?id=FIrQfNSOoTr.
    """
    layer = layer.midway()
    rows, push = layer.rows, layer.push
    ratio = rows / torch.where(push == 0, torch.finfo(push.dtype).tiny, push)[..., None]
    logits = torch.einsum("vjd,vkd->vjk", ratio, layer.weight.expand(len(rows), -1, -1)) + layer.bias[:, None]
    predictions = logits.nan_to_num().softmax(dim=2)
    candidates = torch.ones_like(push, dtype=torch.bool)
    if layer.non_negative:
        candidates = rows.amin(dim=2) < 0
    balance = (predictions.mT - torch.eye(layer.num_classes).to(push)) * candidates[:, None]
    # Use the pseudo-inverse, because excluded classes give columns of zeros.
    equations = torch.cat([balance, candidates[:, None].to(push)], dim=1).double()
    total = torch.full_like(push[:, :1], layer.num_images)
    right = torch.cat([layer.num_images * push, total], dim=1).double()
    estimates = (torch.linalg.pinv(equations) @ right[..., None]).squeeze(2) * candidates
    return round_counts(estimates, layer.num_images), estimates.to(push), None


def rlg(layer: LastLayer) -> Found:
    r"""RLG: a class is present if a half-space separates it from all others in the gradient's column space.

    The columns of :math:`g_W` are combinations of the vectors :math:`p_i - y_i`, each of which is negative only in its
    own class. With r singular vectors :math:`U \in R^{K \times r}`, r at most N, class c is present only
    if some x has :math:`(U x)_c < 0` and :math:`(U x)_k \ge 0` for all other k. This is a linear program for
    every class of every victim. If the features of the images are linearly independent, no class that is present
    is missed. The rule finds the set of classes, not their counts. It is uninformative from K - 1 images on: the
    entries of a column sum to zero, so the columns then span the whole space of such vectors, and every class can be
    separated from the others.

    Dang et al., *Revealing and Protecting Labels in Distributed Training*, NeurIPS 2021,
    https://arxiv.org/abs/2111.00556.
    """
    left, values, _ = torch.linalg.svd(layer.rows.double(), full_matrices=False)
    ranks = (values > _RANK_TOLERANCE * values[:, :1]).sum(1).clamp(max=layer.num_images).tolist()
    margins = [
        _margins((vectors[:, :rank] * strength[:rank] / strength[0]).cpu().numpy())
        for vectors, strength, rank in zip(left, values, ranks, strict=True)
    ]
    scores = torch.from_numpy(np.stack(margins)).to(layer.rows)
    present = scores > _MARGIN
    return spread_evenly(present, scores, layer.num_images), scores, present


def _margins(vectors: np.ndarray) -> np.ndarray:
    """Return how far each row can lie on the negative side of a plane that has no other row on that side.

    Margins are relative to the lengths of the rows.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = vectors / np.where(lengths > 0, lengths, 1)
    margins = np.zeros(len(rows))
    if not vectors.shape[1]:  # a gradient of zeros
        return margins
    for label, row in enumerate(rows):
        others = np.delete(rows, label, axis=0)
        found = linprog(row, A_ub=-others, b_ub=np.zeros(len(others)), bounds=(-1, 1), method="highs")
        margins[label] = -float(found.fun or 0.0) if found.success else 0.0
    return margins


def _largest_logits(layer: LastLayer) -> Tensor:
    """Return the ranks, from 1, of one image's logits, ``(V, K)``."""
    return (1 + logits_of_one(layer).argsort(dim=1).argsort(dim=1)).to(layer.gradients)


def logits_of_one(layer: LastLayer) -> Tensor:
    """Return the logits ``(V, K)`` of one image, whose feature is the ratio of the gradients."""
    rows, push = layer.rows.double(), layer.gradients.double()
    largest = push.abs().argmax(dim=1, keepdim=True)
    row = rows.take_along_dim(largest[..., None], dim=1).squeeze(1)
    feature = row / push.gather(1, largest)
    return torch.einsum("vd,vkd->vk", feature, layer.weight.double().expand(len(push), -1, -1)) + layer.bias


def _against_the_others(rows: Tensor) -> Tensor:
    """Return the factors ``(V, K)`` of rows ``(V, K, D)`` that are multiples of one vector, most of them positive."""
    # Use double precision and a common scale, because squares of small numbers would underflow.
    size = rows.abs().amax(dim=(1, 2), keepdim=True).double()
    rows = rows.double() / torch.where(size > 0, size, 1)
    longest = rows.square().sum(-1).argmax(dim=1)
    along = torch.einsum("vkd,vd->vk", rows, rows[torch.arange(len(rows), device=rows.device), longest])
    surplus = along.sign().sum(1)
    # With equally many of each sign, the signs alone do not decide.
    return torch.where((surplus == 0)[:, None], rows.sum(-1), along * surplus.sign()[:, None])
