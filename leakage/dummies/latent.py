"""Images that a generator makes of a code, and maybe of weights that are searched for too."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from leakage.clients.protocol import Protocol
from leakage.dummies.dummy import Images, Target
from leakage.errors import check_count, check_not_negative, check_positive
from leakage.models import Generator
from leakage.pieces import State


class LatentCode(Images):
    r"""Dummy images are what a generator makes of a code: only images that it knows can come out.

    .. math:: x_n = G_{w + \tau u}(z_n)

    with one code :math:`z_n` for each of the N images. GGL searches for codes alone (:math:`\tau = 0`, the default);
    then GIAS goes on with the generator's weights, which are each victim's own here, begin at those that were given
    (u = 0), and are searched for together with the codes. A solver that moves each unknown by its learning rate, as
    Adam does, moves weights by :math:`\tau` times that.

    Args:
        generator: any module that makes images ``(N, C, H, W)`` of codes ``(N, *code_shape)``, or the path of a file
            of :meth:`leakage.models.Generator.save`. It is copied, put into evaluation mode, and never changed.
        code_shape: of the code of one image, such as ``[64]``; a :class:`~leakage.models.Generator` tells it by itself.
        std: of the normally distributed start. The generator expects what it was trained on, mostly 1.
        tuning: :math:`\tau`; 0 leaves the generator as it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no module, a file of something else, a shape or number out of range, ``tuning`` of a generator
            without weights; in ``fit``, a generator that does not take such codes, makes other images than the
            victims', or can't be run by ``torch.func.vmap``.

    References:
        Jeon et al., *Gradient Inversion with Generative Image Prior* (GIAS), NeurIPS 2021,
        https://arxiv.org/abs/2110.14962; Li et al., *Auditing Privacy Defenses in Federated Learning via Generative
        Gradient Leakage* (GGL), CVPR 2022, https://arxiv.org/abs/2203.15696.

    Example:
        >>> generator = nn.Sequential(nn.Linear(16, 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)))
        >>> LatentCode(generator, [16]).write(torch.randn(2, 16), {}).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        generator: nn.Module | str | os.PathLike[str],
        code_shape: Sequence[int] | None = None,
        std: float = 1.0,
        tuning: float = 0.0,
    ) -> None:
        if isinstance(generator, str | os.PathLike):
            generator = Generator.load(generator)
        if not isinstance(generator, nn.Module):
            raise ValueError(
                f"Expected `generator` to be a torch.nn.Module or a path, but got {type(generator).__name__}."
            )
        if code_shape is None and isinstance(generator, Generator):
            code_shape = [generator.code_size]
        if not isinstance(code_shape, list | tuple):
            raise ValueError(f"Expected `code_shape` as a list of sizes such as [64], but got {code_shape!r}.")
        for size in code_shape:
            check_count(code_shape=size)
        check_positive(std=std)
        check_not_negative(tuning=tuning)
        self.generator = copy.deepcopy(generator).eval().requires_grad_(False)
        self.code_shape, self.std, self.tuning = tuple(code_shape), std, tuning
        self._sizes = [weight.numel() for weight in self.generator.parameters()] if tuning else []
        if tuning and not self._sizes:
            raise ValueError(f"Expected `generator` with weights for tuning={tuning!r}, but got none.")

    def shape(self, protocol: Protocol) -> tuple[int, ...]:
        """``(N, *code_shape)``; with ``tuning`` a single dimension, all codes and then all weights."""
        codes = (protocol.num_images, *self.code_shape)
        return (math.prod(codes) + sum(self._sizes),) if self.tuning else codes

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """The generator's images."""
        assert unknown is not None
        images: Tensor
        if not self.tuning:
            images = self.generator(unknown)
            return images
        codes, *moves = torch.split(unknown, [len(unknown) - sum(self._sizes), *self._sizes])
        weights = {
            name: weight + self.tuning * move.view_as(weight)
            for (name, weight), move in zip(self.generator.named_parameters(), moves, strict=True)
        }
        images = functional_call(self.generator, weights, codes.view(-1, *self.code_shape))
        return images

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        """Noise, as wide for every restart; weights as they were given."""
        starts = self.std * noise
        if self.tuning:
            starts[:, -sum(self._sizes) :] = 0
        return starts

    def check(self, target: Target) -> None:
        """The generator must make the victims' images of such codes."""
        protocol = target.victim.protocol
        codes = (protocol.num_images, *self.code_shape)
        unknowns = torch.zeros(2, *self.shape(protocol))
        like = next(self.generator.parameters(), unknowns)
        expected = (protocol.num_images, *protocol.image_shape)
        try:
            with torch.no_grad():
                found = tuple(vmap(self.write, in_dims=(0, None))(unknowns.to(like), {}).shape[1:])
        except Exception as error:
            raise ValueError(
                f"Expected `generator` to take codes of shape {codes} and to be a function of them "
                f"alone that `torch.func.vmap` can run, but got: {error}"
            ) from error
        if found != expected:
            raise ValueError(f"Expected `generator` to make the victims' images {expected}, but got {found}.")
