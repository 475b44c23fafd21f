"""`decisions.py`: whole audits of a network whose success rate is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import load

decisions = load("audit/decisions.py")


def test_what_the_intervals_promise() -> None:
    at_limit = decisions.promised(0.1, 0.1, 100)
    assert sum(at_limit.values()) == pytest.approx(1)
    assert 0.01 < at_limit["within"] < 0.05
    assert 0.01 < at_limit["exceeded"] < 0.05
    # None of 72 victims found is too few for a limit of 5 %, none of 73 is enough.
    assert decisions.promised(0.0, 0.05, 72)["inconclusive"] == 1
    assert decisions.promised(0.0, 0.05, 73)["within"] == 1
    assert decisions.promised(1.0, 0.9, 100)["exceeded"] == 1


@pytest.mark.slow
def test_an_audit_finds_the_images_that_the_unit_sees(tmp_path: Path) -> None:
    options = ["--data", "sample", "--rates", "0.5", "--limit", "0.1", "--audits", "1", "--victims", "40"]
    decisions.main([*options, "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert (row["rate"], row["audits"], row["victims"]) == (0.5, 1, 40)
    assert row["decisions"] == {"within": 0, "exceeded": 1, "inconclusive": 0}
    assert abs(row["found"] - 0.5) < 0.3


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rates", "0", "Expected `rates`"),
        ("--limit", "1", "Expected `limit`"),
        ("--audits", "0", "Expected `audits`"),
    ],
)
def test_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, said: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        decisions.main([option, value, "--output", str(tmp_path / "out")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
