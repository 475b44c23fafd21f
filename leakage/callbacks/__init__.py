"""What a user sees of a run: progress, pictures, tables."""

from leakage.callbacks.gallery import Gallery
from leakage.callbacks.loggers import OfflineSafeWandbLogger
from leakage.callbacks.progress import AttackProgressBar
from leakage.callbacks.results import ResultsCallback
from leakage.callbacks.table import VictimTable

__all__ = ["AttackProgressBar", "Gallery", "OfflineSafeWandbLogger", "ResultsCallback", "VictimTable"]
