"""The scripts of ``experiments/``, which are not part of the package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# As for a script that is run; none of their modules goes by the name of another.
sys.path += [str(EXPERIMENTS / folder) for folder in ("comparison", "condensation")]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiments_{Path(path).stem}", EXPERIMENTS / path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look for it
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="session")
def table1() -> ModuleType:
    return load("idlg/table1.py")


@pytest.fixture(scope="session")
def speed() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "benchmarks")  # as for a script that is run
        yield load("benchmarks/attack_speed.py")


@pytest.fixture(scope="session")
def inverting() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "inverting_gradients")
        yield load("inverting_gradients/table.py")


def of_defenses(script: str) -> Iterator[ModuleType]:
    """A script that imports from its own folder and from that of the attacks."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("defenses", "inverting_gradients"):
            patch.syspath_prepend(EXPERIMENTS / folder)
        yield load(f"defenses/{script}")


@pytest.fixture(scope="session")
def tradeoff() -> Iterator[ModuleType]:
    yield from of_defenses("tradeoff.py")


@pytest.fixture(scope="session")
def dp_bound() -> Iterator[ModuleType]:
    yield from of_defenses("dp_bound.py")


@pytest.fixture(scope="session")
def instahide() -> Iterator[ModuleType]:
    yield from of_defenses("instahide.py")


@pytest.fixture(scope="session")
def signs() -> Iterator[ModuleType]:
    yield from of_defenses("signs.py")
