"""Seconds per victim: iDLG of this library against a plain loop of the published protocol, on the same victims.

    python experiments/benchmarks/attack_speed.py --output speed.json

The plain side is what the papers' readers run: one victim at a time, ordinary autograd, `torch.optim.LBFGS` without
line search, from N(0, 1), at most 300 calls of 20 iterations, stopped when the gradient distance, looked at every 10
calls, is below 1e-6. Ours is `IDLGAttack` with its default settings in `Trainer.fit`. Victims and networks (a
freshly drawn LeNet for each victim) are the same; the plain side takes the first `--plain-victims` of ours.

Each side runs with the number of threads that a short probe finds best for it (1, or all cores). What is timed on
both sides is from the shared gradients to the reconstructions; capturing them is on neither side's clock.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakage.attacks import IDLGAttack
from leakage.cli import quiet
from leakage.datamodules import GroundTruth, MNISTVictims, SampleVictims, VictimDataModule
from leakage.metrics import score, wilson_interval
from leakage.shared_gradient import SharedGradient

CALLS, ITERATIONS, CHECK_EVERY, TOLERANCE = 300, 20, 10, 1e-6
SUCCESS = 1e-3
PROBE_VICTIMS, PROBE_PLAIN_VICTIMS = 64, 2


@dataclass
class Side:
    """What one side did.

    Attributes:
        seconds: of all victims.
        victims: how many.
        threads: of torch.
        evaluations: of the objective and its gradient, mean over victims.
        images: ``(V, 1, C, H, W)``, in the order of ``ids``.
        labels: ``(V, 1)``.
        ids: ``(V,)``.
    """

    seconds: float
    victims: int
    threads: int
    evaluations: float
    images: Tensor
    labels: Tensor
    ids: Tensor


class FitClock(Callback):
    """Seconds in the training loop less those in which cohorts were captured."""

    def __init__(self, victims: VictimDataModule) -> None:
        self.seconds = 0.0
        self._capturing = 0.0
        self._share = victims.share

    def share(self, first: int, last: int) -> SharedGradient:
        """`victims.share`, timed."""
        started = time.perf_counter()
        shared = self._share(first, last)
        self._capturing += time.perf_counter() - started
        return shared

    def on_train_start(self, *_: Any) -> None:
        """Start the clock; what was captured before is not on it."""
        self._capturing, self._started = 0.0, time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        """Stop it when all victims are done."""
        self.seconds = time.perf_counter() - self._started - self._capturing


def attack_plainly(model: nn.Module, state: dict[str, Tensor], shared: dict[str, Tensor], seed: int) -> tuple[Any, ...]:
    """One victim, as published: image ``(1, C, H, W)``, label and number of evaluations."""
    weights = [state[name].detach().requires_grad_() for name in shared]
    named = dict(zip(shared, weights, strict=True))
    targets = list(shared.values())
    # The row of the last weight gradient with the negative sum is the label.
    label = targets[-2].sum(dim=1).argmin().reshape(1)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, *model.input_shape, generator=generator).requires_grad_()  # type: ignore[arg-type]
    optimizer = torch.optim.LBFGS([image], lr=1.0, max_iter=ITERATIONS, history_size=100)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(functional_call(model, named, image), label)
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        distance = sum(
            ((gradient - target) ** 2).sum() for gradient, target in zip(gradients, targets, strict=True)
        )
        # Only the image's gradient: `backward` would also compute that of the weights.
        image.grad = torch.autograd.grad(distance, image)[0]
        return distance

    for call in range(CALLS):
        distance = optimizer.step(closure)
        # `step` gives the distance before its first iteration, so the check costs nothing.
        if call % CHECK_EVERY == 0 and float(distance) < TOLERANCE:
            break
    return image.detach(), label, evaluations
