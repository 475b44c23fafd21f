"""Lightning DataModules: victims from any data set, labelled data sets in memory, and gradients shared by clients."""

from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.datamodules.benchmarks import data_folder
from leakage.datamodules.draws import draw_victims
from leakage.datamodules.labelled import ClassBatch, LabelledImages
from leakage.datamodules.shared import SharedGradients
from leakage.datamodules.sources import DATASETS, LABELLED_DATASETS, LabelledTensors, Source, in_unit_range
from leakage.datamodules.victims import Victims

__all__ = [
    "DATASETS",
    "LABELLED_DATASETS",
    "ClassBatch",
    "GroundTruth",
    "LabelledImages",
    "LabelledTensors",
    "SharedGradients",
    "Source",
    "VictimDataModule",
    "Victims",
    "data_folder",
    "draw_victims",
    "in_unit_range",
]
