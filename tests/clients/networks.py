"""Small networks, private images, and one client at a time by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SHAPE = (2, 6, 5)
CLASSES = 4
KINDS = ("linear", "mlp", "conv", "batch_norm", "group_norm")


def network(kind: str, *, bias: bool, classes: int = CLASSES) -> nn.Module:
    """A small classifier of ``IMAGE_SHAPE``."""
    channels, height, width = IMAGE_SHAPE
    layers: dict[str, Callable[[], list[nn.Module]]] = {
        "linear": lambda: [nn.Flatten(), nn.Linear(channels * height * width, classes, bias=bias)],
        "mlp": lambda: [
            nn.Flatten(),
            nn.Linear(channels * height * width, 7, bias=bias),
            nn.Tanh(),
            nn.Linear(7, classes, bias=bias),
        ],
        "conv": lambda: [
            nn.Conv2d(channels, 3, 3, stride=2, bias=bias),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, classes, bias=bias),
        ],
        "batch_norm": lambda: [
            nn.Conv2d(channels, 3, 3, padding=1, bias=bias),
            nn.BatchNorm2d(3, affine=bias),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, classes, bias=bias),
        ],
        "group_norm": lambda: [
            nn.Conv2d(channels, 4, 3, bias=bias),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, classes, bias=bias),
        ],
    }
    return nn.Sequential(*layers[kind]()).eval().double()


def private(victims: int, num_images: int = 1, seed: int = 0, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Images ``(V, N, *IMAGE_SHAPE)`` in double precision and labels ``(V, N)``."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(victims, num_images, *IMAGE_SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(classes, (victims, num_images), generator=generator)


def one_at_a_time(
    model: nn.Module, state: dict[str, Tensor], images: Tensor, labels: Tensor, loss: str, reduction: str
) -> dict[str, Tensor]:
    """The slow reference: one victim, one model, torch's own losses, plain autograd."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    logits = model(images)
    if loss == "cross_entropy":
        value = F.cross_entropy(logits, labels, reduction=reduction)
    else:
        squares = (logits - F.one_hot(labels, logits.shape[1])).square().mean(1)
        value = squares.mean() if reduction == "mean" else squares.sum()
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


def everything(model: nn.Module) -> dict[str, object]:
    """All that somebody could leave behind on a model."""
    hooks = [name for name in vars(model) if name.endswith("hooks")]
    assert "_forward_hooks" in hooks
    return {
        "hooks": [[list(getattr(module, hook) or ()) for hook in hooks] for module in model.modules()],
        "mode": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if tensor.grad is None else tensor.grad.tolist() for tensor in model.parameters()],
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "parameters": [id(parameter) for parameter in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


class LogSoftmaxAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(60, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1)).log_softmax(1)
