"""Settings of every test: no window, no account, no network, one thread, the same examples in every run."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch starts its threads; processes that tests start have it too. Tensors are tiny, and two processes with one
# thread each do more than one with two. A test that is about threads asks for them itself.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# What a shell runs in the background ignores Ctrl-C, and so would the runs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "leakage",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("leakage")

# Rooms and modules that are slow as a whole; single tests are marked where they are.
SLOW = [
    "inversion/test_processes.py",
    "experiments/test_attack_speed.py",
    "experiments/test_benchmarks.py",
    "experiments/test_comparing.py",
    "experiments/test_condensation_speed.py",
    "experiments/test_evaluation_speed.py",
    "experiments/test_inversion_speed.py",
    "experiments/test_reconstruction_batches.py",
    "experiments/test_second_order.py",
    "experiments/test_soak.py",
    "fuzz",
]
TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    gone = [name for name in SLOW if not (TESTS / name).exists()]
    if gone:
        raise pytest.UsageError(f"Expected `SLOW` in {__file__} with files and folders beside it, but got {gone}.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    unstable = [item.nodeid for item in items if re.search(" at 0x[0-9A-Fa-f]{6}", item.nodeid)]
    if unstable:
        raise pytest.UsageError(f"Expected `ids` of parameters that are the same in every process, but got {unstable}.")
    slow = {TESTS / name for name in SLOW}
    for item in items:
        if slow & {item.path, *item.path.parents}:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random numbers whatever ran before, also where a test draws them without a generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _packages_stay_what_they_are() -> Iterator[None]:
    """Every Trainer asks all installed packages for callbacks, which takes a tenth of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        found = functools.cache(importlib.metadata.entry_points)
        patch.setattr("lightning.fabric.utilities.registry.entry_points", found)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers of the test's own."""
    return torch.Generator().manual_seed(0)
