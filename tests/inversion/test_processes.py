"""Victims shared out among real processes, which start as in a user's script or as torchrun does it."""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from leakage.attacks import IDLGAttack
from leakage.callbacks import VictimTable
from leakage.files.checkpoints import WholeCheckpointIO, part_of
from leakage.inversion.lanes import Lanes
from leakage.inversion.processes import take_part
from leakage.inversion.reconstruction import Reconstruction
from leakage.inversion.strategy import VictimParallel
from tests.kit import SmallVictims, fit
from tests.processes import Ended, Running

SCRIPT = """
import sys
from pathlib import Path
from tests.inversion.test_processes import attack

attack(Path(sys.argv[1]), 2)
"""


class Dies(Callback):
    """Ends the second process after that many iterations of its own."""

    def __init__(self, dies: int) -> None:
        self.dies = dies

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and pl_module.iteration == self.dies:
            os._exit(9)


def attack(output: Path, processes: int, resume: Path | str = "", *, dies: int = -1, cramped: int = -1) -> None:
    """What each process does. The second may find no memory for two lanes, after that many iterations of its own."""
    faulthandler.dump_traceback_later(100, exit=True)
    torch.set_num_threads(1)
    attack = IDLGAttack(tolerance=1e-6)
    original = Lanes.evaluate

    def evaluate(lanes: Lanes) -> Any:
        if attack.global_rank == 1 and attack.iteration == cramped and len(lanes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(lanes)

    Lanes.evaluate = evaluate  # type: ignore[method-assign]
    keep = ModelCheckpoint(output, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    options: dict[str, Any] = {}
    if processes > 1:
        options = {"strategy": VictimParallel(timeout=timedelta(seconds=60)), "devices": processes}
    fit(
        attack,
        SmallVictims(victims=7, lanes=2),
        ckpt_path=str(resume) or None,
        enable_checkpointing=True,
        callbacks=[keep, VictimTable(output), Dies(dies)],
        plugins=[WholeCheckpointIO()],
        **options,
    )
    if attack.trainer.is_global_zero:
        attack.finished.save(output / "all.safetensors")
        metrics = {name: float(value) for name, value in attack.trainer.callback_metrics.items()}
        scores = {victim: vars(score) for victim, score in attack.scores.items()}
        (output / "scores.json").write_text(json.dumps({"metrics": metrics, "scores": scores}))


def run(output: Path, processes: int, resume: Path | str = "", **events: int) -> Ended:
    """Processes that the test starts, as torchrun does; the first one's end."""
    output.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = functools.partial(attack, output, processes, resume, **events)
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "NODE_RANK": "0"}
    started = [
        Running(
            output / f"said_{rank}.txt", work, environment=places | {"LOCAL_RANK": str(rank)} if processes > 1 else {}
        )
        for rank in range(processes)
    ]
    ended = [process.end() for process in started]
    return Ended(max((one.returncode for one in ended), key=abs), "".join(one.said for one in ended))


def run_script(output: Path) -> Ended:
    """A user's script, which the Trainer starts again for the second process."""
    script = output / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(output)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return Ended(done.returncode, done.stdout)


def finished(output: Path, outcome: Ended) -> tuple[Reconstruction, dict[str, Any]]:
    """What the first process has found, after the checks that hold for every run."""
    assert outcome.returncode == 0, outcome.said
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
        outcome = run(folder, 1) if processes == 1 else run_script(folder)
        assert outcome.returncode == 0, outcome.said
    return folders


def checkpoints(folder: Path) -> list[Path]:
    """Of the first process, the oldest first."""
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))


def results(folder: Path) -> tuple[Reconstruction, dict[str, Any]]:
    return finished(folder, Ended(0, ""))


