from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from leakage.inversion.memory import free_memory

CPU = torch.device("cpu")


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of a container by their endings; those that are missing can't be read."""
    files: dict[str, str] = {}

    def read(path: Path, encoding: str) -> str:
        if path.suffix not in files:
            raise FileNotFoundError(path)
        return files[path.suffix]

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    return files


def test_a_machine_has_memory() -> None:
    assert 2**20 < free_memory(CPU) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 1000),
        ({".max": "max\n", ".current": "300\n"}, 1000),
        ({".max": "900\n", ".current": "300\n"}, 600),
        ({".max": "9000\n", ".current": "300\n"}, 1000),
    ],
)
def test_a_container_may_allow_less(cgroup: dict[str, str], files: dict[str, str], free: int) -> None:
    cgroup.update(files)
    assert free_memory(CPU) == free
