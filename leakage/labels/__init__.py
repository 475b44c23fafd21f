"""The labels of a whole batch, read off its gradient."""

from leakage.labels.auxiliary import Auxiliary
from leakage.labels.inference import NEEDS, RULES, InferredLabels, check_label_rule, infer_labels

__all__ = ["NEEDS", "RULES", "Auxiliary", "InferredLabels", "check_label_rule", "infer_labels"]
