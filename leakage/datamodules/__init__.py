"""Victims by data set, as Lightning DataModules."""

from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.datamodules.benchmarks import (
    CIFAR10Victims,
    CIFAR100Victims,
    FashionMNISTVictims,
    MNISTVictims,
    SVHNVictims,
)
from leakage.datamodules.image_folder import ImageFolderVictims, LFWVictims
from leakage.datamodules.images import ImageVictims
from leakage.datamodules.sample import SampleVictims
from leakage.datamodules.shared import SharedGradientFiles

__all__ = [
    "CIFAR10Victims",
    "CIFAR100Victims",
    "FashionMNISTVictims",
    "GroundTruth",
    "ImageFolderVictims",
    "ImageVictims",
    "LFWVictims",
    "MNISTVictims",
    "SVHNVictims",
    "SampleVictims",
    "SharedGradientFiles",
    "VictimDataModule",
]
