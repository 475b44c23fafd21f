"""Attacks made of pieces, each with the victims that it is run on, and a client with defenses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leakage.attacks import GradientInversion
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules import Victims
from leakage.defenses import Clip, GaussianNoise, TopK
from leakage.dummies import Group, JointLabels, LatentCode, Pixels
from leakage.models import LeNet
from leakage.objectives import L2, BatchNormStatistics, CosineDistance, Prior, SquaredDistance, TotalVariation
from leakage.solvers import LBFGS, Adam, SignedAdam


class Smooth(Prior):
    """One of a user's own, with a tensor that it keeps."""

    def __init__(self) -> None:
        self.weights = torch.linspace(0, 1, 27)

    def __call__(self, images: Tensor) -> Tensor:
        return (self.weights.to(images) * images.diff(dim=-1).square()).mean()


DEFENSES = [Clip(1.0), GaussianNoise(0.1, relative=True), TopK(0.5)]
FEW = LBFGS(max_evaluations=4)
# Options of the attack and of the victims, by what is tried.
RUNS: dict[str, Any] = {
    "latent code": lambda: (
        {
            "images": LatentCode(nn.Sequential(nn.Linear(5, 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28))), [5]),
            "solver": SignedAdam(steps=4),
        },
        {},
    ),
    "batch norm": lambda: (
        {"objective": SquaredDistance() + 1e-3 * BatchNormStatistics(), "solver": FEW},
        {"model": batch_norm_network()},
    ),
    "group": lambda: (
        {"images": Group(Pixels(std=0.3, box=(0, 1)), seeds=2, weight=0.1), "solver": Adam(steps=4, noise=0.1)},
        {"images": 2},
    ),
    "priors": lambda: (
        {"objective": SquaredDistance() + 0.1 * TotalVariation() + 0.1 * L2() + 0.1 * Smooth(), "solver": FEW},
        {},
    ),
    "joint labels in a box": lambda: (
        {"images": Pixels(box=(0, 1)), "labels": JointLabels(), "solver": FEW},
        {"images": 2},
    ),
    "rate and order of local steps": lambda: (
        {"objective": CosineDistance(), "solver": FEW},
        {
            "images": 2,
            "reveal_labels": True,
            "local_steps": 2,
            "learning_rate": 0.1,
            "reveal_learning_rate": False,
            "local_batch_size": 1,
            "shuffle": True,
        },
    ),
}


def batch_norm_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(507, 10)
    ).eval()


def make(name: str) -> tuple[GradientInversion, Victims]:
    """The same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pieces, options = RUNS[name]()
    return GradientInversion(**pieces), Victims("sample", victims=3, lanes=2, **options)


def share_defended(device: torch.device | str) -> SharedGradient:
    """What clients share whose network and images are there."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(3, 2, 1, 12, 12, generator=generator), torch.tensor([[1, 2], [3, 4], [5, 5]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LeNet(1, 12).double()
    victim = Victim(model, image_shape=(1, 12, 12), num_images=2, defenses=DEFENSES)
    victim.model.to(device)
    return victim.share(images.double().to(device), labels.to(device))
