from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from leakage.attacks import IDLGAttack
from leakage.callbacks.timed_checkpoint import TimedCheckpoint
from leakage.datamodules import Victims
from leakage.files.checkpoints import WholeCheckpointIO


def run(folder: Path, steps: int, ckpt_path: Path | None = None, *, lanes: int = 2) -> None:
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, plugins=[WholeCheckpointIO()],
        callbacks=[TimedCheckpoint(folder)], default_root_dir=folder,
    )  # fmt: skip
    attack = IDLGAttack(max_evaluations=50)
    victims = Victims("sample", victims=2, lanes=lanes)
    trainer.fit(attack, datamodule=victims, ckpt_path=None if ckpt_path is None else str(ckpt_path))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    run(folder, 2)
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("lanes", "kept", "best_loss"), torch.zeros(3), r"Expected the lanes .* 'best_loss' \(2,\) .* got \(3,\)"),
        (("lanes", "kept", "other"), torch.zeros(2), "Expected the lanes .* with .*'best_loss'.*, but got .*'other'"),
        (("lanes", "kept", "labels/probabilities"), torch.zeros(2, 1, 9), r"probabilities' \(2, 1, 10\) .*\(2, 1, 9\)"),
        (("lanes", "kept", "objective/0/scale"), torch.ones(2).double(), "scale' .* but got .* torch.float64"),
        (("queue",), 3, "Expected the state of an attack of a checkpoint as leakage writes it"),
    ],
)
def test_refuses_altered_contents(
    sound: Path, tmp_path: Path, place: tuple[str, ...], value: object, message: str
) -> None:
    held = torch.load(sound, weights_only=True)
    parent = held["leakage"]
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    torch.save(held, tmp_path / "altered.ckpt")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, 3, tmp_path / "altered.ckpt")


def test_refuses_one_without_some_of_the_victims(tmp_path: Path) -> None:
    run(tmp_path, 2, lanes=1)
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert held["leakage"]["queue"]["waiting"] == [1]
    held["leakage"]["queue"]["waiting"] = []
    torch.save(held, tmp_path / "altered.ckpt")
    with pytest.raises(ValueError, match="Expected a checkpoint of all 2 victims, but got 1"):
        run(tmp_path, 3, tmp_path / "altered.ckpt", lanes=1)


def test_goes_on_from_what_is_sound(sound: Path, tmp_path: Path) -> None:
    run(tmp_path, 3, sound)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["leakage"]["iteration"] == 3
