"""What a client does to its images, before there is a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients
from leakage.seeds import derive_seed


class Encoding(Defense):
    """What a client does to its images and labels before it computes a gradient of them, once for all local steps.

    One of your own has :meth:`encode`. Attacks search for what the client computed with, unless it ``mixes``.

    Attributes:
        mixes: whether each of what comes out is a weighted mean of images and labels, which attacks then search for
            together with the weights: :class:`leakage.dummies.Mixture`.
    """

    averages_out = True
    keeps_zeros = True
    mixes: bool = False

    @abstractmethod
    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What a client computes with in place of its images ``(N, C, H, W)`` and class probabilities ``(N, K)``.

        Args:
            images, targets: of one client; the same shapes are returned.
            generator: see :meth:`Defense.__call__`.
        """

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """The gradients as they are."""
        return dict(gradients)


def encoded(
    defenses: Sequence[Defense], images: Tensor, targets: Tensor, ids: Sequence[int], seed: int
) -> tuple[Tensor, Tensor]:
    """What V clients compute with in place of images ``(V, N, C, H, W)`` and class probabilities ``(V, N, K)``."""
    encodings = [(place, each) for place, each in enumerate(defenses) if isinstance(each, Encoding)]
    if not encodings:
        return images, targets
    pairs = []
    for row, number in enumerate(ids):
        pair = images[row], targets[row]
        for place, encoding in encodings:
            generator = torch.Generator().manual_seed(derive_seed(seed, number, f"encoding {place}"))
            shapes = [part.shape for part in pair]
            pair = encoding.encode(*pair, generator)
            if [part.shape for part in pair] != shapes:
                raise ValueError(
                    f"Expected {type(encoding).__name__} to return images and class probabilities of shapes "
                    f"{[tuple(shape) for shape in shapes]}, but got {[tuple(part.shape) for part in pair]}."
                )
        pairs.append(pair)
    found = tuple(torch.stack(parts) for parts in zip(*pairs, strict=True))
    return found[0], found[1]
