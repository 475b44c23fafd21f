"""`dp_bound.py`: the game that DP-SGD's bound is about."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from leakage.audit import gaussian_success_bound
from leakage.defenses import DPSGD
from leakage.metrics import wilson_interval
from leakage.models import LeNet

FEW = ["--dataset", "sample", "--candidates", "41", "--victims", "150", "--accelerator", "cpu"]


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 30.0, 1000.0])
def test_the_noise_is_that_of_epsilon(dp_bound: ModuleType, epsilon: float) -> None:
    assert DPSGD(dp_bound.multiplier(epsilon, 1e-5), norm=3.0).epsilon(1, 1.0, 1e-5) == pytest.approx(epsilon, rel=1e-4)


def test_rows_keep_below_the_bound(dp_bound: ModuleType, tmp_path: Path) -> None:
    dp_bound.main([*FEW, "--epsilons", "20", "1", "30000", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["epsilon"] for row in rows] == [1, 20, 30000]
    assert rows[0]["success_rate"] < 0.2 < 0.95 < rows[2]["success_rate"]
    for row in rows:
        assert (row["candidates"], row["victims"]) == (41, 150)
        assert row["bound"] == gaussian_success_bound(1 / 41, row["noise_multiplier"])
        assert row["success_ci"] == list(wilson_interval(row["success_rate"], 150))
        assert row["success_ci"][0] < row["bound"]
    assert (tmp_path / "dp_bound.png").stat().st_size > 10_000


def test_the_likeliest_candidate_is_named_however_victims_are_grouped(
    dp_bound: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(12, 1, 28, 28, generator=generator), torch.arange(12) % 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LeNet()
    options = {"norm": 1.0, "victims": 30, "seed": 3}
    assert dp_bound.play(model, images, labels, noise_multiplier=1e-6, **options) == 30
    named = dp_bound.play(model, images, labels, noise_multiplier=0.3, **options)
    assert 0 < named < 30
    monkeypatch.setattr(dp_bound, "_AT_ONCE", 7)
    assert dp_bound.play(model, images, labels, noise_multiplier=0.3, **options) == named


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epsilons", "0", "Expected `epsilons`"),
        ("--delta", "1", "Expected `delta`"),
        ("--norm", "-1", "Expected `norm`"),
        ("--candidates", "4000", "Expected `--candidates` from 2 to"),
        ("--candidates", "1", "Expected `--candidates` from 2 to"),
        ("--victims", "0", "Expected `victims`"),
        ("--dataset", "nowhere", "Expected"),
    ],
)
def test_bad_input(
    dp_bound: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        dp_bound.main([*FEW, "--output", str(tmp_path / "out"), option, value])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.json").exists()


def test_results_are_not_lost_by_mistake(
    dp_bound: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(SystemExit):
        dp_bound.main([*FEW, "--output", str(tmp_path)])
    assert "to be a folder without results" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "[]"
