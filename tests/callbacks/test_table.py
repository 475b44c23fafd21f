from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from leakage.callbacks import VictimTable, table
from leakage.datamodules import GroundTruth
from leakage.inversion.reconstruction import Reconstruction

from .conftest import Run


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "victims.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def reconstructions(folder: Path) -> dict[str, Reconstruction]:
    return {path.stem: Reconstruction.load(path) for path in sorted(folder.glob("reconstructions/*"))}


class At(Callback):
    """Calls a function after the step that reached an iteration, before other callbacks hear of it."""

    def __init__(self, iteration: int, function) -> None:
        self.iteration, self.function = iteration, function

    def on_train_batch_end(self, trainer, attack, outputs, batch, batch_idx) -> None:
        if attack.iteration == self.iteration:
            self.function(attack)


def interrupt(attack) -> None:
    raise KeyboardInterrupt


def test_one_row_per_victim(run) -> None:
    run.fit(run.attack(), VictimTable(run.folder))
    rows = read(run.folder)
    assert tuple(rows[0]) == table.COLUMNS
    assert sorted(int(row["victim"]) for row in rows) == list(range(6))
    for row in rows:
        victim = int(row["victim"])
        label = str(int(run.labels[victim, 0]))
        last = 15 + 10 * (victim % 3)
        assert (row["labels_true"], row["labels_recovered"], row["label_accuracy"]) == (label, label, "1")
        assert float(row["mse"]) == pytest.approx(4.0**-last, rel=0.2, abs=1e-13)
        assert float(row["psnr"]) >= 90
        assert float(row["ssim"]) == pytest.approx(1, abs=1e-5)
        assert row["success"] == "1"
        assert float(row["loss"]) == pytest.approx(2.0**-last)
        assert (row["iterations"], row["evaluations"]) == (str(last), str(last + 1))
        assert (row["restarts"], row["status"]) == ("0", "converged")


def test_several_labels_in_ascending_order(run_of_pairs) -> None:
    run_of_pairs.fit(run_of_pairs.attack(), VictimTable(run_of_pairs.folder))
    rows = read(run_of_pairs.folder)
    assert len(rows) == 6
    for row in rows:
        labels = " ".join(str(label) for label in sorted(run_of_pairs.labels[int(row["victim"])].tolist()))
        assert row["labels_true"] == row["labels_recovered"] == labels


def test_without_ground_truth_the_columns_that_need_it_are_empty(run) -> None:
    run.fit(run.attack(), VictimTable(run.folder), truth=False)
    rows = read(run.folder)
    assert len(rows) == 6
    for row in rows:
        assert {name for name, value in row.items() if value == ""} == {
            "learning_rate",
            "labels_true",
            "label_accuracy",
            "mse",
            "psnr",
            "ssim",
            "success",
        }


def test_every_victim_is_in_one_file_of_reconstructions(run) -> None:
    attack = run.attack()
    run.fit(attack, VictimTable(run.folder))
    files = reconstructions(run.folder)
    assert list(files) == ["part_0000", "part_0001"]
    together = Reconstruction.cat(files.values())
    assert sorted(together.ids.tolist()) == list(range(6))
    for victim, images in zip(together.ids.tolist(), together.images, strict=True):
        of_attack = attack.finished.ids.tolist().index(victim)
        assert torch.equal(images, attack.finished.images[of_attack])


def test_a_cohort_is_on_disk_before_the_next_begins(run) -> None:
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, attack, outputs, batch, batch_idx) -> None:
            if len(batch) and attack.cohorts == 2:
                seen.append(sorted(int(row["victim"]) for row in read(run.folder)))

    run.fit(run.attack(), VictimTable(run.folder), Watch())
    # Seen after the first step of the second cohort; victim 2 of the first was still running before it.
    assert seen == [[0, 1, 3]]
    files = reconstructions(run.folder)
    assert [sorted(part.ids.tolist()) for part in files.values()] == [[0, 1, 3], [2, 4, 5]]


def test_ctrl_c_scores_and_writes_what_is_done(run) -> None:
    with pytest.raises(SystemExit):
        run.fit(run.attack(), At(25, interrupt), VictimTable(run.folder))
    rows = read(run.folder)
    done = [row for row in rows if row["status"] != "running"]
    assert sorted(int(row["victim"]) for row in done) == [0, 1, 3]
    assert all(row["labels_true"] and float(row["psnr"]) > 80 for row in done)
    running = [int(row["victim"]) for row in rows if row["status"] == "running"]
    assert running == reconstructions(run.folder)["unfinished"].ids.tolist() == [2]
    assert sorted(reconstructions(run.folder)["part_0000"].ids.tolist()) == [0, 1, 3]


