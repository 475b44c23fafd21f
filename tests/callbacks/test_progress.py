from __future__ import annotations

import io
import sys

import pytest

from leakage.callbacks import AttackProgressBar, progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the bar writes, one line per update, at every step."""
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def lines(screen: io.StringIO) -> list[str]:
    return [line for line in screen.getvalue().replace("\r", "\n").splitlines() if line.startswith("Victims")]


def test_tells_victims_success_iterations_and_running(run, screen) -> None:
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True)
    shown = lines(screen)
    assert any("0/6" in line and "iterations=5, running=4" in line for line in shown)
    assert any("2/6" in line and "converged=100.0 %, iterations=15, running=2" in line for line in shown)
    assert "6/6" in shown[-1]
    assert "success=100.0 %" in shown[-1]
    assert "running=0" in shown[-1]


def test_success_is_that_of_the_final_scores(run, screen) -> None:
    attack = run.attack()
    trainer = run.fit(attack, bar := AttackProgressBar(), enable_progress_bar=True)
    attack.scores[0].success, attack.scores[1].success, attack.scores[1].final = 0.0, 0.0, False
    assert bar.get_metrics(trainer, attack)["success"] == "80.0 %"


def test_without_ground_truth_tells_the_share_converged(run, screen) -> None:
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True, truth=False)
    assert "converged=100.0 %" in lines(screen)[-1]
    assert "success" not in screen.getvalue()


def test_validation_shows_no_bar_of_its_own(run, screen) -> None:
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True, val_check_interval=2)
    assert "Validation" not in screen.getvalue()
    assert "Sanity" not in screen.getvalue()


def test_off(run, screen) -> None:
    run.fit(run.attack(), AttackProgressBar(refresh_rate=0), enable_progress_bar=True)
    assert not lines(screen)


def test_is_quick_between_updates(run, screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PAUSE", 1e6)
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True)
    steps = {line.split("iterations=")[1].split(",")[0] for line in lines(screen) if "iterations=" in line}
    assert len(steps) <= 2, "the first step and the end"
    assert "6/6" in lines(screen)[-1]
