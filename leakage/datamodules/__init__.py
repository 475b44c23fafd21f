"""Data sets as Lightning DataModules: victims of each for the attacks, all of its images for condensation."""

from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.datamodules.benchmarks import (
    CIFAR10Victims,
    CIFAR100Victims,
    FashionMNISTVictims,
    MNISTVictims,
    SVHNVictims,
)
from leakage.datamodules.draws import draw_victims
from leakage.datamodules.image_folder import ImageFolderVictims, LFWVictims
from leakage.datamodules.images import ImageVictims
from leakage.datamodules.labelled import ClassBatch, LabelledDataModule, LabelledTensors
from leakage.datamodules.labelled_benchmarks import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from leakage.datamodules.labelled_folder import ImageFolder, Sample
from leakage.datamodules.sample import SampleVictims
from leakage.datamodules.shared import SharedGradientFiles

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SVHN",
    "CIFAR10Victims",
    "CIFAR100Victims",
    "ClassBatch",
    "FashionMNIST",
    "FashionMNISTVictims",
    "GroundTruth",
    "ImageFolder",
    "ImageFolderVictims",
    "ImageVictims",
    "LFWVictims",
    "LabelledDataModule",
    "LabelledTensors",
    "MNISTVictims",
    "SVHNVictims",
    "Sample",
    "SampleVictims",
    "SharedGradientFiles",
    "VictimDataModule",
    "draw_victims",
]
