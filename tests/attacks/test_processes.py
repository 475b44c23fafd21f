"""Victims shared out among real processes, which start as in a user's script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from leakage.reconstruction import Reconstruction

SCRIPT = textwrap.dedent(
    """
    import faulthandler
    import json
    import os
    import sys
    import torch
    faulthandler.dump_traceback_later(100, exit=True)
    torch.set_num_threads(1)
    from datetime import timedelta
    from pathlib import Path
    from lightning import Callback
    from lightning.pytorch.callbacks import ModelCheckpoint
    from conftest import SmallVictims, fit
    from leakage.attacks import IDLGAttack
    from leakage.callbacks import VictimTable
    from leakage.checkpoints import WholeCheckpointIO
    from leakage.strategy import VictimParallel
    output, processes, resume, dies = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None, int(sys.argv[4])

    class Dies(Callback):
        def on_train_batch_end(self, trainer, attack, *args):
            if trainer.global_rank == 1 and attack.iteration == dies:
                os._exit(9)

    keep = ModelCheckpoint(output, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    options = {"strategy": VictimParallel(timeout=timedelta(seconds=60)), "devices": processes} if processes > 1 else {}
    attack = fit(
        IDLGAttack(tolerance=1e-6), SmallVictims(victims=7, lanes=2), ckpt_path=resume, enable_checkpointing=True,
        callbacks=[keep, VictimTable(output), Dies()], plugins=[WholeCheckpointIO()], **options,
    )
    if attack.trainer.is_global_zero:
        attack.finished.save(output / "all.safetensors")
        metrics = {name: float(value) for name, value in attack.trainer.callback_metrics.items()}
        scores = {victim: vars(score) for victim, score in attack.scores.items()}
        (output / "scores.json").write_text(json.dumps({"metrics": metrics, "scores": scores}))
    """
)


def run(output: Path, processes: int, resume: Path | str = "", dies: int = -1) -> subprocess.CompletedProcess[str]:
    output.mkdir(exist_ok=True)
    script = output / "script.py"  # what the Trainer starts again
    script.write_text(SCRIPT, encoding="utf-8")
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, str(script), str(output), str(processes), str(resume), str(dies)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def finished(output: Path, outcome: subprocess.CompletedProcess[str]) -> tuple[Reconstruction, dict[str, Any]]:
    """What the first process has found, after the checks that hold for every run."""
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = Reconstruction.load(output / "all.safetensors")
    told: dict[str, Any] = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert found.ids.tolist() == list(range(7)), "each victim once, in order"
    assert list(told["scores"]) == [str(victim) for victim in range(7)]
    assert told["metrics"]["val/victims"] == 7
    assert told["metrics"]["val/success_rate"] == sum(one["success"] for one in told["scores"].values()) / 7
    rows = (output / "victims.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert sorted(int(row.split(",")[0]) for row in rows) == list(range(7))
    assert all(row.split(",")[1] for row in rows), "the true label of each"
    return found, told


def assert_alike(one: tuple[Reconstruction, dict[str, Any]], other: tuple[Reconstruction, dict[str, Any]]) -> None:
    """The same labels and success, and images but for rounding, which the search magnifies."""
    assert torch.equal(one[0].labels, other[0].labels)
    assert [score["success"] for score in one[1]["scores"].values()] == [
        score["success"] for score in other[1]["scores"].values()
    ]
    torch.testing.assert_close(one[0].images, other[0].images, rtol=0, atol=0.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs by one and by two processes, with their checkpoints."""
    folders = {processes: tmp_path_factory.mktemp(f"by_{processes}") for processes in (1, 2)}
    for processes, folder in folders.items():
        outcome = run(folder, processes)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return folders


def results(folder: Path) -> tuple[Reconstruction, dict[str, Any]]:
    return finished(folder, subprocess.CompletedProcess([], 0))


def test_two_processes_find_what_one_finds(folders: dict[int, Path]) -> None:
    assert_alike(results(folders[1]), results(folders[2]))
    first = sorted(folders[2].glob("step=20.ckpt*"))
    assert [path.name for path in first] == ["step=20.ckpt", "step=20.ckpt.1"]
    parts = [torch.load(path, weights_only=True)["leakage"] for path in first]
    places = [
        {*part["finished_places"], *part["lanes"]["place"].tolist(), *part["asked"], *part["queue"]} for part in parts
    ]
    assert places == [{0, 2, 4, 6}, {1, 3, 5}]


@pytest.mark.parametrize(("before", "now"), [(2, 2), (2, 1), (1, 2), (2, 3)])
def test_any_number_of_processes_goes_on(folders: dict[int, Path], tmp_path: Path, before: int, now: int) -> None:
    steps = sorted(int(path.stem.removeprefix("step=")) for path in folders[before].glob("step=*.ckpt"))
    checkpoint = folders[before] / f"step={steps[len(steps) // 2]}.ckpt"
    resumed = finished(tmp_path, run(tmp_path, now, checkpoint))
    whole = results(folders[before])
    assert_alike(resumed, whole)
    if before == now:  # bit for bit
        assert torch.equal(resumed[0].images, whole[0].images)


def test_a_process_that_dies_ends_the_job_and_a_resume_finishes_the_rest(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    died = run(tmp_path, 2, dies=50)
    assert died.returncode != 0
    assert not (tmp_path / "all.safetensors").exists()
    resumed = finished(tmp_path, run(tmp_path, 2, tmp_path / "step=40.ckpt"))
    assert torch.equal(resumed[0].images, results(folders[2])[0].images)


def test_parts_of_different_moments_go_together_and_a_missing_one_is_named(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    # As if the run had been killed between writing one part and the next: one is older.
    newest = max(folders[2].glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert newest.name != "step=20.ckpt"
    shutil.copy(newest, tmp_path / "last.ckpt")
    shutil.copy(folders[2] / "step=20.ckpt.1", tmp_path / "last.ckpt.1")
    resumed = finished(tmp_path, run(tmp_path, 2, tmp_path / "last.ckpt"))
    assert_alike(resumed, results(folders[2]))
    (tmp_path / "last.ckpt.1").unlink()
    missing = run(tmp_path, 2, tmp_path / "last.ckpt")
    assert missing.returncode != 0
    assert "last.ckpt.1', but got no such file" in missing.stderr
