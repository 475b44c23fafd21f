"""The base class of defenses that change a client's images before the gradient is computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from leakage.defenses.base import Defense, Gradients
from leakage.seeds import derive_seed


class Encoding(Defense):
    """A defense that changes the client's images and labels before it computes a gradient.

    It does so once, before all local steps. To write your own, implement :meth:`encode`. Attacks search for the encoded
    images, unless the encoding ``mixes``.

    Attributes:
        mixes: whether each encoded image and label is a weighted mean of the client's images and labels. Attacks then
            search for the images and the weights (:class:`leakage.dummies.Mixture`).
    """

    averages_out = True
    keeps_zeros = True
    mixes: bool = False

    @abstractmethod
    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the images and class probabilities with which a client replaces its own.

        Args:
            images: images of one client, ``(N, C, H, W)``.
            targets: class probabilities of one client, ``(N, K)``.
            generator: a CPU generator, as for :meth:`Defense.__call__`.

        Returns:
            Images and class probabilities of the same shapes.
        """

    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradients unchanged."""
        return dict(gradients)


def encoded(
    defenses: Sequence[Defense], images: Tensor, targets: Tensor, ids: Sequence[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Return what V clients compute their gradients on: their images and class probabilities after all encodings.

    Scores compare reconstructions with the original images. An auditor who also compares them with the encoded images
    gets these here, from the ``seed`` that was passed to :meth:`leakage.Victim.share`.

    Args:
        defenses: the defenses of the clients.
        images: ``(V, N, C, H, W)``, values in [0, 1].
        targets: class probabilities ``(V, N, K)``.
        ids: the victims' ids.
        seed: the seed of the draws; the seed of :class:`leakage.datamodules.Victims`, for its victims.

    Returns:
        Images and class probabilities of the same shapes.

    Raises:
        ValueError: an encoding returns other shapes.

    Example:
        >>> from leakage.defenses import ATS, Clip
        >>> images, targets = torch.rand(1, 2, 1, 8, 8), torch.ones(1, 2, 1)
        >>> changed, _ = encoded([ATS("invert"), Clip(1.0)], images, targets, ids=[0], seed=0)
        >>> torch.equal(changed, 1 - images)
        True
    """
    encodings = [(place, each) for place, each in enumerate(defenses) if isinstance(each, Encoding)]
    if not encodings or not len(images):
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
