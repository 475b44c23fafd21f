"""Dataset condensation: a few synthetic images that replace a training set, found by matching gradients or features."""

from leakage import notices
from leakage.condensation.augmentation import SiameseAugmentation
from leakage.condensation.condensation import Condensation
from leakage.condensation.dd_ranking import export_dd_ranking
from leakage.condensation.decoding import decode, encode
from leakage.condensation.distribution_matching import DistributionMatchingCondensation
from leakage.condensation.evaluation import Evaluation, evaluate, evaluate_full
from leakage.condensation.gradient_matching import GradientMatchingCondensation
from leakage.condensation.kmeans import kmeans_images
from leakage.condensation.protocols import CondensationProtocol
from leakage.condensation.recipe import Recipe, Score
from leakage.condensation.synthetic_set import SyntheticSet, random_images
from leakage.condensation.training import TrainingOptions

notices.leave_out()

__all__ = [
    "Condensation",
    "CondensationProtocol",
    "DistributionMatchingCondensation",
    "Evaluation",
    "GradientMatchingCondensation",
    "Recipe",
    "Score",
    "SiameseAugmentation",
    "SyntheticSet",
    "TrainingOptions",
    "decode",
    "encode",
    "evaluate",
    "evaluate_full",
    "export_dd_ranking",
    "kmeans_images",
    "random_images",
]
