"""A run that is interrupted anywhere ends with the same bits as one that is not."""

from __future__ import annotations

import csv
import faulthandler
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from leakage.attacks import DLGAttack, IDLGAttack
from leakage.callbacks import VictimTable, table
from leakage.files.checkpoints import WholeCheckpointIO
from leakage.inversion.reconstruction import Reconstruction
from tests import processes
from tests.kit import IN_PAIRS, SmallVictims, fit
from tests.processes import Ended

# More victims than lanes, so that some enter beside others; restarts while others go on.
VICTIMS: dict[str, Any] = {"victims": 6, "lanes": 4}


def options(protocol: str) -> dict[str, Any]:
    if protocol == "published":
        return {"protocol": protocol, "max_evaluations": 30}
    return {"protocol": protocol, "max_evaluations": 20, "restarts": 1}


def checkpoints(folder: Path, every: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")


def state(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(path, weights_only=True)["leakage"]
    return saved


@pytest.mark.slow
@IN_PAIRS
def test_resumes_bit_for_bit_from_the_moments_that_matter(
    lbfgs_case: Any, kit: Any, protocol: str, tmp_path: Path
) -> None:
    whole = kit.fit(
        lbfgs_case.attack(**options(protocol)),
        kit.victims(**VICTIMS),
        enable_checkpointing=True,
        callbacks=[checkpoints(tmp_path, 1)],
    )
    kit.assert_same(whole, kit.fit(lbfgs_case.attack(**options(protocol)), kit.victims(**VICTIMS)))
    paths = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    states = [state(path) for path in paths]
    assert len(paths) == whole.iteration
    asked = [i for i, saved in enumerate(states) if saved["queue"]["asked"]]
    joint = [
        i
        for i, saved in enumerate(states)
        if not saved["queue"]["waiting"]
        and not saved["queue"]["asked"]
        and saved["lanes"]["shared"] is not None
        and len(saved["finished"])
    ]
    # Among the first; just after further ones were asked for, and just before they enter; beside them; at the end.
    moments = {len(paths) // 4, *asked[:2], *asked[-1:], *joint[:1], len(paths) - 1}
    assert asked
    for moment in sorted(moments):
        resumed = kit.fit(lbfgs_case.attack(**options(protocol)), kit.victims(**VICTIMS), ckpt_path=str(paths[moment]))
        kit.assert_same(whole, resumed)
        assert resumed.iteration == whole.iteration
        assert resumed.scores == whole.scores
        assert resumed.trainer.callback_metrics == whole.trainer.callback_metrics


def test_every_step_around_an_admission_survives(kit: Any, tmp_path: Path) -> None:
    def attack() -> IDLGAttack:
        return IDLGAttack(tolerance=1e-6)

    whole = kit.fit(attack(), kit.victims(**VICTIMS), enable_checkpointing=True, callbacks=[checkpoints(tmp_path, 1)])
    paths = {int(path.stem.removeprefix("step=")): path for path in tmp_path.glob("step=*.ckpt")}
    asked = [step for step, path in paths.items() if state(path)["queue"]["asked"]]
    assert asked
    assert any(state(paths[step])["lanes"]["shared"] is not None for step in asked), "no victim was beside the new ones"
    for step in range(min(asked) - 1, max(asked) + 3):
        resumed = kit.fit(attack(), kit.victims(**VICTIMS), ckpt_path=str(paths[step]))
        kit.assert_same(whole, resumed)


def test_resumes_twice_and_in_between_validations(lbfgs_case: Any, kit: Any, tmp_path: Path) -> None:
    def run(folder: Path, limit: int, resume: Path | None) -> Any:
        callback = ModelCheckpoint(folder, every_n_train_steps=10, save_last=True, save_top_k=0)
        return kit.fit(
            lbfgs_case.attack(**options("robust")),
            kit.victims(**VICTIMS),
            ckpt_path=None if resume is None else str(resume),
            enable_checkpointing=True,
            callbacks=[callback],
            val_check_interval=7,
            max_steps=limit,
        )

    whole = kit.fit(lbfgs_case.attack(**options("robust")), kit.victims(**VICTIMS))
    run(tmp_path, 10, None)
    part = run(tmp_path, 30, tmp_path / "last.ckpt")
    assert 0 < part.iteration < whole.iteration
    resumed = run(tmp_path, -1, tmp_path / "last.ckpt")
    kit.assert_same(whole, resumed)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_run_that_is_done_stays_done(case: Any, kit: Any, precision: str, tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, save_last=True)
    whole = kit.fit(
        case.attack(max_evaluations=20, restarts=0),
        kit.victims(victims=2),
        enable_checkpointing=True,
        callbacks=[callback],
        precision=precision,
    )
    again = kit.fit(
        case.attack(max_evaluations=20, restarts=0),
        kit.victims(victims=2),
        ckpt_path=str(tmp_path / "last.ckpt"),
        precision=precision,
    )
    kit.assert_same(whole, again)
    assert again.iteration == whole.iteration
    assert again.scores == whole.scores


@pytest.fixture(scope="module")
def checkpoint(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    callback = checkpoints(folder, 5)
    attack = IDLGAttack(max_evaluations=12, restarts=0)
    kit.fit(attack, kit.victims(victims=3), enable_checkpointing=True, callbacks=[callback])
    return str(folder / "step=5.ckpt")


def test_refuses_the_checkpoint_of_another_attack(kit: Any, checkpoint: str) -> None:
    with pytest.raises(ValueError, match="Expected a checkpoint of DLGAttack, but got one of IDLGAttack"):
        kit.fit(DLGAttack(max_evaluations=12, restarts=0), kit.victims(victims=3), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_evaluations": 13}, r"it has max_evaluations=12 \(now 13\)"),
        ({"seed": 1}, r"it has seed=0 \(now 1\)"),
        ({"protocol": "published"}, r"it has protocol='robust' \(now 'published'\)"),
        ({"restarts": 2, "tolerance": 1e-3}, r"it has restarts=0 \(now 2\), tolerance=None \(now 0\.001\)"),
    ],
)
def test_refuses_a_checkpoint_of_other_hyper_parameters(
    kit: Any, checkpoint: str, changed: dict[str, Any], message: str
) -> None:
    attack = IDLGAttack(**({"max_evaluations": 12, "restarts": 0} | changed))
    with pytest.raises(ValueError, match=message):
        kit.fit(attack, kit.victims(victims=3), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"victims": 4}, "victims 3 in the checkpoint and 4 here"),
        ({"seed": 1}, "seed 0 in the checkpoint and 1 here"),
    ],
)
def test_refuses_a_checkpoint_of_other_victims(
    kit: Any, checkpoint: str, changed: dict[str, Any], message: str
) -> None:
    attack = IDLGAttack(max_evaluations=12, restarts=0)
    with pytest.raises(ValueError, match=f"Expected a checkpoint of the same victims, but got .*{message}"):
        kit.fit(attack, kit.victims(**({"victims": 3} | changed)), ckpt_path=checkpoint)


