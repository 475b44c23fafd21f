"""The scripts of ``experiments/robustness``, whose properties are tried here on few inputs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

ROBUSTNESS = Path(__file__).parents[2] / "experiments" / "robustness"
NAMES = ("common", "tensor_files", "configs", "image_folders")


@pytest.fixture(scope="session")
def fuzz() -> Iterator[SimpleNamespace]:
    """Its modules by name; ``script`` is the one that is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROBUSTNESS)  # as for a script that is run
        modules = {name: importlib.import_module(f"fuzz_{name}") for name in NAMES}
        yield SimpleNamespace(**modules, script=importlib.import_module("fuzz"))
        for name in ("fuzz", *(f"fuzz_{name}" for name in NAMES)):
            sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="session")
def marker(folder: Path) -> Path:
    """What the code within the inputs would make."""
    return folder / "marker"
