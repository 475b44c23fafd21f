"""Images that a generator makes of a code."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import vmap

from leakage.clients.protocol import Protocol
from leakage.dummies.dummy import Images, Target
from leakage.errors import check_count, check_positive
from leakage.pieces import State


class LatentCode(Images):
    r"""Dummy images are what a frozen generator makes of a code: only images that it knows can come out.

    .. math:: x_n = G(z_n)

    with one code :math:`z_n` for each of the N images. This is how GIAS and GGL write images.

    Args:
        generator: any module that makes images ``(N, C, H, W)`` of codes ``(N, *code_shape)``. It is copied, put
            into evaluation mode, and never trained.
        code_shape: of the code of one image, such as ``[64]``.
        std: of the normally distributed start. The generator expects what it was trained on, mostly 1.

    Raises:
        ValueError: no module, a shape or ``std`` out of range; in ``fit``, a generator that does not take such codes,
            makes other images than the victims', or can't be run by ``torch.func.vmap``.

    References:
        Jeon et al., *Gradient Inversion with Generative Image Prior* (GIAS), NeurIPS 2021,
        https://arxiv.org/abs/2110.14962; Li et al., *Auditing Privacy Defenses in Federated Learning via Generative
        Gradient Leakage* (GGL), CVPR 2022, https://arxiv.org/abs/2203.15696.

    Example:
        >>> generator = nn.Sequential(nn.Linear(16, 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)))
        >>> LatentCode(generator, [16]).write(torch.randn(2, 16), {}).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, generator: nn.Module, code_shape: Sequence[int], std: float = 1.0) -> None:
        if not isinstance(generator, nn.Module):
            raise ValueError(f"Expected `generator` to be a torch.nn.Module, but got {type(generator).__name__}.")
        if not isinstance(code_shape, list | tuple):
            raise ValueError(f"Expected `code_shape` as a list of sizes such as [64], but got {code_shape!r}.")
        for size in code_shape:
            check_count(code_shape=size)
        check_positive(std=std)
        self.generator = copy.deepcopy(generator).eval().requires_grad_(False)
        self.code_shape, self.std = tuple(code_shape), std

    def shape(self, protocol: Protocol) -> tuple[int, ...]:
        """``(N, *code_shape)``."""
        return (protocol.num_images, *self.code_shape)

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """The generator's images."""
        images: Tensor = self.generator(unknown)
        return images

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Noise, as wide for every restart."""
        return self.std * noise

    def check(self, target: Target) -> None:
        """The generator must make the victims' images of such codes."""
        protocol = target.victim.protocol
        codes = torch.zeros(2, *self.shape(protocol))
        like = next(self.generator.parameters(), codes)
        expected = (protocol.num_images, *protocol.image_shape)
        try:
            with torch.no_grad():
                found = tuple(vmap(self.generator)(codes.to(like)).shape[1:])
        except Exception as error:
            raise ValueError(
                f"Expected `generator` to take codes of shape {self.shape(protocol)} and to be a function of them "
                f"alone that `torch.func.vmap` can run, but got: {error}"
            ) from error
        if found != expected:
            raise ValueError(f"Expected `generator` to make the victims' images {expected}, but got {found}.")
