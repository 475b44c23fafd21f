"""RLG: which classes are there, by separating the columns of the gradient."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linprog

from leakage.labels.counts import spread_evenly
from leakage.labels.from_gradients import Found
from leakage.labels.last_layer import LastLayer

# A singular value below this share of the largest is rounding; a margin below it is none.
_RANK_TOLERANCE = 1e-5
_MARGIN = 1e-4


def rlg(layer: LastLayer) -> Found:
    r"""RLG: a class is there if a half-space parts it from all others in the gradient's column space.

    The columns of :math:`g_W` are combinations of the vectors :math:`p_i - y_i`, each negative in its own
    class alone. With r singular vectors :math:`U \in R^{K \times r}`, r at most N, class c is there only
    if some x has :math:`(U x)_c < 0` and :math:`(U x)_k \ge 0` for all other k: a linear programme for
    every class of every victim. While the images' features are linearly independent no class that is there
    is missed. It finds the set of classes, not their counts, and says nothing from K - 1 images on: as the entries of
    a column sum to zero, they then span all there is, and every class can be parted from the others.

    Dang et al., *Revealing and Protecting Labels in Distributed Training*, NeurIPS 2021,
    https://arxiv.org/abs/2111.00556.
    """
    assert layer.weight_gradient is not None
    left, values, _ = torch.linalg.svd(layer.weight_gradient.double(), full_matrices=False)
    ranks = (values > _RANK_TOLERANCE * values[:, :1]).sum(1).clamp(max=layer.num_images).tolist()
    margins = np.stack(
        [
            _margins((vectors[:, :rank] * strength[:rank] / strength[0]).cpu().numpy())
            for vectors, strength, rank in zip(left, values, ranks, strict=True)
        ]
    )
    scores = torch.from_numpy(margins).to(layer.weight_gradient)
    present = scores > _MARGIN
    return spread_evenly(present, scores, layer.num_images), scores, present


def _margins(vectors: np.ndarray) -> np.ndarray:
    """For each row how far it can be on the negative side of a plane, relative to its length, all others not being."""
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
