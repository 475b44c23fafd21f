from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from lightning import Trainer

from leakage.files.checkpoints import WholeCheckpointIO, part_of, parts_of

CHECKPOINT = {"leakage": {"iteration": 3}, "state_dict": {"images": torch.arange(4.0)}}


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "new" / "last.ckpt")
    read = WholeCheckpointIO().load_checkpoint(tmp_path / "new" / "last.ckpt")
    assert read["leakage"] == CHECKPOINT["leakage"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left, says torch")])
def test_a_full_disk_is_told_with_the_path_and_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, path)

    def full(checkpoint: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match=r"Expected to write the checkpoint '.*last.ckpt', but got: .*No space left"):
        WholeCheckpointIO().save_checkpoint({"leakage": {"iteration": 4}}, path)
    assert WholeCheckpointIO().load_checkpoint(path)["leakage"] == CHECKPOINT["leakage"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_refuses_a_truncated_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"Expected a whole checkpoint of leakage at '.*last.ckpt', but got a"):
            WholeCheckpointIO().load_checkpoint(path)


def test_runs_no_code_from_one(tmp_path: Path) -> None:
    torch.save({"leakage": Path("x")}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="truncated or of another kind"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)


def test_parts_are_those_of_the_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "step=2[0].ckpt"  # with what a pattern would take for its own
    expected = [part_of(path, process) for process in (1, 2, 11)]
    assert part_of(str(path), 0) == path
    assert [part.name for part in expected] == [f"step=2[0].ckpt.{process}" for process in (1, 2, 11)]
    assert parts_of(path) == []
    for part in [path, *expected]:
        part.touch()
    others = ["step=20.ckpt.1", "step=20.ckpt", "step=2[0].ckpt.1.77.partial", "step=2[0].ckpt.old", "step=2[0].1"]
    for name in others:
        (tmp_path / name).touch()
    assert set(parts_of(str(path))) == set(expected)


def test_slurm_s_checkpoints_keep_their_versions(tmp_path: Path) -> None:
    path = tmp_path / "hpc_ckpt_1.ckpt"
    for one in (path, part_of(path, 1), part_of(path, 2)):
        WholeCheckpointIO().save_checkpoint({}, one)
    assert parts_of(path) == [tmp_path / "hpc_part_1.ckpt.1", tmp_path / "hpc_part_1.ckpt.2"]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    assert trainer._checkpoint_connector._hpc_resume_path == str(path)


def test_parts_of_a_path_that_another_begins_with(tmp_path: Path) -> None:
    for name in ("last", "last.1", "last.ckpt", "last.ckpt.1"):
        (tmp_path / name).touch()
    assert parts_of(tmp_path / "last") == [tmp_path / "last.1"]
