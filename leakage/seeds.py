"""Seeds that are derived from one seed, so that every purpose has a stream of its own."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, index: int, stream: str) -> int:
    """A seed of its own for one purpose and one index, such as a victim's number or an iteration.

    Example:
        >>> derive_seed(0, 7, "weights") == derive_seed(0, 7, "weights") != derive_seed(0, 7, "start")
        True
    """
    words = [int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big"), index]
    return int(np.random.SeedSequence(seed, spawn_key=words).generate_state(1, np.uint64)[0] >> np.uint64(1))
