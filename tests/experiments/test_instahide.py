"""`instahide.py`: images behind many encodings."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest


def test_more_encodings_give_more_away(
    instahide: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = instahide.Federation
    monkeypatch.setattr(instahide, "Federation", lambda: federation(rounds=2))
    asked = ["--dataset", "sample", "--victims", "1", "--rounds", "1", "8", "--errors", "0", "--output", str(tmp_path)]
    instahide.main([*asked, "--seeds", "2"])
    trained = json.loads((tmp_path / "accuracy.json").read_text())["accuracies"]
    assert len(trained) == 2
    assert f"test accuracy {50 * sum(trained):.1f} % [" in capsys.readouterr().out
    few, many = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["encodings"], row["images"], row["victims"]) for row in (few, many)] == [(10, 10, 1), (80, 10, 1)]
    assert few["psnr_mean"] < 22
    assert few["success_rate"] == 0
    assert many["psnr_mean"] > few["psnr_mean"] + 5
    assert many["success_ci"][0] <= many["success_rate"] <= many["success_ci"][1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--rounds", "0"], "`rounds` to be a whole number of at least 1"),
        (["--errors", "-1"], "`errors` of at least 0"),
        (["--victims", "0"], "`victims` to be a whole number of at least 1"),
        (["--public", "1"], "`public` to be a whole number of at least 2"),
    ],
)
def test_refusals(
    instahide: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        instahide.main(["--dataset", "sample", *asked, "--output", str(tmp_path / "new")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
