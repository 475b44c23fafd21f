from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leakage.callbacks import SyntheticImages, condensation_images, read_accuracies
from leakage.condensation import GradientMatchingCondensation, SyntheticSet, matching
from tests.callbacks.condensation_runs import At, Copies, fail, fit, interrupt, module, quick


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Of which images the picture of each title is."""
    shown: dict[str, torch.Tensor] = {}
    figure = SyntheticSet.figure

    def record(self: SyntheticSet, images_per_class: int = 10, title: str = ""):
        shown[title] = self.images
        return figure(self, images_per_class, title)

    monkeypatch.setattr(SyntheticSet, "figure", record)
    return shown


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """No file can be written as long as the list holds something."""
    full = [True]
    replace = Path.replace

    def move(path: Path, target: Path) -> Path:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", move)
    return full


def test_writes_the_images_at_moments_and_at_the_end(tmp_path: Path, figures) -> None:
    condensation, copies = module(iterations=5), Copies()
    fit(condensation, SyntheticImages(tmp_path, moments=(0, 3)), copies)
    names = [f"iteration_{moment:06d}.png" for moment in (0, 3, 5)]
    assert [path.name for path in sorted((tmp_path / "synthetic").iterdir())] == names
    assert list(figures) == ["stripes: 0 iterations", "stripes: 3 iterations", "stripes: 5 iterations"]
    for moment, images in zip((0, 3, 5), figures.values(), strict=True):
        assert images.equal(copies.of[moment])
    assert not copies.of[3].equal(copies.of[5])
    assert (tmp_path / "synthetic.png").read_bytes() == (tmp_path / "synthetic" / names[-1]).read_bytes()


def test_the_saved_set_is_the_one_the_run_holds(tmp_path: Path) -> None:
    condensation = module(images_per_class=2)
    fit(condensation, SyntheticImages(tmp_path))
    saved, held = SyntheticSet.load(tmp_path / "synthetic.safetensors"), condensation.synthetic_set()
    assert saved.images.equal(held.images)
    assert (saved.labels.tolist(), saved.class_names, saved.dataset) == (
        [0, 0, 1, 1, 2, 2],
        held.class_names,
        "stripes",
    )
    assert (saved.mean, saved.std) == (held.mean, held.std)


def test_the_set_on_disk_keeps_up_with_the_moments(tmp_path: Path) -> None:
    copies, found = Copies(), {}

    def read(trainer: Trainer, condensation: GradientMatchingCondensation) -> None:
        found[condensation.step] = SyntheticSet.load(tmp_path / "synthetic.safetensors").images

    steps = [At(step, read) for step in (1, 2, 3)]
    fit(module(), SyntheticImages(tmp_path, moments=(0, 2)), copies, *steps)
    assert found[1].equal(copies.of[0])
    assert found[2].equal(copies.of[2])
    assert found[3].equal(copies.of[2])


@pytest.mark.parametrize("end", [fail, interrupt], ids=["error", "interrupt"])
def test_a_run_that_breaks_off_leaves_its_last_images(tmp_path: Path, end, figures) -> None:
    condensation = module()
    with pytest.raises((RuntimeError, SystemExit)):
        fit(condensation, SyntheticImages(tmp_path, moments=()), At(3, end))
    assert SyntheticSet.load(tmp_path / "synthetic.safetensors").images.equal(condensation.synthetic_set().images)
    assert list(figures) == ["stripes: 3 iterations"]


def test_within_an_iteration_there_is_no_picture_of_the_iteration(tmp_path: Path) -> None:
    condensation = module(loops=(3, 1))
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(condensation, SyntheticImages(tmp_path, moments=(1,)), At(4, fail))
    assert condensation.iteration == 1
    assert [path.name for path in (tmp_path / "synthetic").iterdir()] == ["iteration_000001.png"]
    assert (tmp_path / "synthetic.png").read_bytes() != (tmp_path / "synthetic" / "iteration_000001.png").read_bytes()
    assert SyntheticSet.load(tmp_path / "synthetic.safetensors").images.equal(condensation.synthetic_set().images)


@pytest.mark.parametrize("end", [fail, interrupt], ids=["error", "interrupt"])
def test_within_a_step_there_is_no_picture_of_the_iteration(tmp_path: Path, monkeypatch, end) -> None:
    """The first step of an iteration moves the images before it counts."""
    condensation, calls = module(network_reuse=3), []

    def break_off(*args: Any, **options: Any):
        calls.append(condensation.synthetic_set().images)
        return end() if len(calls) == 2 else match(*args, **options)

    match = matching.match
    monkeypatch.setattr(matching, "match", break_off)
    picture, found = tmp_path / "synthetic" / "iteration_000000.png", []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            found.append(picture.read_bytes())

    with pytest.raises((RuntimeError, SystemExit)):
        fit(condensation, SyntheticImages(tmp_path, moments=(0,)), Look())
    start, moved = calls
    assert condensation.step == 0
    assert not moved.equal(start)
    assert [picture.read_bytes()] == found
    assert [path.name for path in (tmp_path / "synthetic").iterdir()] == [picture.name]
    assert SyntheticSet.load(tmp_path / "synthetic.safetensors").images.equal(moved)
    assert (tmp_path / "synthetic.png").read_bytes() != picture.read_bytes()


def test_an_iteration_of_several_steps_is_looked_at_when_it_is_complete(tmp_path: Path, figures) -> None:
    copies = Copies()
    fit(module(iterations=2, loops=(3, 1)), SyntheticImages(tmp_path, moments=(1,)), copies)
    assert figures["stripes: 1 iterations"].equal(copies.of[3])
    assert figures["stripes: 2 iterations"].equal(copies.of[6])
    assert len(figures) == 2


def test_a_refused_checkpoint_leaves_the_files_alone(tmp_path: Path) -> None:
    """The module has started anew by then, and its images are noise."""
    trainer = fit(module(), SyntheticImages(tmp_path))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    before = (tmp_path / "synthetic.safetensors").read_bytes()
    with pytest.raises(ValueError, match="seed"):
        fit(module(seed=1), SyntheticImages(tmp_path), quick(tmp_path), resume=tmp_path / "run.ckpt")
    assert (tmp_path / "synthetic.safetensors").read_bytes() == before
    assert not (tmp_path / "accuracy.csv").exists()


def test_a_resumed_run_keeps_the_earlier_pictures(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    fit(module(), SyntheticImages(tmp_path, moments=(1,)), At(2, lambda t, m: t.save_checkpoint(tmp_path / "run.ckpt")))
    first = SyntheticSet.load(tmp_path / "synthetic.safetensors").images
    (tmp_path / "synthetic" / "iteration_000004.png").unlink()
    fit(module(), SyntheticImages(tmp_path, moments=(1,)), resume=tmp_path / "run.ckpt")
    names = [path.name for path in sorted((tmp_path / "synthetic").iterdir())]
    assert names == ["iteration_000001.png", "iteration_000004.png"]
    assert SyntheticSet.load(tmp_path / "synthetic.safetensors").images.equal(first)
    assert not [str(warning.message) for warning in recwarn if "earlier run" in str(warning.message)]


def test_a_new_run_replaces_an_earlier_one_after_a_warning(tmp_path: Path) -> None:
    fit(module(iterations=5), SyntheticImages(tmp_path), quick(tmp_path))
    with pytest.warns(UserWarning, match="results of an earlier run") as warned:
        fit(module(iterations=2), SyntheticImages(tmp_path), quick(tmp_path))
    told = [str(warning.message) for warning in warned if "earlier run" in str(warning.message)]
    assert any("'synthetic.safetensors' is one" in line or "iteration_000000.png' is one" in line for line in told)
    assert any("give SyntheticEvaluation another `output`" in line for line in told)
    names = [path.name for path in sorted((tmp_path / "synthetic").iterdir())]
    assert names == ["iteration_000000.png", "iteration_000002.png"]
    assert read_accuracies(tmp_path / "accuracy.csv")[:, 0].tolist() == [0, 2]


def test_an_earlier_run_is_kept_until_there_is_something_new(tmp_path: Path) -> None:
    fit(module(iterations=5), SyntheticImages(tmp_path), quick(tmp_path))
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files]
    stopped = module()
    stopped.training_step = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    callbacks = [SyntheticImages(tmp_path, moments=(1,)), quick(tmp_path, at=(1,))]
    for callback in callbacks:  # what there is when it breaks off is nothing new
        callback.on_exception = lambda *_: None
    with pytest.warns(UserWarning, match="earlier run"), pytest.raises(RuntimeError, match="out of memory"):
        fit(stopped, *callbacks)
    assert [path.read_bytes() for path in files] == before


def test_images_that_are_no_pictures_are_kept_as_numbers(tmp_path: Path) -> None:
    fit(module(channels=2), SyntheticImages(tmp_path), channels=2)
    assert SyntheticSet.load(tmp_path / "synthetic.safetensors").image_shape == (2, 8, 8)


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, full_disk) -> None:
    condensation = module()
    with (
        pytest.warns(UserWarning, match=r"Expected to write '.*synthetic\.safetensors'"),
        pytest.raises(OSError, match="Expected SyntheticImages to write all results, but got 4 files missing"),
    ):
        fit(condensation, SyntheticImages(tmp_path, moments=(1,)), quick(tmp_path))
    assert condensation.iteration == 4


def test_space_that_is_freed_in_time_loses_nothing(tmp_path: Path, full_disk) -> None:
    evaluation = quick(tmp_path, at=(1,))
    with pytest.warns(UserWarning, match="Expected to write"):
        fit(module(), SyntheticImages(tmp_path, moments=(1,)), evaluation, At(2, lambda *_: full_disk.clear()))
    names = [path.name for path in sorted((tmp_path / "synthetic").iterdir())]
    assert names == ["iteration_000001.png", "iteration_000004.png"]
    assert len(read_accuracies(tmp_path / "accuracy.csv")) == 2


def test_the_grid_is_logged_with_the_step(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(module(loops=(2, 1), network_reuse=3), SyntheticImages(tmp_path, moments=(0, 2)), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Images("synthetic")] == [0, 4, 8]


def test_the_set_becomes_an_artifact_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    def record(trainer: Trainer, name: str, paths: list[Path], metadata: dict[str, Any]) -> None:
        calls.append((name, paths, metadata))

    monkeypatch.setattr(condensation_images, "log_artifact", record)
    fit(module(images_per_class=2), SyntheticImages(tmp_path))
    ((name, paths, metadata),) = calls
    assert name == "synthetic-stripes-2"
    assert [path.name for path in paths] == ["synthetic.safetensors", "synthetic.png"]
    assert metadata == {"dataset": "stripes", "images_per_class": 2, "iterations": 4}