def test_other_lanes_are_no_other_victims(kit: Any, checkpoint: str) -> None:
    attack = IDLGAttack(max_evaluations=12, restarts=0)
    resumed = kit.fit(attack, kit.victims(victims=3, lanes=1), ckpt_path=checkpoint)
    whole = kit.fit(IDLGAttack(max_evaluations=12, restarts=0), kit.victims(victims=3))
    kit.assert_same(resumed, whole)


def test_refuses_the_checkpoint_of_another_module(kit: Any, checkpoint: str, tmp_path: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    del saved["leakage"]
    torch.save(saved, tmp_path / "other.ckpt")
    attack = IDLGAttack(max_evaluations=12, restarts=0)
    with pytest.raises(ValueError, match="Expected a checkpoint of IDLGAttack, but got one of another module"):
        kit.fit(attack, kit.victims(victims=3), ckpt_path=str(tmp_path / "other.ckpt"))


class Hit(Callback):
    """Kills or interrupts its own process once results are written, before other callbacks act."""

    def __init__(self, output: Path, number: int) -> None:
        self.output, self.number = output, number

    def on_train_batch_end(self, *_: Any) -> None:
        if (self.output / "reconstructions" / "part_0000.safetensors").exists():
            os.kill(os.getpid(), self.number)


def attack(output: Path, moment: str, resume: Path | str) -> None:
    """What the process does that hits itself at a moment."""
    faulthandler.dump_traceback_later(100, exit=True)
    torch.set_num_threads(1)
    table._PER_FILE = 3
    hits = {"file": [Hit(output, signal.SIGKILL)], "interrupt": [Hit(output, signal.SIGINT)]}.get(moment, [])
    whole = torch.save

    def save(content: Any, file: Any) -> None:
        # The one that the run is resumed from; the other is written first.
        if moment == "checkpoint" and content["leakage"]["iteration"] == 8 and "last" in file.name:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(content, file)

    torch.save = save
    keep = ModelCheckpoint(output, filename="now", every_n_train_steps=2, save_last=True, save_top_k=1)
    attack = fit(
        DLGAttack(tolerance=1e-6),
        SmallVictims(victims=10, lanes=4),
        callbacks=[*hits, VictimTable(output), keep],
        enable_checkpointing=True,
        plugins=[WholeCheckpointIO()],
        val_check_interval=25,
        ckpt_path=str(resume) or None,
    )
    attack.finished.save(output / "all.safetensors")


def run(output: Path, moment: str = "", resume: Path | str = "") -> Ended:
    """In a process of its own."""
    return processes.run(output / "said.txt", attack, output, moment, resume)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "victims.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    done = run(output)
    assert done.returncode == 0, done.said
    return output


# While a checkpoint is written; when a file of results is newer than the last one.
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["checkpoint", "file"])
def test_survives_a_kill(uninterrupted: Path, tmp_path: Path, moment: str) -> None:
    assert run(tmp_path, moment).returncode == -signal.SIGKILL
    last = tmp_path / "last.ckpt"
    resumed = run(tmp_path, resume=last)
    assert resumed.returncode == 0, resumed.said
    expected = Reconstruction.load(uninterrupted / "all.safetensors")
    found = Reconstruction.load(tmp_path / "all.safetensors")
    for name, tensor in vars(expected).items():
        assert tensor is None or torch.equal(tensor, getattr(found, name)), name
    assert rows(tmp_path) == rows(uninterrupted)
    parts = [Reconstruction.load(path) for path in sorted(tmp_path.glob("reconstructions/*.safetensors"))]
    assert sorted(Reconstruction.cat(parts).ids.tolist()) == list(range(10))


@pytest.mark.slow
def test_an_interrupt_writes_what_is_there(uninterrupted: Path, tmp_path: Path) -> None:
    said = run(tmp_path, "interrupt").said
    assert not (tmp_path / "all.safetensors").exists(), "it was over before it could be interrupted"
    assert "Traceback" not in said or "KeyboardInterrupt" in said, said
    expected = {row["victim"]: row for row in rows(uninterrupted)}
    written = rows(tmp_path)
    done = [row for row in written if row["status"] != "running"]
    assert 3 <= len(done) < len(expected)
    for row in done:
        # Scored and final, though the run did not reach its end.
        assert row == expected[row["victim"]]
        assert float(row["mse"]) < 1e-2
    parts = [Reconstruction.load(path) for path in sorted(tmp_path.glob("reconstructions/*.safetensors"))]
    assert {str(victim) for victim in Reconstruction.cat(parts).ids.tolist()} >= {row["victim"] for row in done}
