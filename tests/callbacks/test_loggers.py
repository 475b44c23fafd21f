from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from leakage.callbacks import Gallery, OfflineSafeWandbLogger, VictimTable, table


def records(file: Path) -> Iterator[Record]:
    """What W&B has written: LevelDB's log format behind 7 bytes of header, blocks of 32 KiB."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            position += left
            continue
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        # 1 is a whole record, 2 to 4 are its first, middle and last part.
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(folder: Path) -> list[dict]:
    """The rows that were logged to the only run in a folder."""
    (file,) = folder.glob("wandb/*run-*/*.wandb")
    rows = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
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
    rows = history(run.folder)
    files = next(run.folder.glob("wandb/offline-run-*/files"))

    curve = {row["trainer/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert curve == pytest.approx({step: 2.0 ** -(5 * (step + 1)) for step in range(13)})
    assert len([row for row in rows if "val/mse" in row]) == 3, "two on the way and one at the end"

    (gallery,) = [row["gallery"] for row in rows if "gallery" in row][-1:]
    assert gallery["_type"] == "images/separated"
    with Image.open(files / gallery["filenames"][0]) as picture:
        assert picture.size == (gallery["width"], gallery["height"])
        assert len(set(picture.convert("L").tobytes())) > 50, "not an empty page"

    (logged,) = [row["victims"] for row in rows if "victims" in row]
    assert logged["_type"] == "table-file"
    content = json.loads((files / logged["path"]).read_text())
    assert content["columns"] == [*table.COLUMNS, "truth", "reconstruction"]
    assert sorted(row[0] for row in content["data"]) == list(range(6))
    for row in content["data"]:
        with Image.open(files / row[-1]["path"]) as picture:
            pixels = torch.tensor(list(picture.convert("L").tobytes())).view(12, 12)
        assert (pixels - 255 * run.images[row[0], 0, 0]).abs().max() <= 1
        assert row[-2]["_type"] == "image-file"


def test_the_table_has_pictures_of_the_first_victims_only(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_ROWS_WITH_IMAGES", 2)
    run.fit(run.attack(), VictimTable(run.folder), logger=WandbLogger(project="leakage", save_dir=run.folder))
    wandb.finish()
    files = next(run.folder.glob("wandb/offline-run-*/files"))
    (logged,) = [row["victims"] for row in history(run.folder) if "victims" in row]
    data = json.loads((files / logged["path"]).read_text())["data"]
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
    rows = history(run.folder)
    assert [row["victims"]["nrows"] for row in rows if "victims" in row] == [2]
    assert any("gallery" in row for row in rows)


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


def test_loggers_without_pictures_get_the_curves(run) -> None:
    logger = CSVLogger(run.folder)
    run.fit(run.attack(), Gallery(run.folder), VictimTable(run.folder), logger=logger)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header
    assert "val/mse" in header
    assert "gallery" not in header


@pytest.mark.parametrize("why", ["unreachable", "no account"])
def test_goes_on_offline_when_wandb_cannot_be_used(run, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    # Nobody listens on the port of `discard`.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(run.folder / "netrc"))
    if why == "unreachable":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    else:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    logger = OfflineSafeWandbLogger(project="leakage", save_dir=run.folder, start_timeout=2.0)
    try:
        with pytest.warns(UserWarning, match=r"W&B can't be used online .* The run is logged offline"):
            run.fit(run.attack(), Gallery(run.folder, victims=1), logger=logger)
        assert logger.experiment.offline
    finally:
        wandb.teardown()
    (file,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    keys = {item.key for record in records(file) for item in record.history.item}
    assert {"train/loss", "gallery"} <= keys
