"""The command line: ``leakage demo``, ``audit``, ``fit`` and ``evaluate``, one file for each."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence Lightning's hints, which are about training, not about attacks."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
