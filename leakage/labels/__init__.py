"""Infer the labels of a whole batch from its gradient."""

from leakage.labels.auxiliary import Auxiliary
from leakage.labels.correction import CorrectedLabels, correct_labels
from leakage.labels.counts import LabelCounts
from leakage.labels.inference import LabelReader, infer_labels
from leakage.labels.rules import NEEDS, RULES
from leakage.labels.soft import infer_soft_labels

__all__ = [
    "NEEDS",
    "RULES",
    "Auxiliary",
    "CorrectedLabels",
    "LabelCounts",
    "LabelReader",
    "correct_labels",
    "infer_labels",
    "infer_soft_labels",
]
