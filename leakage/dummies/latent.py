"""Images that a generator makes from latent codes, optionally with a search for its weights."""

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
    r"""Dummy images that a generator makes from latent codes, so that only images in its range can be found.

    .. math:: x_n = G_{w + \tau u}(z_n)

    There is one code :math:`z_n` for each of the N images. GGL searches for codes alone (:math:`\tau = 0`, the
    default). GIAS then also searches for the generator's weights, together with the codes. Here each victim has its own
    copy of the weights, which starts at the given weights (u = 0). A solver that moves each unknown by its learning
    rate, as Adam does, moves weights by :math:`\tau` times that.

    Args:
        generator: any module that makes images ``(N, C, H, W)`` from codes ``(N, *code_shape)``, or the path of a file
            saved by :meth:`leakage.models.Generator.save`. It is copied, put into evaluation mode, and never changed.
        code_shape: shape of the code of one image, such as ``[64]``; not needed for a
            :class:`~leakage.models.Generator`.
        std: standard deviation of the normally distributed start; use that of the codes in training, usually 1.
        tuning: :math:`\tau`; with 0 the generator's weights stay fixed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: ``generator`` is not a module, the file holds something else, a shape or number is out of range, or
            ``tuning`` is used with a generator without weights; in ``fit``, the generator does not accept such codes,
            makes images of another shape than the victims', or can't be run by ``torch.func.vmap``.

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
        """Return ``(N, *code_shape)``; with ``tuning`` a single dimension for all codes followed by all weights."""
        codes = (protocol.num_images, *self.code_shape)
        return (math.prod(codes) + sum(self._sizes),) if self.tuning else codes

    def write(self, unknown: Tensor | None, kept: State) -> Tensor:
        """Return the generator's images."""
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
        """Return noise of the same standard deviation for every restart, and zero changes of the weights."""
        starts = self.std * noise
        if self.tuning:
            starts[:, -sum(self._sizes) :] = 0
        return starts

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if the generator does not make images of the victims' shape from such codes."""
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
                f"Expected `generator` to accept codes of shape {codes} and to be a function of them "
                f"alone that `torch.func.vmap` can run, but got: {error}"
            ) from error
        if found != expected:
            raise ValueError(f"Expected `generator` to make images of the victims' shape {expected}, but got {found}.")
