"""Callbacks that show and record a run: progress bars, pictures, tables and checkpoints."""

from leakage.callbacks.condensation import CondensationCallback
from leakage.callbacks.condensation_evaluation import AccuracyRow, SyntheticEvaluation, read_accuracies
from leakage.callbacks.condensation_images import SyntheticImages
from leakage.callbacks.condensation_progress import CondensationProgressBar
from leakage.callbacks.gallery import Gallery
from leakage.callbacks.loggers import OfflineSafeWandbLogger
from leakage.callbacks.monitor import LeakageMonitor
from leakage.callbacks.progress import AttackProgressBar
from leakage.callbacks.results import ResultsCallback
from leakage.callbacks.table import VictimTable
from leakage.callbacks.timed_checkpoint import TimedCheckpoint

__all__ = [
    "AccuracyRow",
    "AttackProgressBar",
    "CondensationCallback",
    "CondensationProgressBar",
    "Gallery",
    "LeakageMonitor",
    "OfflineSafeWandbLogger",
    "ResultsCallback",
    "SyntheticEvaluation",
    "SyntheticImages",
    "TimedCheckpoint",
    "VictimTable",
    "read_accuracies",
]
