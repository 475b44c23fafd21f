from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from leakage.checkpoints import WholeCheckpointIO

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
