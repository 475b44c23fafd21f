from __future__ import annotations

import atexit
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from leakage.callbacks import Gallery, OfflineSafeWandbLogger, VictimTable, table
from leakage.callbacks.loggers import log_artifact
from tests import processes
from tests.callbacks.conftest import Run


def records(file: Path) -> Iterator[Record]:
    """What W&B has written of a run: LevelDB's log format behind 7 bytes of header, blocks of 32 KiB.

    W&B 0.31 has no reader that Python can call: ``wandb.sdk.internal.datastore`` is gone.
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if left < 7 or kind == 0:  # the end of a block
            position += left
            continue
        assert position + 7 + length <= len(data), "the file is not closed"
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        # 1 is a whole record, 2 to 4 are its first, middle and last part.
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class OfflineRun:
    """The only run in a folder, as W&B would upload it."""

    def __init__(self, folder: Path) -> None:
        wandb.teardown()  # its service closes the file some time after `wandb.finish()` has returned
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        self.files = file.parent / "files"
        self.history: list[dict[str, Any]] = []
        # Tables are uploaded as artifacts: the path in the artifact to the file on this machine.
        self.artifacts: dict[str, dict[str, Path]] = {}
        self.artifact_names: list[str] = []
        read = list(records(file))
        assert any(record.WhichOneof("record_type") == "exit" for record in read), "the run was never closed"
        for record in read:
            if record.WhichOneof("record_type") == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    *parents, name = [item.key] if item.key else item.nested_key
                    place = row
                    for parent in parents:
                        place = place.setdefault(parent, {})
                    place[name] = json.loads(item.value_json)
                self.history.append(row)
            elif record.WhichOneof("record_type") == "artifact":
                entries = record.artifact.manifest.contents
                self.artifact_names.append(record.artifact.name)
                self.artifacts[record.artifact.type] = {entry.path: Path(entry.local_path) for entry in entries}

    def values(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]

    def table(self) -> dict[str, Any]:
        """The table with its pictures."""
        return json.loads(self.artifacts["run_table"]["victims.table.json"].read_text())

    def picture(self, cell: dict[str, Any]) -> Image.Image:
        """The picture in a cell of the table."""
        return Image.open(self.artifacts["run_table"][cell["path"]])


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    yield
    wandb.finish()


def test_an_offline_run_holds_the_pictures_the_table_and_the_curves(run) -> None:
    run.fit(
        run.attack(),
        Gallery(run.folder, victims=2, moments=(10,)),
        VictimTable(run.folder),
        logger=WandbLogger(project="leakage", save_dir=run.folder),
        val_check_interval=6,
    )
    wandb.finish()
    logged = OfflineRun(run.folder)

    steps = [row for row in logged.history if "train/loss" in row]
    curve = {row["trainer/global_step"]: row["train/loss"] for row in steps}
    assert curve == pytest.approx({step: 2.0 ** -(5 * (step + 1)) for step in range(13)})
    assert len(logged.values("val/mse")) == 3, "two on the way and one at the end"

    gallery = logged.values("gallery")[-1]
    assert gallery["_type"] == "images/separated"
    with Image.open(logged.files / gallery["filenames"][0]) as picture:
        assert picture.size == (gallery["width"], gallery["height"])
        assert len(set(picture.convert("L").tobytes())) > 50, "not an empty page"

    (victims,) = logged.values("victims")
    assert victims["_type"] == "table-file"
    content = logged.table()
    assert content["columns"] == [*table.COLUMNS, "truth", "reconstruction"]
    assert sorted(row[0] for row in content["data"]) == list(range(6))
    for row in content["data"]:
        for cell in row[-2:]:
            with logged.picture(cell) as picture:
                pixels = torch.tensor(list(picture.convert("L").tobytes())).view(12, 12)
            assert (pixels - 255 * run.images[row[0], 0, 0]).abs().max() <= 1


def test_the_table_has_pictures_of_the_first_victims_only(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_ROWS_WITH_IMAGES", 2)
    run.fit(run.attack(), VictimTable(run.folder), logger=WandbLogger(project="leakage", save_dir=run.folder))
    wandb.finish()
    data = OfflineRun(run.folder).table()["data"]
    assert [row[-1] is not None for row in data] == [True, True, False, False, False, False]


def test_a_run_that_breaks_off_is_logged_too(run) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(
            run.attack(fail_at=20),
            Gallery(run.folder),
            VictimTable(run.folder),
            logger=WandbLogger(project="leakage", save_dir=run.folder),
        )
    wandb.finish()
    logged = OfflineRun(run.folder)
    assert [victims["nrows"] for victims in logged.values("victims")] == [2]
    assert len(logged.values("gallery")) == 1


def test_output_of_a_wandb_run_is_beside_its_checkpoints(run) -> None:
    logger = WandbLogger(project="leakage", save_dir=run.folder)
    callback = VictimTable()
    run.fit(run.attack(), callback, logger=logger)
    assert callback.folder == run.folder / "leakage" / logger.experiment.id
    assert (callback.folder / "victims.csv").is_file()


def test_tensorboard_holds_the_picture(run) -> None:
    logger = TensorBoardLogger(run.folder)
    run.fit(run.attack(), Gallery(run.folder, victims=2), VictimTable(run.folder), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["gallery"]
    assert events.Images("gallery")[-1].width > 500
    assert len(events.Scalars("train/loss")) == 13


class _AtTheEnd(Callback):
    """Gives two files to the loggers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "set").mkdir()
        (folder / "set" / "synthetic.safetensors").write_text("numbers")
        (folder / "set" / "synthetic.png").write_text("pixels")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        paths = [self.folder / "set" / name for name in ("synthetic.safetensors", "synthetic.png")]
        log_artifact(trainer, "synthetic-my photos/1", paths, metadata={"iterations": 5})


