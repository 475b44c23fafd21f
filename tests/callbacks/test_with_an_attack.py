"""The callbacks on a real attack on real images, from its first step to its end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from leakage.attacks import IDLGAttack
from leakage.callbacks import AttackProgressBar, Gallery, VictimTable, gallery
from leakage.datamodules import Victims
from leakage.inversion.reconstruction import Reconstruction


def fit(folder: Path, *callbacks: Callback, max_steps: int = -1) -> IDLGAttack:
    attack = IDLGAttack()
    trainer = Trainer(
        max_epochs=1,
        max_steps=max_steps,
        callbacks=[AttackProgressBar(), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(attack, datamodule=Victims("sample", victims=5, lanes=3))
    return attack


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "victims.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_seen_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    drawn = []
    plot = gallery.plot_gallery
    monkeypatch.setattr(
        gallery, "plot_gallery", lambda images, **kwargs: drawn.append((images, kwargs)) or plot(images, **kwargs)
    )
    attack = fit(tmp_path, Gallery(tmp_path, victims=4), VictimTable(tmp_path))

    images, kwargs = drawn[-1]
    assert kwargs["columns"][:4] == ["truth", "start", "10", "20"]
    assert len(images) == 4
    for row in images:
        errors = [float((image - row[0]).square().mean()) for image in row[1:] if image is not None]
        assert errors[0] > 1e-2, "the start is noise"
        assert errors[-1] < 1e-3, "the end is the image"
    assert not any(caption.startswith("at ") for captions in kwargs["captions"] for caption in captions)

    assert sorted(int(row["victim"]) for row in rows(tmp_path)) == list(range(5))
    for row in rows(tmp_path):
        assert float(row["mse"]) == pytest.approx(attack.scores[int(row["victim"])].mse, rel=1e-6)
        assert row["success"] == "1"
        assert row["labels_true"] == row["labels_recovered"]
    parts = [Reconstruction.load(path) for path in sorted(tmp_path.glob("reconstructions/*"))]
    together = Reconstruction.cat(parts)
    assert sorted(together.ids.tolist()) == list(range(5))
    for victim, image in zip(together.ids.tolist(), together.images, strict=True):
        finished = attack.finished
        assert torch.equal(image, finished.images[finished.ids.tolist().index(victim)])
    assert "5/5" in capsys.readouterr().out


def test_ctrl_c_leaves_the_scores_of_what_is_done(tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, attack, outputs, batch, batch_idx) -> None:
            if attack.num_done:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(tmp_path, Gallery(tmp_path), VictimTable(tmp_path), Interrupt())
    done = [row for row in rows(tmp_path) if row["status"] != "running"]
    running = [row for row in rows(tmp_path) if row["status"] == "running"]
    assert 1 <= len(done) < 5
    unfinished = Reconstruction.load(tmp_path / "reconstructions" / "unfinished.safetensors")
    assert unfinished.ids.tolist() == [int(row["victim"]) for row in running] != []
    assert all(float(row["mse"]) > 0 for row in running)
    assert all(row["success"] == "1" and row["labels_true"] == row["labels_recovered"] for row in done)
    assert (tmp_path / "gallery.png").is_file()


def test_the_trainers_own_limit_loses_no_victim(tmp_path: Path) -> None:
    attack = fit(tmp_path, VictimTable(tmp_path), max_steps=20)
    assert attack.num_done == 0
    assert [row["status"] for row in rows(tmp_path)] == ["running"] * 3
    unfinished = Reconstruction.load(tmp_path / "reconstructions" / "unfinished.safetensors")
    assert torch.equal(unfinished.images, attack.current().images)
