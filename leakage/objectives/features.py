"""The distance of each image's features from those that the gradient of the last layer gives away."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form.features import check_separable, separate_features
from leakage.errors import check_flag
from leakage.objectives.terms import Point, Term
from leakage.pieces import State

# The largest residual at which separated features are trusted: rounding gives 1e-8 to 1e-5, wrong labels far more.
_TRUSTED = 1e-4


class FeatureDistance(Term):
    r"""The distance between the features of each dummy image and the true ones, which the last layer gives away.

    .. math:: \frac{1}{N} \sum_n \frac{\lVert h(x_n) - \hat h_n \rVert_2^2}{\lVert \hat h_n \rVert_2^2}

    The features h(x) are the inputs of the last linear layer. :func:`~leakage.closed_form.separate_features` recovers
    them for **every** image of a batch, before the search and to rounding, so each image gets a target of its own.
    Without it, a search has to find out which part of the gradient belongs to which image, and images of a batch blend
    into one another. The value lies in [0, inf), and is 0 at the true images.

    Labels must be known before the search, revealed or inferred. A victim whose features do not explain its gradient
    (a residual above 1e-4, because of a defense or wrong labels) is searched for without this term.

    Args:
        required: whether to refuse victims whose features can't be separated, such as those of as many images as
            classes, or of several local steps. If False, the term is 0 for these, and for single images, which have
            nothing to be separated from.

    Raises:
        ValueError: ``required`` is not True or False; in ``fit``, :func:`~leakage.closed_form.check_separable` refuses
            the victims, or labels are not known before the search.

    References:
        New in this library. Kariyappa et al., *Cocktail Party Attack*, ICML 2023, https://arxiv.org/abs/2209.05578,
        match features that they separate approximately, by independent component analysis.

    Example:
        >>> from leakage.objectives import CosineDistance, TotalVariation
        >>> CosineDistance() + FeatureDistance() + 1e-2 * TotalVariation()
        CosineDistance() + FeatureDistance(required=True) + 0.01 * TotalVariation(kind='anisotropic')
    """

    isometric = True

    def __init__(self, required: bool = True) -> None:
        check_flag(required=required)
        self.required = required

    def watched(self, victim: Victim) -> Sequence[str]:
        """Return the name of the last layer, if features can be separated."""
        return [str(victim.classifier)] if self._applies(victim) else ()

    def check(self, victim: Victim) -> None:
        """Raise a ``ValueError`` if features are required and can't be separated."""
        if self.required:
            check_separable(victim)

    def state(self, victim: Victim, dtype: torch.dtype) -> State:
        """Return empty ``features`` ``(0, N, D)`` and ``scale``, or nothing if features can't be separated."""
        if not self._applies(victim):
            return {}
        width = victim.state[f"{victim.classifier}.weight"].shape[1]
        return {
            "features": torch.empty(0, victim.protocol.num_images, width, dtype=dtype),
            "scale": torch.empty(0, dtype=dtype),
        }

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """Return the features of V victims, and a scale of 1 where they explain the gradient, else 0."""
        if not self._applies(victim):
            return {}
        if shared.labels is None:
            raise ValueError(
                "Expected labels that are known before the search for FeatureDistance, but got none. Use "
                "labels=InferredLabels(), or reveal them (reveal_labels=True)."
            )
        like = next(iter(shared.gradients.values()))
        separated = separate_features(shared, victim, shared.labels)
        trusted = (separated.residual < _TRUSTED) & separated.features.isfinite().all(2).all(1)
        # Any features of nonzero length do where the scale is 0.
        features = torch.where(trusted[:, None, None], separated.features, 1.0)
        return {"features": features.to(like), "scale": trusted.to(like)}

    def value(self, point: Point, kept: State) -> Tensor:
        """Return the mean over the images of their squared relative distances."""
        return self.residuals(point, kept).square().sum()

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Return the relative differences of all features, divided by the square root of N, as one vector."""
        if not point.activations:
            return 0 * point.images.sum()[None]
        (seen,), wanted = point.activations.values(), kept["features"]
        size = wanted.square().sum(1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny).sqrt()
        apart: Tensor = (seen.inputs - wanted) / size
        return apart.flatten() / math.sqrt(len(wanted))

    def _applies(self, victim: Victim) -> bool:
        if victim.protocol.num_images == 1 and not self.required:
            return False
        try:
            check_separable(victim)
        except ValueError:
            return False
        return True