def test_files_become_an_artifact(run) -> None:
    run.fit(run.attack(), _AtTheEnd(run.folder), logger=WandbLogger(project="leakage", save_dir=run.folder))
    wandb.finish()
    logged = OfflineRun(run.folder)
    assert logged.artifact_names == ["synthetic-my_photos_1"]
    content = {path: file.read_text() for path, file in logged.artifacts["dataset"].items()}
    assert content == {"synthetic.safetensors": "numbers", "synthetic.png": "pixels"}


def test_loggers_without_pictures_get_the_curves(run) -> None:
    logger = CSVLogger(run.folder)
    run.fit(run.attack(), Gallery(run.folder), VictimTable(run.folder), logger=logger)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header
    assert "val/mse" in header
    assert "gallery" not in header


def log_to_nowhere(folder: Path, key: str | None) -> None:
    """Nobody listens on port 9."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            del os.environ[name]
    os.environ |= {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_CONFIG_DIR": str(folder),
        "NETRC": str(folder / "netrc"),
    } | ({"WANDB_API_KEY": key} if key else {})
    run = Run(folder)
    logger = OfflineSafeWandbLogger(project="leakage", save_dir=folder, start_timeout=2.0)
    run.fit(run.attack(), Gallery(folder, victims=1), logger=logger)
    assert logger.experiment.offline
    atexit._run_exitfuncs()  # as at the end of a script


@pytest.mark.slow
@pytest.mark.parametrize("key", ["0" * 40, None], ids=["unreachable", "no account"])
def test_goes_on_offline_when_wandb_cannot_be_used(tmp_path: Path, key: str | None) -> None:
    # In a process of its own, so that its end is seen too.
    done = processes.run(tmp_path / "said.txt", log_to_nowhere, tmp_path, key)
    assert done.returncode == 0, done.said
    assert "W&B can't be used online" in done.said
    logged = OfflineRun(tmp_path)
    assert len(logged.values("train/loss")) == 13
    assert len(logged.values("gallery")) == 1
