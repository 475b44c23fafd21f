"""What a module of a network was given and what it made of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Activation(NamedTuple):
    """Inputs and outputs of a module, ``(N, ...)``."""

    inputs: Tensor
    outputs: Tensor
