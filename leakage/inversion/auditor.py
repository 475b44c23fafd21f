"""The auditor: the only part that sees the ground truth, which the search never uses."""

from __future__ import annotations

import torch

from leakage.datamodules.base import GroundTruth
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import VictimScore, score


class Auditor:
    """Score reconstructions against the ground truth: finished victims once, running victims repeatedly.

    Attributes:
        scores: the score of each victim, by victim id.

    Args:
        threshold: an image counts as reconstructed if its MSE is below this value.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.scores: dict[int, VictimScore] = {}
        self.release()

    def take(self, finished: Reconstruction, running: Reconstruction) -> None:
        """Store the current reconstructions, for comparisons until :meth:`release`."""
        self._taken = Reconstruction.cat([finished, running])
        self._finished = set(finished.ids.tolist())

    def release(self) -> None:
        """Discard the stored reconstructions."""
        self._taken, self._finished = Reconstruction.empty(), set[int]()

    def is_final(self, victim: int) -> bool:
        """Return whether the victim's score is that of its finished reconstruction."""
        return victim in self.scores and self.scores[victim].final

    def compare(self, truth: GroundTruth) -> None:
        """Score the stored victims that have no final score yet."""
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
