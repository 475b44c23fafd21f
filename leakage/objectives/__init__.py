"""Objectives that a search minimises: weighted sums of gradient distances and image priors."""

from leakage.objectives.chain_objective import ChainObjective
from leakage.objectives.distances import (
    DISTANCES,
    CosineDistance,
    LengthDistance,
    RowCosineDistance,
    SquaredDistance,
)
from leakage.objectives.features import FeatureDistance
from leakage.objectives.gaussian_prior import GaussianPrior
from leakage.objectives.priors import L2, BatchNormStatistics, TotalVariation
from leakage.objectives.terms import ActivationPrior, Distance, Gradients, Point, Prior, Sum, Term

__all__ = [
    "DISTANCES",
    "L2",
    "ActivationPrior",
    "BatchNormStatistics",
    "ChainObjective",
    "CosineDistance",
    "Distance",
    "FeatureDistance",
    "GaussianPrior",
    "Gradients",
    "LengthDistance",
    "Point",
    "Prior",
    "RowCosineDistance",
    "SquaredDistance",
    "Sum",
    "Term",
    "TotalVariation",
]
