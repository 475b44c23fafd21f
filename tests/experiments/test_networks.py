"""`networks.py`: whole audits of four networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leakage.audit import AuditReport

from .conftest import load

networks = load("audit/networks.py")


@pytest.mark.slow
def test_audits_a_network_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--networks", "mlp", "--budget", "2s", "--victims", "2", "--output", str(tmp_path)]
    networks.main(options)
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["attack"] for row in rows] == ["labels", "rgap", "gauss_newton", "inverting_gradients"]
    assert rows[0]["metrics"]["label_accuracy"]["value"] == 1
    assert "norm by the statistics of each image" in rows[1]["reason"]
    assert "| mlp | 118,794 | labels | 2 |" in capsys.readouterr().out
    first = AuditReport.load(tmp_path / "mlp")
    networks.main(options)
    assert AuditReport.load(tmp_path / "mlp").measured == first.measured


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--budget", "soon", "Expected `budget`"),
        ("--victims", "0", "Expected `victims`"),
        ("--networks", "vgg", "invalid choice: 'vgg'"),
    ],
)
def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, said: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        networks.main([option, value, "--output", str(tmp_path / "out")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
