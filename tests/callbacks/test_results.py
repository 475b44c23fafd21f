from __future__ import annotations

import errno
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from leakage.callbacks import Gallery, ResultsCallback, VictimTable
from leakage.inversion.reconstruction import Reconstruction


class FullDisk:
    """Makes writing fail while it is full; what was begun stays behind, as on a real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True
        replace = Path.replace

        def move(path: Path, target: Path) -> Path:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return replace(path, target)

        # All files are written under another name first and then moved.
        monkeypatch.setattr(Path, "replace", move)


@pytest.mark.parametrize("callback", [Gallery, VictimTable])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(run, callback) -> None:
    (run.folder / "file").write_text("")
    attack = run.attack()
    with pytest.raises(
        OSError, match=r"Expected `output` to be a folder that can be written, but got '.*file'"
    ) as info:
        run.fit(attack, callback(run.folder / "file"))
    assert f"Give {callback.__name__} another `output`" in str(info.value)
    assert attack.iteration == 0


def test_a_read_only_disk_is_refused(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("leakage.files.whole.tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"Expected `output` to be a folder .* Read-only file system"):
        run.fit(run.attack(), VictimTable(run.folder))


def test_a_full_disk_does_not_end_the_run_but_is_told_at_its_end(run, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch)
    attack = run.attack()
    with (
        pytest.warns(UserWarning, match="Expected to write '.*part_0000.safetensors', but got: .*No space left"),
        pytest.raises(OSError, match=r"VictimTable to write all results, but got 2 files missing .*victims\.csv.*"),
    ):
        run.fit(attack, VictimTable(run.folder), Gallery(run.folder))
    assert len(attack.finished) == 6, "the results are still in memory"
    assert not [path for path in run.folder.rglob("*") if path.is_file()], "nothing half written"


def test_a_gallery_on_a_full_disk_too(run, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch)
    with (
        pytest.warns(UserWarning, match=r"Expected to write '.*gallery\.png'"),
        pytest.raises(OSError, match=r"Expected Gallery to write all results, but got 1 files missing"),
    ):
        run.fit(run.attack(), Gallery(run.folder))


def test_space_that_is_freed_in_time_loses_nothing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch)

    class Free(Callback):
        def on_train_batch_end(self, trainer, attack, outputs, batch, batch_idx) -> None:
            if attack.cohorts == 2:
                disk.full = False

    with pytest.warns(UserWarning, match="Expected to write"):
        run.fit(run.attack(), VictimTable(run.folder), Gallery(run.folder), Free())
    parts = [Reconstruction.load(path) for path in sorted(run.folder.glob("reconstructions/*"))]
    assert sorted(Reconstruction.cat(parts).ids.tolist()) == list(range(6))
    assert len((run.folder / "victims.csv").read_text().splitlines()) == 7
    assert (run.folder / "gallery.png").is_file()


def test_output_is_beside_the_loggers_files_by_default(run) -> None:
    logger = CSVLogger(run.folder, name="attack")
    callback = VictimTable()
    run.fit(run.attack(), callback, logger=logger)
    assert callback.folder == Path(logger.log_dir)
    assert (callback.folder / "victims.csv").is_file()


def test_output_is_the_trainers_folder_without_a_logger(run) -> None:
    callback = VictimTable()
    run.fit(run.attack(), callback)
    assert callback.folder == run.folder


def test_the_folder_is_not_known_before_setup() -> None:
    with pytest.raises(RuntimeError, match="Expected `folder` to be used after `setup`"):
        _ = ResultsCallback().folder


def test_only_rank_zero_writes(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", False)
    run.fit(run.attack(), VictimTable(run.folder), Gallery(run.folder))
    assert list(run.folder.iterdir()) == []
