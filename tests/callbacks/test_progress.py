from __future__ import annotations

import pytest

from leakage.callbacks import AttackProgressBar, progress


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    monkeypatch.setattr(progress, "_PAUSE_IN_A_FILE", 0.0)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the bar showed, one line per update."""
    return [line for line in capsys.readouterr().out.replace("\r", "\n").splitlines() if "Victims" in line]


def test_tells_victims_success_iterations_and_running(run, capsys) -> None:
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True)
    shown = lines(capsys)
    assert any("0/6" in line and "iterations=5, running=4" in line for line in shown)
    assert any("2/6" in line and "converged=100.0 %, iterations=15, running=2" in line for line in shown)
    assert "6/6" in shown[-1]
    assert "success=100.0 %" in shown[-1]
    assert "running=0" in shown[-1]


def test_stays_on_the_screen(run, capsys) -> None:
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True)
    said = capsys.readouterr().out
    assert "6/6" in said[said.rindex("\r") :], "nothing has wiped it"
    assert said.endswith("\n")


def test_begins_with_its_total(run, capsys) -> None:
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True)
    shown = lines(capsys)
    assert "0/6" in shown[0]
    assert all("?" not in line.partition("[")[0] for line in shown)


def test_success_is_that_of_the_final_scores(run, capsys) -> None:
    attack = run.attack()
    trainer = run.fit(attack, bar := AttackProgressBar(), enable_progress_bar=True)
    attack.scores[0].success, attack.scores[1].success, attack.scores[1].final = 0.0, 0.0, False
    assert bar.get_metrics(trainer, attack)["success"] == "80.0 %"


def test_without_ground_truth_tells_the_share_converged(run, capsys) -> None:
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True, truth=False)
    shown = lines(capsys)
    assert "converged=100.0 %" in shown[-1]
    assert not any("success" in line for line in shown)


def test_validation_shows_no_bar_of_its_own(run, capsys) -> None:
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True, val_check_interval=2)
    shown = capsys.readouterr()
    assert "Victims" in shown.out
    for name in ("Validation", "Sanity"):
        assert name not in shown.out + shown.err


def test_off(run, capsys) -> None:
    run.fit(run.attack(), AttackProgressBar(refresh_rate=0), enable_progress_bar=True)
    assert not lines(capsys)


def test_is_quick_between_updates(run, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PAUSE_IN_A_FILE", 1e6)
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True)
    shown = lines(capsys)
    steps = {line.split("iterations=")[1].split(",")[0] for line in shown if "iterations=" in line}
    assert steps == {"5", "65"}, "the first step and the end"
    assert "6/6" in shown[-1]


def test_on_a_terminal_it_tells_more_often_than_in_a_file(run, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PAUSE_IN_A_FILE", 1e6)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run.fit(run.attack(), AttackProgressBar(), enable_progress_bar=True)
    assert sum("iterations=" in line for line in lines(capsys)) > 5
