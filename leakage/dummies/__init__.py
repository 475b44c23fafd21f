"""What is searched for: images, pixel by pixel or through a generator, and labels."""

from leakage.dummies.dummy import Dummy, Images, Labels, Target
from leakage.dummies.group import Group
from leakage.dummies.labels import InferredLabels, JointLabels, RevealedLabels
from leakage.dummies.latent import LatentCode
from leakage.dummies.pixels import Pixels, RGAPStart, Start

__all__ = [
    "Dummy",
    "Group",
    "Images",
    "InferredLabels",
    "JointLabels",
    "Labels",
    "LatentCode",
    "Pixels",
    "RGAPStart",
    "RevealedLabels",
    "Start",
    "Target",
]
