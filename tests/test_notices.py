"""What stands on the screen of a script, from the first import to the last line."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from leakage import notices
from leakage.attacks import IDLGAttack
from leakage.datamodules import Victims

SCRIPT = """
from lightning import Trainer
from leakage.attacks import GaussNewtonAttack
from leakage.callbacks import AttackProgressBar, Gallery, VictimTable
from leakage.datamodules import Victims

trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[AttackProgressBar(), Gallery(), VictimTable()])
# From a random start it takes forward-mode derivatives, at the first of which torch warns.
attack = GaussNewtonAttack(start="noise", max_evaluations=2, restarts=0)
trainer.fit(attack, datamodule=Victims("sample", victims=2))
"""


@pytest.mark.slow
def test_nothing_stands_before_the_result(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r})\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if line]
    # What Lightning computes on, and why it stopped; in newer versions the TPU's line is gone.
    assert [
        line for line in said if not line.startswith(("GPU available", "TPU available", "`Trainer.fit` stopp"))
    ] == []
    shown = [line for line in done.stdout.replace("\r", "\n").splitlines() if line]
    assert "0/2" in shown[0], "a total from the beginning"
    assert all("?" not in line.partition("[")[0] for line in shown)
    assert "2/2" in shown[-1]


def test_only_what_is_named_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        notices.leave_out()
        notices.leave_out()
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            rank_zero_info("💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]")
            rank_zero_info("💡 Tip: something else")
            rank_zero_info("GPU available: True")
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use `...` instead.", FutureWarning, stacklevel=1)
        warnings.warn(
            "`torch.jit.script` is deprecated. Please switch to `torch.compile`.", FutureWarning, stacklevel=1
        )
        warnings.warn("Starting from v1.9.0, `tensorboardX` has been removed as a dependency of", stacklevel=1)
        warnings.warn("`another` is deprecated", FutureWarning, stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == ["💡 Tip: something else", "GPU available: True"]
    assert [str(warning.message) for warning in warned] == ["`another` is deprecated"]
    filters = logging.getLogger("lightning.pytorch.utilities.rank_zero").filters
    assert len(filters) == len(set(filters))


class Asked(ModelSummary):
    """A summary that a user asked for."""

    summarized = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.summarized = True


def test_the_summary_of_no_parameters_is_left_out_but_not_one_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fit(*callbacks: ModelSummary) -> Trainer:
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=list(callbacks), **options)  # type: ignore[arg-type]
        attack = IDLGAttack(max_evaluations=1, restarts=0)
        with caplog.at_level(logging.INFO, "lightning"):
            trainer.fit(attack, datamodule=Victims("sample", victims=1))
        return trainer

    fit()
    assert "params" not in (caplog.text + "".join(capsys.readouterr())).lower()
    fit(asked := Asked())
    assert asked.summarized
