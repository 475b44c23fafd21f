"""Published rules that are calibrated on dummy images, or on labelled ones of the attacker's own."""

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

# Images of noise; with them one black and one white.
_DUMMIES = 64
# Clients that the expected updates are learnt from.
_SIMULATED = 512
# How much more the sum of the counts weighs than any other equation.
_WEIGHT_OF_SUM = 10.0
_TRACE = 1e-6


def llg_star(layer: LastLayer, seed: int) -> Found:
    r"""LLG*: LLG with impact and offset measured on dummy images: black, white and noise.

    With an image of class k alone the sum of row k is :math:`-(1 - p_k) \sum_d h_d`; its mean over dummies
    and classes, over N and times 1 + 1/K, is the impact. With images of other classes it is
    :math:`p_k \sum_d h_d`; its mean is the offset of class k.

    Wainakh et al., *User-Level Label Leakage from Gradients in Federated Learning*, PETS 2022,
    https://arxiv.org/abs/2105.09369.
    """
    return _calibrated(layer, _dummies(layer, seed), None)


def llg_plus(layer: LastLayer, known: KnownFeatures) -> Found:
    """LLG+: as LLG*, with labelled images of the same kind in place of the dummies.

    The impact of a class is measured on images of this class, its offset on those of the others. Images without
    labels count as much for each class as they are predicted to be of it.

    Wainakh et al., *User-Level Label Leakage from Gradients in Federated Learning*, PETS 2022,
    https://arxiv.org/abs/2105.09369.
    """
    own = known.predictions
    if known.labels is not None:
        own = F.one_hot(known.labels, layer.num_classes).to(own).expand_as(own)
    return _calibrated(layer, known, own)


def _calibrated(layer: LastLayer, known: KnownFeatures, own: Tensor | None) -> Found:
    assert layer.weight_gradient is not None
    totals = known.features.sum(2, keepdim=True)
    if_own, if_other = (1 - known.predictions) * totals, known.predictions * totals  # (W, M, K)
    every = torch.ones_like(known.predictions)
    own, other = (every, every) if own is None else (own, 1 - own)
    some = torch.finfo(own.dtype).tiny  # a class may be predicted of no image
    impact = (
        ((if_own * own).sum(1) / own.sum(1).clamp(min=some)).mean(1) * (1 + 1 / layer.num_classes) / layer.num_images
    )
    offset = (if_other * other).sum(1) / other.sum(1).clamp(min=some)
    sums = layer.weight_gradient.sum(dim=2)
    return by_impact(layer, sums, impact.expand(len(sums)), offset.expand_as(sums))


def geng(layer: LastLayer, seed: int) -> Found:
    r"""Zero-shot counts: :math:`n_k = N (\bar p_k - g_{b,k})` with :math:`\bar p` the mean prediction on noise.

    Without a bias the rows of the weights' gradient stand in for it, along the mean feature of the noise:
    :math:`g_{W,k} \cdot \bar h / \lVert \bar h \rVert^2`.

    Geng et al., *Towards General Deep Leakage in Federated Learning*, 2021,
    https://arxiv.org/abs/2110.09074.
    """
    dummies = _dummies(layer, seed)
    push = layer.bias_gradient
    if push is None:
        assert layer.weight_gradient is not None
        mean = dummies.features.mean(1)
        along = torch.einsum("vkd,vd->vk", layer.weight_gradient, mean.expand(len(layer), -1))
        push = along / mean.square().sum(1, keepdim=True).clamp(min=torch.finfo(along.dtype).tiny)
    estimates = layer.num_images * (dummies.predictions.mean(1) - push)
    return round_counts(estimates, layer.num_images), estimates, None


def rlu(layer: LastLayer, known: LabelledFeatures, seed: int) -> Found:
    r"""RLU: the counts whose expected update of the last bias is the one that was shared.

    An image of class j is expected to add a vector :math:`c_j` to :math:`N g_b`, so the counts solve

    .. math:: \min_n \Bigl\lVert N g_b - \sum_j n_j c_j \Bigr\rVert^2, \qquad n \ge 0, \quad \sum_j n_j = N.

    For one step :math:`c_j` is the mean of :math:`p - y` over the labelled images of class j. For local
    steps it is learnt by least squares from simulated clients that hold such images and train their
    last layer as the protocol says; the paper follows the mean of the logits instead.

    Chen and Vikalo, *Recovering Labels from Local Updates in Federated Learning*, ICML 2024,
    https://arxiv.org/abs/2405.00955.
    """
    push = layer.bias_gradient
    assert push is not None
    if layer.protocol.local_steps == 1:
        error, own = known.predictions - known.one_hot, known.one_hot
        expected = torch.einsum("wmk,mj->wjk", error, own) / own.sum(0)[:, None]
    else:
        drawn, counts = draw_images(known.labels, layer, _SIMULATED, derive_seed(seed, 0, "expected updates"))
        pushes = simulate(layer, known, drawn).bias_gradient
        assert pushes is not None
        # In double precision on the CPU, whose driver copes with classes that no client holds.
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


def _on_simplex(matrix: np.ndarray, right: np.ndarray, total: int) -> np.ndarray:
    """Least squares with counts that are not negative and sum to ``total``, by one equation of great weight."""
    classes = matrix.shape[1]
    weight = _WEIGHT_OF_SUM * max(float(np.abs(matrix).max()), 1e-6)
    # A trace of the identity: classes that are alike make the equations singular, which some solvers refuse.
    rows = np.concatenate([matrix, np.full((1, classes), weight), _TRACE * weight * np.eye(classes)])
    solution: np.ndarray = nnls(rows, np.concatenate([right, [weight * total], np.zeros(classes)]))[0]
    return solution


def _dummies(layer: LastLayer, seed: int) -> KnownFeatures:
    """Black, white and noise."""
    shape = layer.protocol.image_shape
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, "dummy images"))
    noise = torch.rand(_DUMMIES, *shape, generator=generator)
    images = torch.cat([torch.zeros(1, *shape), torch.ones(1, *shape), noise])
    return known_features(layer, Auxiliary(images), seed)
