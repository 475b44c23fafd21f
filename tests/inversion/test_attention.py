"""Networks with torch's attention, whose fast kernels have no second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.attacks import GaussNewtonAttack, GradientInversion, IDLGAttack, InvertingGradientsAttack


class Attention(nn.Module):
    """Four tokens of an image of 12x12 pixels, and attention between them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.tokens, self.attention = nn.Linear(36, 16), nn.MultiheadAttention(16, 2, batch_first=True)
            self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images.reshape(len(images), 4, 36))
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        logits: Tensor = self.classifier((tokens + mixed).flatten(1))
        return logits


@pytest.mark.parametrize(
    "attack",
    [
        IDLGAttack(max_evaluations=20, restarts=0),
        InvertingGradientsAttack(steps=20),
        GaussNewtonAttack(max_evaluations=4, restarts=0),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_attacks_go_through_attention(kit: Any, attack: GradientInversion) -> None:
    kit.fit(attack, kit.victims(victims=2, model=Attention(), weights="shared"))
    assert bool((attack.finished.loss < 0.5).all())  # a search that finds nothing ends at 1 or above
    assert bool(attack.finished.images.isfinite().all())
