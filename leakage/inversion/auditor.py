"""The only part of an attack that sees the ground truth: after the search, never for it."""

from __future__ import annotations

import torch

from leakage.datamodules.base import GroundTruth
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import VictimScore, score


class Auditor:
    """Scores reconstructions against the truth, each finished victim once and those still running again and again.

    Attributes:
        scores: by victim id.

    Args:
        threshold: an image counts as reconstructed if its MSE is below this.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.scores: dict[int, VictimScore] = {}
        self.release()

    def take(self, finished: Reconstruction, running: Reconstruction) -> None:
        """Take the reconstructions as they are now, for the comparisons until :meth:`release`."""
        self._taken = Reconstruction.cat([finished, running])
        self._finished = set(finished.ids.tolist())

    def release(self) -> None:
        """Let go of what was taken."""
        self._taken, self._finished = Reconstruction.empty(), set[int]()

    def is_final(self, victim: int) -> bool:
        """Whether the victim's score is that of its finished reconstruction."""
        return victim in self.scores and self.scores[victim].final

    def compare(self, truth: GroundTruth) -> None:
        """Score those of the victims that were taken and have no final score yet."""
        places = {victim: place for place, victim in enumerate(self._taken.ids.tolist()) if not self.is_final(victim)}
        rows = [row for row, victim in enumerate(truth.ids.tolist()) if victim in places]
        if not rows:
            return
        victims = truth.ids[rows].tolist()
        guess = self._taken.select(torch.tensor([places[victim] for victim in victims]))
        images, labels = truth.images[rows], truth.labels[rows]
        scores = score(guess.images.to(images), guess.labels.to(labels.device), images, labels)
        for victim, result in zip(victims, scores.per_victim(threshold=self.threshold), strict=True):
            result.final = victim in self._finished
            self.scores[victim] = result
