"""Several ways to make a small training set, side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from condensing import condense, format_table  # in experiments/condensation, which conftest.py has put on the path

from leakage.callbacks import read_accuracies
from leakage.condensation import (
    GradientMatchingCondensation,
    SiameseAugmentation,
    SyntheticSet,
    evaluate,
    evaluate_full,
    random_images,
)
from leakage.datamodules import LabelledImages
from leakage.models import ConvNet

FEW: dict[str, Any] = {
    "iterations": 2, "networks": 2, "moments": (1,), "epochs": 2, "full_epochs": 1,
    "accelerator": "cpu", "enable_progress_bar": False,
}  # fmt: skip


def network() -> ConvNet:
    return ConvNet(width=4)


def run(output: Path, methods: list[str], **options: Any) -> Any:
    return condense(methods, LabelledImages("sample", batch_size=4), output, network=network(), **{**FEW, **options})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("condense")
    return folder, run(folder, ["dc", "fast", "random", "full"], published={"dc": 0.705})


def test_a_row_per_method_with_what_it_measured(done: tuple[Path, Any]) -> None:
    folder, rows = done
    assert [row.method for row in rows] == ["dc", "fast", "random", "full"]
    assert [row.images_per_class for row in rows] == [1, 1, 1, None]
    assert [row.iterations for row in rows] == [2, 2, None, None]
    assert [row.published_accuracy for row in rows] == [0.705, None, None, None]
    saved = json.loads((folder / "summary.json").read_text())
    assert [row["accuracy_mean"] for row in saved] == [row.accuracy_mean for row in rows]
    # Each figure is that of the set that was saved.
    options = {"network": network(), "networks": 2, "epochs": 2, "device": "cpu", "progress": False}
    for row in rows[:3]:
        synthetic = SyntheticSet.load(folder / row.method / "synthetic.safetensors")
        assert evaluate(synthetic, LabelledImages("sample"), **options).mean == row.accuracy_mean
    assert torch.equal(synthetic.images, random_images(LabelledImages("sample"), 1, 0).images)
    full = evaluate_full(LabelledImages("sample"), network=network(), epochs=1, device="cpu", progress=False)
    assert (rows[3].accuracy_mean, rows[3].networks) == (full.mean, 1)
    assert math.isnan(rows[3].accuracy_std)


def test_the_files(done: tuple[Path, Any]) -> None:
    folder, _ = done
    first = SyntheticSet.load(folder / "dc" / "synthetic.safetensors")
    assert torch.equal(SyntheticSet.load(folder / "synthetic.safetensors").images, first.images)
    for name in ("accuracy.png", "synthetic.png"):
        assert (folder / name).stat().st_size > 1000
    assert read_accuracies(folder / "fast" / "accuracy.csv")[:, 0].tolist() == [1, 2]
    assert not list(folder.rglob("last.ckpt")), "no checkpoints of what is finished"


def test_the_table(done: tuple[Path, Any]) -> None:
    lines = format_table(done[1]).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("dc ")
    assert "70.5 %" in lines[1]
    assert lines[4].split()[:2] == ["full", "all"]


def test_resuming_takes_what_is_finished_and_makes_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"augmentation": SiameseAugmentation.mnist_evaluation()}
    first = run(tmp_path, ["random"], **options)
    path = tmp_path / "random" / "run.json"
    written = path.stat().st_mtime_ns
    both = run(tmp_path, ["random", "dc"], resume=True, augmentation=SiameseAugmentation.mnist_evaluation())
    assert both[0] == first[0]
    assert path.stat().st_mtime_ns == written
    assert run(tmp_path, ["random", "dc"], resume=True, **options) == both
    with pytest.raises(ValueError, match=r"differs in `test\.augmentation`"):
        run(tmp_path, ["random"], resume=True)
    with pytest.raises(ValueError, match=r"differs in `condensation\.seed`: 0 there, 1 here"):
        run(tmp_path, ["dc"], resume=True, seed=1, **options)


def test_a_stopped_condensation_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", ["dc"])
    monkeypatch.setattr("condensing.TimedCheckpoint.__init__.__defaults__", (None, 1e-9))
    with monkeypatch.context() as stopping:
        calls: list[int] = []
        original = GradientMatchingCondensation.training_step

        def stop(self: Any, batch: Any, batch_idx: int) -> None:
            if calls:
                raise OSError("the power went")
            calls.append(batch_idx)
            original(self, batch, batch_idx)

        stopping.setattr(GradientMatchingCondensation, "training_step", stop)
        with pytest.raises(OSError, match="the power went"):
            run(tmp_path / "stopped", ["dc"])
    assert (tmp_path / "stopped" / "dc" / "last.ckpt").is_file()
    resumed = run(tmp_path / "stopped", ["dc"], resume=True)
    assert resumed[0].accuracy_mean == whole[0].accuracy_mean
    sets = [SyntheticSet.load(tmp_path / name / "dc" / "synthetic.safetensors") for name in ("whole", "stopped")]
    assert torch.equal(sets[0].images, sets[1].images)


def test_dsa_trains_the_networks_of_its_test_with_its_own_augmentation(tmp_path: Path) -> None:
    (row,) = run(tmp_path, ["dsa"], moments=(), augmentation=SiameseAugmentation.mnist_evaluation())
    synthetic = SyntheticSet.load(tmp_path / "synthetic.safetensors")
    options = {"network": network(), "networks": 2, "epochs": 2, "device": "cpu", "progress": False}
    assert (
        row.accuracy_mean
        == evaluate(synthetic, LabelledImages("sample"), augmentation=SiameseAugmentation(), **options).mean
    )


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ([], {}, "Expected `methods` to name at least one method, but got none"),
        (["dm"], {}, r"Expected `methods` to be one of \['dc', 'dsa', 'fast', 'full', 'random'\], but got 'dm'"),
        (["dc"], {"images_per_class": 0}, "Expected `images_per_class` to be a whole number of at least 1"),
        (["dc"], {"images_per_class": 7}, r"Expected `loops` \(outer, inner\) with images_per_class=7"),
        (["random"], {"images_per_class": 81}, "Expected `images_per_class` of at most 80"),
        (["dc"], {"accelerator": "abacus"}, "Expected options that the Trainer takes, but got accelerator='abacus'"),
    ],
)
def test_refuses(tmp_path: Path, methods: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, methods, **options)


def test_any_loops(tmp_path: Path) -> None:
    (row,) = run(tmp_path, ["dc"], images_per_class=2, loops=(2, 1), iterations=1, moments=())
    assert row.images_per_class == 2
    assert torch.equal(read_accuracies(tmp_path / "dc" / "accuracy.csv")[:, 0], torch.tensor([1.0]).double())


def test_what_is_bad_is_told_before_the_first_method_is_run(tmp_path: Path) -> None:
    for options in ({"images_per_class": 81, "loops": (1, 1)}, {"epochs": 0}, {"moments": (-1,)}):
        with pytest.raises(ValueError, match="Expected"):
            run(tmp_path, ["dc", "random"], **options)
        assert not (tmp_path / "dc" / "run.json").exists()


def test_a_method_that_fails_leaves_what_the_others_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, ["dc"], moments=())

    def diverge(*args: Any, **options: Any) -> Any:
        raise FloatingPointError("Expected finite losses, but got nan")

    monkeypatch.setattr("condensing.evaluate_full", diverge)
    with pytest.raises(FloatingPointError):
        run(tmp_path, ["random", "full"])
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert row["method"] == "random"
    assert not (tmp_path / "accuracy.png").exists(), "that of the earlier run"
    assert (tmp_path / "dc" / "run.json").exists(), "of a method that was not asked for"


def test_only_what_a_run_writes_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "thesis.txt").write_text("mine")
    run(tmp_path, ["random"])
    assert (tmp_path / "random" / "thesis.txt").read_text() == "mine"


def test_the_whole_set_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path / "a", ["full"], cache=tmp_path / "cache")
    monkeypatch.setattr("leakage.condensation.evaluation.train_and_test", None)
    again = run(tmp_path / "b", ["full"], cache=tmp_path / "cache")
    assert again[0].accuracy_mean == first[0].accuracy_mean
