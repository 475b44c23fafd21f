from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import EXPERIMENTS


@pytest.mark.slow
def test_clients_of_flower_are_captured_and_audited(tmp_path: Path) -> None:
    """The real simulation: one round of four clients."""
    for name in ("flwr", "ray"):
        pytest.importorskip(name, reason="needs Flower's simulation: pip install 'flwr[simulation]'")
    # A process of its own, as its clients' processes look for the script where it is.
    script = EXPERIMENTS / "audit" / "flower.py"
    subprocess.run([sys.executable, script, "--rounds", "1", "--output", tmp_path], check=True, capture_output=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["updates"], summary["failed_checks"]) == (4, [])
    for found in (summary["captured"], summary["own_client"]):
        assert (found["labels_read"], found["label_accuracy"], found["success_rate"]) == (1.0, 1.0, 1.0)
