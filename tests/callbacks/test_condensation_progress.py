from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning import Trainer

from leakage.callbacks import CondensationProgressBar, progress
from tests.callbacks.condensation_runs import At, fit, interrupt, module, quick


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the bar showed, one line per update."""
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    monkeypatch.setattr(progress, "_PAUSE_IN_A_FILE", 0.0)
    return lambda: [line for line in capsys.readouterr().out.replace("\r", "\n").splitlines() if line.strip()]


def test_the_bar_tells_iterations_loss_speed_and_accuracy(tmp_path: Path, said) -> None:
    condensation, evaluation = module(), quick(tmp_path, at=(2,))
    fit(condensation, CondensationProgressBar(), evaluation)
    *shown, last, time = said()
    assert any("Iterations:   0%" in line and "0/4" in line for line in shown)
    early = [line for line in shown if "1/4" in line]
    assert early
    assert all("loss=" in line and "images/s=" in line and "accuracy" not in line for line in early)
    assert any("2/4" in line and "now=evaluating" in line for line in shown)
    assert any("3/4" in line and f"accuracy={100 * evaluation.rows[0].accuracy_mean:.1f} %" in line for line in shown)
    assert "4/4" in last
    assert f"loss={condensation.last_loss:.4g}" in last
    assert f"accuracy={100 * evaluation.last.mean:.1f} %" in last
    assert "evaluating" not in last
    assert time.startswith("Time: real images ")


def test_the_bar_counts_the_steps_of_an_iteration(said) -> None:
    fit(module(loops=(3, 1)), CondensationProgressBar(name="dc"))
    shown = said()
    assert any("dc:" in line and "1/4" in line and "step=2/3" in line for line in shown)
    assert any("2/4" in line and "step" not in line for line in shown)


def test_the_bar_goes_on_after_a_resume(tmp_path: Path, said) -> None:
    fit(module(), At(3, lambda trainer, _: trainer.save_checkpoint(tmp_path / "run.ckpt")))
    fit(module(), CondensationProgressBar(), resume=tmp_path / "run.ckpt")
    shown = [line for line in said() if "/4" in line]
    assert "3/4" in shown[0]
    assert "4/4" in shown[-1]
    assert not any("1/4" in line for line in shown)


def test_the_time_adds_up(tmp_path: Path, said) -> None:
    condensation = module()
    fit(condensation, CondensationProgressBar(), quick(tmp_path))
    condensation.seconds = {"real": 6.0, "synthetic": 1.0, "network": 1.0, "evaluation": 2.0}
    CondensationProgressBar().on_fit_end(Trainer(logger=False), condensation)
    assert said()[-1].startswith(
        "Time: real images 6.0 s (60 %), synthetic images 1.0 s (10 %), networks "
        "1.0 s (10 %), evaluation 2.0 s (20 %); "
    )


def test_the_time_is_told_after_an_interrupt(said) -> None:
    with pytest.raises(SystemExit):
        fit(module(), CondensationProgressBar(), At(2, interrupt))
    assert said()[-1].startswith("Time: ")


def test_the_bar_can_be_off(said) -> None:
    fit(module(), CondensationProgressBar(refresh_rate=0))
    assert not [line for line in said() if "Iterations" in line or "Time" in line]