def test_two_processes_find_what_one_finds(folders: dict[int, Path]) -> None:
    assert_alike(results(folders[1]), results(folders[2]))
    first = sorted(folders[2].glob("step=20.ckpt*"))
    assert [path.name for path in first] == ["step=20.ckpt", "step=20.ckpt.1"]
    parts = [torch.load(path, weights_only=True)["leakage"] for path in first]
    places = [
        {*part["places"], *part["lanes"]["kept"]["place"].tolist(), *part["queue"]["asked"], *part["queue"]["waiting"]}
        for part in parts
    ]
    assert places == [{0, 2, 4, 6}, {1, 3, 5}]


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_any_number_of_processes_goes_on(folders: dict[int, Path], tmp_path: Path, before: int, now: int) -> None:
    paths = checkpoints(folders[before])
    checkpoint = paths[len(paths) // 2]
    assert_alike(finished(tmp_path, run(tmp_path, now, checkpoint)), results(folders[before]))


def test_more_processes_than_victims_that_are_left(folders: dict[int, Path], tmp_path: Path) -> None:
    # The first process' newest part, and one of the second in which there is little left.
    def left(path: Path) -> int:
        parts = [torch.load(one, weights_only=True)["leakage"] for one in (newest, part_of(path, 1))]
        return 7 - sum(len(part["places"]) for part in parts)

    newest = checkpoints(folders[2])[-1]
    last = tmp_path / "last.ckpt"
    shutil.copy(newest, last)
    shutil.copy(part_of(next(path for path in checkpoints(folders[2]) if left(path) < 3), 1), part_of(last, 1))
    assert_alike(finished(tmp_path, run(tmp_path, 3, last)), results(folders[2]))


def test_a_process_that_dies_ends_the_job_and_a_resume_finishes_the_rest(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    died = run(tmp_path, 2, dies=50)
    assert died.returncode != 0
    assert not (tmp_path / "all.safetensors").exists()
    resumed, whole = finished(tmp_path, run(tmp_path, 2, tmp_path / "step=40.ckpt")), results(folders[2])
    for name in vars(whole[0]):  # bit for bit
        found, other = getattr(resumed[0], name), getattr(whole[0], name)
        assert found is other or torch.equal(found, other), name


def test_parts_of_different_moments_go_together_and_less_memory_ends_nothing(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    # As if the run had been killed between writing one part and the next: one is older.
    newest = checkpoints(folders[2])[-1]
    assert newest.name != "step=20.ckpt"
    shutil.copy(newest, tmp_path / "last.ckpt")
    shutil.copy(folders[2] / "step=20.ckpt.1", tmp_path / "last.ckpt.1")
    # And there is less memory than there was, for one of the two: they make the same number of steps all the same.
    outcome = run(tmp_path, 2, tmp_path / "last.ckpt", cramped=22)
    assert "2 lanes do not fit into memory" in outcome.said
    assert_alike(finished(tmp_path, outcome), results(folders[2]))
    assert checkpoints(tmp_path)
    assert all(part_of(path, 1).exists() for path in checkpoints(tmp_path))


def found(places: list[int]) -> dict[str, torch.Tensor]:
    """What was found of the victims at these places, whose ids are 100 more."""
    whole = torch.tensor(places)
    images = whole.float().view(-1, 1, 1, 1, 1).expand(-1, 1, 1, 2, 2)
    return vars(
        Reconstruction(whole + 100, images, whole[:, None], whole.float(), *(whole.clone() for _ in range(4))),
    )


def a_part(deal: str, done: list[list[int]], scored: dict[int, bool], rows: int) -> dict[str, Any]:
    """One of two processes' parts, with so many lanes."""
    return {
        "hyper_parameters": {"seed": 0},
        "leakage": {
            "module": "IDLGAttack",
            "precision": "32-true",
            "processes": 2,
            "deal": deal,
            "iteration": 41,
            "queue": {"waiting": [9], "asked": [], "asked_at": -1},
            "finished": [found(places) for places in done],
            "places": [place for places in done for place in places],
            "scores": {victim + 100: {"final": final} for victim, final in scored.items()},
            "lanes": {"kept": {"place": torch.zeros(rows)}, "shared": {}},
        },
        "state_dict": {"unknowns.images": torch.zeros(rows, 1)},
        "optimizer_states": [{"state": {0: {"best_loss": torch.zeros(rows)}}, "name": deal}],
    }


def take(parts: list[dict[str, Any]], rank: int, processes: int) -> dict[str, Any]:
    def load(path: Path) -> dict[str, Any]:
        assert str(path) == "last.ckpt.1"
        return parts[1]

    trainer = SimpleNamespace(
        world_size=processes,
        global_rank=rank,
        is_global_zero=rank == 0,
        ckpt_path="last.ckpt",
        strategy=SimpleNamespace(checkpoint_io=SimpleNamespace(load_checkpoint=load)),
    )
    checkpoint = dict(parts[0], leakage=dict(parts[0]["leakage"]))
    take_part(trainer, checkpoint, victims=8)  # type: ignore[arg-type]
    return checkpoint


def test_each_process_takes_its_own_part_of_one_deal() -> None:
    parts = [a_part("a", [[0]], {}, 2), a_part("a", [[1], [3]], {}, 3)]
    for rank in range(2):
        taken = take(parts, rank, 2)
        for name in ("leakage", "state_dict", "optimizer_states"):
            assert taken[name] == parts[rank][name]


def test_parts_of_a_run_that_is_over_count_once() -> None:
    """The first process has then the results of all."""
    parts = [a_part("a", [[0, 1, 2, 3, 4, 5, 6, 7]], {}, 0), a_part("a", [[1, 3, 5, 7]], {}, 0)]
    taken = [take(parts, rank, 2)["leakage"] for rank in range(2)]
    assert [len(saved["places"]) for saved in taken] == [8, 0]
    assert all(not saved["queue"]["waiting"] for saved in taken)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    trainer = SimpleNamespace(world_size=1, ckpt_path=path, strategy=SimpleNamespace(checkpoint_io=WholeCheckpointIO()))
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt\.1', but got no such file"):
        take_part(trainer, a_part("a", [[0]], {}, 2), victims=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(("place", "value"), [("hyper_parameters", {"seed": 1}), ("NoneType", {"victims": 9})])
def test_a_part_that_an_earlier_run_left_is_named(place: str, value: dict[str, int]) -> None:
    parts = [a_part("a", [[0]], {}, 2), a_part("b", [[1]], {}, 2) | {place: value}]
    with pytest.raises(ValueError, match=r"but got 'last\.ckpt\.1' with another configuration or other victims"):
        take(parts, 0, 2)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_new_deal_gives_what_is_done_to_the_first_and_each_of_the_others_to_one(processes: int) -> None:
    # Parts of two deals, with one victim in both. Victim 5 has ended in its lane, and been scored, but begins anew.
    parts = [
        a_part("a", [[2, 0], [6]], {0: True, 2: True, 4: False, 6: True}, 2),
        a_part("b", [[6, 1]], {1: True, 5: True}, 3),
    ]
    taken = [take(parts, rank, processes) for rank in range(processes)]
    first, *others = [checkpoint["leakage"] for checkpoint in taken]
    assert first["places"] == [2, 0, 6, 1]
    joined = Reconstruction.cat([Reconstruction(**part) for part in first["finished"]])
    assert joined.ids.tolist() == [102, 100, 106, 101]
    assert joined.images[:, 0, 0, 0, 0].tolist() == [2, 0, 6, 1]
    assert sorted(first["scores"]) == [100, 101, 102, 106]
    assert all(not saved["places"] and not saved["finished"] and not saved["scores"] for saved in others)
    queues = [checkpoint["leakage"]["queue"]["waiting"] for checkpoint in taken]
    assert sorted(place for queue in queues for place in queue) == [3, 4, 5, 7]
    assert max(map(len, queues)) - min(map(len, queues)) <= 1
    for checkpoint in taken:
        saved = checkpoint["leakage"]
        assert (saved["lanes"], saved["queue"]["asked"], saved["iteration"]) == ({"kept": {}, "shared": None}, [], 41)
        assert len(checkpoint["state_dict"]["unknowns.images"]) == 0
        assert len(checkpoint["optimizer_states"][0]["state"][0]["best_loss"]) == 0
