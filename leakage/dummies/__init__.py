"""The unknowns of a search: images (as pixels or latent codes), labels, and what clients do not share."""

from leakage.dummies.drawn import Drawn
from leakage.dummies.dummy import Dummy, Images, Labels, Target
from leakage.dummies.group import Group
from leakage.dummies.labels import InferredLabels, JointLabels, RevealedLabels
from leakage.dummies.latent import LatentCode
from leakage.dummies.learning_rate import LearningRate
from leakage.dummies.local_order import LocalOrder
from leakage.dummies.mixture import Mixture
from leakage.dummies.pixels import Pixels, RGAPStart, Start

__all__ = [
    "Drawn",
    "Dummy",
    "Group",
    "Images",
    "InferredLabels",
    "JointLabels",
    "Labels",
    "LatentCode",
    "LearningRate",
    "LocalOrder",
    "Mixture",
    "Pixels",
    "RGAPStart",
    "RevealedLabels",
    "Start",
    "Target",
]