def test_an_exception_before_anything_is_done_leaves_no_file(run) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(run.attack(fail_at=0), VictimTable(run.folder / "results"))
    assert list((run.folder / "results").iterdir()) == []


def test_a_truth_that_cannot_be_read_costs_only_the_truth(run) -> None:
    attack = run.attack(fail_at=20)
    attack.score_finished = lambda: (_ for _ in ()).throw(OSError("the data set is gone"))
    with (
        pytest.warns(UserWarning, match="could not be scored: the data set is gone"),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        run.fit(attack, VictimTable(run.folder))
    rows = read(run.folder)
    assert len(rows) > 1
    assert all(row["psnr"] == "" for row in rows)


@pytest.mark.parametrize("killed_at", [10, 20, 25, 30, 40, 60])
def test_a_resume_neither_repeats_nor_loses_a_row(run, killed_at: int) -> None:
    folder = run.folder / "results"
    whole = run.folder / "whole"
    run.fit(run.attack(), VictimTable(whole))

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(run.folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")

    with pytest.raises(SystemExit):
        run.fit(
            run.attack(), VictimTable(folder), saver(), At(killed_at, interrupt), enable_checkpointing=True
        )  # fmt: skip
    checkpoints = sorted((run.folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    run.fit(
        run.attack(), VictimTable(folder), saver(), enable_checkpointing=True, resume=checkpoints[-1]
    )  # fmt: skip
    assert (folder / "victims.csv").read_bytes() == (whole / "victims.csv").read_bytes()
    resumed, expected = reconstructions(folder), reconstructions(whole)
    assert resumed.keys() == expected.keys()
    for name, part in resumed.items():
        assert torch.equal(part.ids, expected[name].ids)
        assert torch.equal(part.images, expected[name].images)


def test_a_new_run_replaces_an_earlier_one_after_a_warning(run) -> None:
    run.fit(run.attack(), VictimTable(run.folder))
    run.images, run.labels = run.images[:2], run.labels[:2]
    with pytest.warns(UserWarning, match="holds the results of an earlier run, which this one will replace"):
        run.fit(run.attack(), VictimTable(run.folder))
    assert len(read(run.folder)) == 2
    assert list(reconstructions(run.folder)) == ["part_0000"]


def test_an_earlier_run_is_kept_until_there_is_something_new(run) -> None:
    run.fit(run.attack(), VictimTable(run.folder))
    with (
        pytest.warns(UserWarning, match="holds the results of an earlier run"),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        run.fit(run.attack(fail_at=0), VictimTable(run.folder))
    assert len(read(run.folder)) == 6
    assert len(reconstructions(run.folder)) == 2


def test_the_truth_is_read_once(run, monkeypatch: pytest.MonkeyPatch) -> None:
    victims = 40
    attack = run.attack()
    attack.images, attack.labels = torch.rand(victims, 1, 1, 1, 1), torch.zeros(victims, 1, dtype=torch.long)
    callback = VictimTable(run.folder)
    callback.setup(Trainer(logger=False, accelerator="cpu", barebones=True), attack, "fit")
    read_victims: list[int] = []

    def loader() -> Iterator[GroundTruth]:
        for victim in range(victims):
            read_victims.append(victim)
            yield GroundTruth(torch.tensor([victim]), attack.images[[victim]], attack.labels[[victim]])

    class Loader:
        def __iter__(self) -> Iterator[GroundTruth]:
            return loader()

    trainer: Any = SimpleNamespace(is_global_zero=True, world_size=1, val_dataloaders=Loader(), ckpt_path=None)
    callback.on_train_start(trainer, attack)
    for victim in range(victims):
        attack.done.append(victim)
        callback.on_train_batch_start(trainer, attack, (), victim)
    assert len(read(run.folder)) > 30
    assert read_victims == list(range(victims))


def test_what_is_written_is_in_proportion_to_the_victims(run, monkeypatch: pytest.MonkeyPatch) -> None:
    victims = 2000
    in_table, in_files = [], []
    monkeypatch.setattr(table, "write_csv", lambda path, columns, rows: in_table.append(len(rows)))
    monkeypatch.setattr(Reconstruction, "save", lambda self, path: in_files.append(len(self)))
    attack = run.attack()
    attack.images, attack.labels = torch.rand(victims, 1, 1, 1, 1), torch.zeros(victims, 1, dtype=torch.long)
    callback = VictimTable(run.folder)
    trainer = Trainer(logger=False, accelerator="cpu", barebones=True)
    callback.setup(trainer, attack, "fit")
    callback.on_train_start(trainer, attack)
    for victim in range(victims):
        attack.done.append(victim)
        callback._labels[victim] = [0]
        callback.on_train_batch_start(trainer, attack, (), victim)
    callback.on_fit_end(trainer, attack)
    assert in_table[-1] == sum(in_files) == victims
    assert in_table[:3] == [3, 6, 9]
    assert sum(in_table) < 12 * victims


class Stop(Callback):
    """Makes a checkpoint and ends the run, as one that is killed."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_start(self, trainer, attack, batch, batch_idx) -> None:
        if attack.iteration == self.iteration:
            trainer.save_checkpoint(trainer.default_root_dir + "/stopped.ckpt")
            raise KeyboardInterrupt


def assert_each_victim_once(folder: Path) -> None:
    together = Reconstruction.cat(reconstructions(folder).values())
    assert sorted(together.ids.tolist()) == list(range(10))
    assert sorted(int(row["victim"]) for row in read(folder)) == list(range(10))


@pytest.fixture
def run_of_ten(tmp_path: Path) -> Run:
    return Run(tmp_path, victims=10)


def test_a_file_that_could_not_be_written_before_a_kill_is_written_after_it(
    run_of_ten, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Reconstruction, path: Path) -> None:
        raise OSError("No space left on device")

    run, folder = run_of_ten, run_of_ten.folder / "results"
    with monkeypatch.context() as patch:
        patch.setattr(Reconstruction, "save", full)
        with pytest.warns(UserWarning, match="No space left"), pytest.raises(SystemExit):
            run.fit(run.attack(), VictimTable(folder), Stop(35))
    assert not reconstructions(folder)
    run.fit(run.attack(), VictimTable(folder), resume=run.folder / "stopped.ckpt")
    assert_each_victim_once(folder)


def test_a_full_disk_is_not_tried_at_every_step(run, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(self: Reconstruction, path: Path) -> None:
        tried.append(len(self))
        raise OSError("No space left on device")

    monkeypatch.setattr(Reconstruction, "save", full)
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(OSError, match="VictimTable to write all"):
        run.fit(run.attack(), VictimTable(run.folder), truth=False)
    assert [victims for victims in tried if victims < 6] == [3]
    assert tried[-1] == 6


@pytest.mark.parametrize("lost", ["removed", "truncated", "of other victims"])
def test_a_complete_file_that_is_gone_when_the_run_goes_on_is_written_anew(run_of_ten, lost: str) -> None:
    run, folder = run_of_ten, run_of_ten.folder / "results"
    with pytest.raises(SystemExit):
        run.fit(run.attack(), VictimTable(folder), Stop(35))
    part = folder / "reconstructions" / "part_0000.safetensors"
    if lost == "removed":
        part.unlink()
    elif lost == "truncated":
        part.write_bytes(part.read_bytes()[:-10])
    else:
        whole = Reconstruction.load(part)
        part.unlink()
        whole.select(torch.tensor([0])).save(part)
    run.fit(run.attack(), VictimTable(folder), resume=run.folder / "stopped.ckpt")
    assert_each_victim_once(folder)


def test_files_later_than_the_checkpoint_repeat_no_victim(run_of_ten) -> None:
    run, folder = run_of_ten, run_of_ten.folder / "results"
    with pytest.raises(SystemExit):
        run.fit(run.attack(), VictimTable(folder), Stop(35))
    # Another number of processes would have filled the files otherwise.
    last = Reconstruction.load(folder / "reconstructions" / "part_0000.safetensors")
    last.save(folder / "reconstructions" / "part_0007.safetensors")
    run.fit(run.attack(), VictimTable(folder), resume=run.folder / "stopped.ckpt")
    assert_each_victim_once(folder)


def test_a_file_is_there_until_the_next_is_whole(run_of_ten, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Reconstruction, path: Path) -> None:
        raise OSError("No space left on device")

    run, folder = run_of_ten, run_of_ten.folder / "results"
    with pytest.raises(SystemExit):
        run.fit(run.attack(), VictimTable(folder), Stop(35))
    before = reconstructions(folder)["part_0001"].ids.tolist()
    monkeypatch.setattr(Reconstruction, "save", full)
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(SystemExit):
        run.fit(run.attack(), VictimTable(folder), At(45, interrupt), resume=run.folder / "stopped.ckpt")
    assert reconstructions(folder)["part_0001"].ids.tolist() == before
