"""Settings of every test: no window, no account, no network, the same examples in every run."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

# Tensors are tiny: more threads would only wait for one another.
torch.set_num_threads(1)

settings.register_profile(
    "leakage",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("leakage")


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers of the test's own."""
    return torch.Generator().manual_seed(0)
