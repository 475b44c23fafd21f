"""ATS: a client trains on images that are changed by a policy of transformations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leakage.defenses.base import Defense
from leakage.defenses.encoding import Encoding

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.victim import Victim

# Transformations of one image by torchvision's functions, with a size, whose sign is drawn; and those without a size.
_SIZED: dict[str, Callable[[Any, Tensor, float], Any]] = {
    "rotate": lambda ops, image, size: ops.rotate(image, size),
    "shear_x": lambda ops, image, size: ops.affine(image, 0, [0, 0], 1, [math.degrees(math.atan(size)), 0]),
    "shear_y": lambda ops, image, size: ops.affine(image, 0, [0, 0], 1, [0, math.degrees(math.atan(size))]),
    "translate_x": lambda ops, image, size: ops.affine(image, 0, [round(size * image.shape[-1]), 0], 1, [0, 0]),
    "translate_y": lambda ops, image, size: ops.affine(image, 0, [0, round(size * image.shape[-2])], 1, [0, 0]),
    "brightness": lambda ops, image, size: ops.adjust_brightness(image, 1 + size),
    "color": lambda ops, image, size: ops.adjust_saturation(image, 1 + size),
    "contrast": lambda ops, image, size: ops.adjust_contrast(image, 1 + size),
    "sharpness": lambda ops, image, size: ops.adjust_sharpness(image, 1 + size),
}
_PLAIN: dict[str, Callable[[Any, Tensor], Any]] = {
    "autocontrast": lambda ops, image: ops.autocontrast(image),
    "equalize": lambda ops, image: ops.equalize(image),
    "invert": lambda ops, image: ops.invert(image),
}
_EXAMPLE = "such as 'translate_x 0.45, invert'"


class ATS(Encoding):
    r"""Changes each image by a policy of transformations, which is drawn from a few (automatic transformation search).

    A policy is a text of transformations that follow one another, each with a size: ``"translate_x 0.45, contrast
    0.33"``. The sign of every size is drawn for each image. Sizes are degrees (``rotate``), shares of width or height
    (``translate_x``, ``translate_y``), slopes (``shear_x``, ``shear_y``) and relative changes (``brightness``,
    ``color``, ``contrast``, ``sharpness``). ``autocontrast``, ``equalize`` and ``invert`` have no size. The default is
    the hybrid policy that the paper found for ResNet-20 and CIFAR-100, 3-1-7+43-18-18. The search itself is not part of
    this class.

    An attacker who knows the defense does nothing else: it searches for the changed images, from which people and
    models recognise most of what the originals show. Scores compare its result with the *original* images, so a shift
    counts as an error; :func:`leakage.defenses.encoded` returns the changed images, for scores against these.

    Args:
        policies: one policy or several, of which one is drawn for each image.

    Raises:
        ValueError: a policy has an unknown transformation or a size out of its range, or the images are neither grey
            nor RGB.

    References:
        Gao et al., *Privacy-preserving Collaborative Learning with Automatic Transformation Search*, CVPR 2021,
        https://arxiv.org/abs/2011.12505; broken: Balunović et al., *Bayesian Framework for Gradient Leakage*, ICLR
        2022, https://arxiv.org/abs/2111.04706.

    Example:
        >>> changed, _ = ATS(["invert"]).encode(torch.full((1, 1, 8, 8), 0.25), torch.ones(1, 1), torch.Generator())
        >>> changed.unique()
        tensor([0.7500])
    """

    def __init__(
        self,
        policies: str | Sequence[str] = (
            "translate_x 0.453, contrast 0.333, translate_y 0.101",
            "translate_y 0.151, contrast 0.389, contrast 0.389",
        ),
    ) -> None:
        self.policies = [policies] if isinstance(policies, str) else list(policies)
        self._steps = [_read(policy) for policy in self.policies]
        if not self._steps:
            raise ValueError(f"Expected `policies` {_EXAMPLE}, but got none.")

    def check(self, victim: Victim, defenses: Sequence[Defense]) -> None:
        """Raise a ``ValueError`` unless images are grey or RGB, as torchvision's transformations need them."""
        if victim.protocol.image_shape[0] not in (1, 3):
            raise ValueError(f"Expected images with 1 or 3 channels for ATS, but got {victim.protocol.image_shape[0]}.")

    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the changed images and the same class probabilities."""
        from torchvision.transforms.v2 import functional as ops  # slow to import, and every client imports this file

        changed = []
        for image in images:
            policy = self._steps[int(torch.randint(len(self._steps), (), generator=generator))]
            for name, size in policy:
                if size is None:
                    image = _PLAIN[name](ops, image)
                else:
                    sign = 2 * int(torch.randint(2, (), generator=generator)) - 1
                    image = _SIZED[name](ops, image, sign * size)
            changed.append(image)
        return torch.stack(changed), targets


def _read(policy: object) -> list[tuple[str, float | None]]:
    """Return the transformations of a policy, each with its size if it has one."""
    steps = []
    for step in policy.split(",") if isinstance(policy, str) else [""]:
        found = re.fullmatch(r"\s*(\w+)(?: +(\d*\.?\d+))?\s*", step)
        name, size = found.groups() if found else ("", None)
        largest = 180 if name == "rotate" else 1
        if not (name in _PLAIN and size is None) and not (name in _SIZED and size and 0 < float(size) <= largest):
            raise ValueError(
                f"Expected `policies` {_EXAMPLE}, made of {sorted(_PLAIN)}, and of {sorted(_SIZED)} with a size above "
                f"0 and at most 1 (`rotate`: 180 degrees), but got {policy!r}."
            )
        steps.append((name, None if size is None else float(size)))
    return steps
