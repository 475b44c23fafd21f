"""Scores of reconstructions (matched one-to-one) and of labels, per image and over victims with intervals."""

from leakage.metrics.baselines import baseline_guesses, below_baseline, identified
from leakage.metrics.estimates import (
    Estimate,
    MeanOverVictims,
    ShareOverVictims,
    mean_interval,
    wilson_interval,
)
from leakage.metrics.labels import LabelMetrics, LabelScore, score_labels, trivial_score
from leakage.metrics.matching import match
from leakage.metrics.perceptual import perceptual_distance
from leakage.metrics.scores import PSNR_LIMIT, SUCCESS_THRESHOLD, ReconstructionMetrics, Scores, VictimScore, score

__all__ = [
    "PSNR_LIMIT",
    "SUCCESS_THRESHOLD",
    "Estimate",
    "LabelMetrics",
    "LabelScore",
    "MeanOverVictims",
    "ReconstructionMetrics",
    "Scores",
    "ShareOverVictims",
    "VictimScore",
    "baseline_guesses",
    "below_baseline",
    "identified",
    "match",
    "mean_interval",
    "perceptual_distance",
    "score",
    "score_labels",
    "trivial_score",
    "wilson_interval",
]
