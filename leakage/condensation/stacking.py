"""Networks of one architecture, trained as ordinary modules or stacked into one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from leakage.models.draw import state_of


class SingleNetwork:
    """One network, an ordinary module, which processes ``piece`` images of a batch at a time."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], device: torch.device, piece: int | None) -> None:
        self.model = copy.deepcopy(model).to(device).requires_grad_()
        self.model.load_state_dict(state, strict=False)  # of tied weights the state has only the first
        self.piece = piece

    def __len__(self) -> int:
        return 1

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of weights and buffers, each ``(1, *shape)``."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            yield name, tensor.detach()[None]

    def parameters(self) -> list[Tensor]:
        """Return the parameters for an optimizer."""
        return list(self.model.parameters())

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add the gradient of the mean loss of a batch to the parameters, and return the loss ``(1,)``."""
        self.model.train()
        if images.ndim == 5:
            images, labels = images[0], labels[0]
        piece = self.piece or len(images)
        total = torch.zeros((), device=images.device, dtype=torch.float32)
        for some, their in zip(torch.split(images, piece), torch.split(labels, piece), strict=True):
            loss = F.cross_entropy(self.model(some), their, reduction="sum") / len(images)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total[None]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits ``(1, B, K)`` of images ``(B, C, H, W)``, in evaluation mode."""
        self.model.eval()
        logits: Tensor = self.model(images)
        return logits[None]


class StackedNetworks:
    """R networks stacked into one: every weight is a stack ``(R, *shape)``, and one call computes all networks."""

    def __init__(self, model: nn.Module, states: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        self.model = copy.deepcopy(model).to(device)
        self.tensors = {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}
        self.trainable = [name for name, _ in self.model.named_parameters()]
        for tensor in self.parameters():
            tensor.requires_grad_()

    def __len__(self) -> int:
        return len(self.tensors[self.trainable[0]])

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of weights and buffers, each ``(R, *shape)``."""
        for name, tensor in self.tensors.items():
            yield name, tensor.detach()

    def parameters(self) -> list[Tensor]:
        """Return the parameters for an optimizer, whose steps must be elementwise so that networks don't mix."""
        return [self.tensors[name] for name in self.trainable]

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add the gradient of each network's mean loss to the parameters, and return the losses ``(R,)``.

        Images are ``(B, C, H, W)`` with labels ``(B,)``, for all networks, or ``(R, B, C, H, W)`` with labels
        ``(R, B)``.
        """
        self.model.train()

        def loss(tensors: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.model, tensors, (images,)), labels)

        own = 0 if images.ndim == 5 else None
        losses: Tensor = vmap(loss, in_dims=(0, own, own))(self.tensors, images, labels)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits ``(R, B, K)`` of images ``(B, C, H, W)``, in evaluation mode."""
        self.model.eval()
        call = vmap(lambda tensors, images: functional_call(self.model, tensors, (images,)), in_dims=(0, None))
        logits: Tensor = call(self.tensors, images)
        return logits


def stacking_error(model: nn.Module, image_shape: Sequence[int], device: torch.device) -> str | None:
    """Return why ``torch.func`` can't train several of these networks at once, or None if it can."""
    probe = copy.deepcopy(model).to(device).train()
    stack = {name: torch.stack([tensor, tensor]) for name, tensor in state_of(probe).items()}
    images = torch.zeros(2, *image_shape, device=device, dtype=torch.float32)
    try:
        with torch.no_grad():
            vmap(lambda tensors: functional_call(probe, tensors, (images,)))(stack)
    except (RuntimeError, ValueError) as error:
        return str(error).split("\n")[0]
    return None


def works_image_by_image(model: nn.Module, image_shape: Sequence[int]) -> bool:
    """Return whether the logits of an image in training are independent of the rest of the batch (no BatchNorm)."""
    probe = copy.deepcopy(model).cpu().train()
    images = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with torch.no_grad():
        together, apart = probe(images), torch.cat([probe(pair) for pair in torch.split(images, 2)])
    return torch.allclose(together, apart, rtol=1e-3, atol=1e-5)
