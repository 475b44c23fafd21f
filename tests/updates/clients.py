"""Clients that train by PyTorch's own means, and send what federated systems send."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SHAPE = (1, 12, 12)


def network(*, norm: bool = False, seed: int = 0) -> nn.Module:
    """Small, of ReLUs, with two layers of the same shape, and BatchNorm between them where wanted."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(100, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )


def images(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 12, 12)`` in [0, 1] and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *IMAGE_SHAPE, generator=generator), torch.randint(10, (count,), generator=generator)


def trained(
    model: nn.Module,
    count: int = 1,
    *,
    lr: float = 0.1,
    steps: int = 1,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Any,
) -> nn.Module:
    """The model after some steps of :class:`torch.optim.SGD` on all images."""
    model = copy.deepcopy(model)
    inputs, labels = images(count)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels, reduction=reduction, label_smoothing=label_smoothing).backward()
        optimizer.step()
    return model


def flower_list(model: nn.Module) -> list[NDArray[Any]]:
    """As Flower's examples send a model."""
    return [np.asarray(tensor.numpy()).copy() for tensor in model.state_dict().values()]
