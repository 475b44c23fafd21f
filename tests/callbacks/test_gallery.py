from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image

from leakage.callbacks import Gallery, gallery


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What was asked to be drawn."""
    calls: list[dict] = []
    plot = gallery.plot_gallery

    def record(images, **kwargs):
        calls.append({"images": images, **kwargs})
        return plot(images, **kwargs)

    monkeypatch.setattr(gallery, "plot_gallery", record)
    return calls


def error(image: torch.Tensor, truth: torch.Tensor) -> float:
    return float((image - truth).abs().max())


def test_shows_truth_moments_and_final_of_the_first_victims(run, drawn) -> None:
    run.fit(run.attack(), Gallery(run.folder, victims=3, moments=(10, 20)))
    with Image.open(run.folder / "gallery.png") as picture:
        assert picture.size[0] > 500
    last = drawn[-1]
    assert last["columns"] == ["truth", "10", "20", "final"]
    assert last["rows"] == ["victim 0\n15 iterations", "victim 1\n25 iterations", "victim 2\n35 iterations"]
    for victim, (row, captions) in enumerate(zip(last["images"], last["captions"], strict=True)):
        truth, label = run.images[victim, 0], int(run.labels[victim, 0])
        assert error(row[0], truth) == 0
        assert error(row[1], truth) == pytest.approx(2.0**-10, rel=1e-3)
        assert (row[2] is None) == (victim == 0), "victim 0 was done before iteration 20"
        assert error(row[3], truth) < 2.0**-14
        assert captions[0] == f"label {label}"
        assert captions[3].endswith(f"dB, label {label}")
    # An error of 2^-15 everywhere.
    assert last["captions"][0][3].startswith("90.3 dB")


def test_a_moment_that_a_step_has_passed_tells_its_iteration(run, drawn) -> None:
    run.fit(run.attack(), Gallery(run.folder, victims=1, moments=(0, 4, 7)))
    # Five iterations a step: looked at 5 (4 has passed, 0 was skipped) and 10 (7 has passed).
    assert drawn[-1]["columns"] == ["truth", "4", "7", "final"]
    assert drawn[-1]["captions"][0][1:3] == ["at 5", "at 10"]
    assert error(drawn[-1]["images"][0][1], run.images[0, 0]) == pytest.approx(2.0**-5, rel=1e-3)


def test_looks_only_when_a_moment_may_be_reached(run) -> None:
    attack = run.attack()
    run.fit(attack, Gallery(run.folder, victims=4, moments=(10,)))
    # After the first step, when iteration 10 may be reached, and once at the end, of 13 steps.
    assert attack.looks == 3


def test_pairs_the_images_of_a_victim_with_the_truth(run_of_pairs, drawn) -> None:
    run_of_pairs.fit(run_of_pairs.attack(), Gallery(run_of_pairs.folder, victims=2, moments=(10,)))
    last = drawn[-1]
    assert last["rows"] == ["victim 0\n15 iterations"] * 2 + ["victim 1\n25 iterations"] * 2
    for row, (images, captions) in enumerate(zip(last["images"], last["captions"], strict=True)):
        truth, label = run_of_pairs.images[row // 2, row % 2], int(run_of_pairs.labels[row // 2, row % 2])
        assert error(images[0], truth) == 0
        assert error(images[1], truth) < 2e-3
        assert error(images[2], truth) < 1e-4
        assert captions[2].endswith(f"label {label}")


def test_has_no_more_rows_than_can_be_read(tmp_path, run_of_pairs, drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "_MOST_ROWS", 3)
    run_of_pairs.fit(run_of_pairs.attack(), Gallery(run_of_pairs.folder))
    assert len(drawn[-1]["rows"]) == 3


def test_without_ground_truth(run, drawn) -> None:
    run.fit(run.attack(), Gallery(run.folder, victims=2, moments=(10,)), truth=False)
    assert drawn[-1]["columns"] == ["10", "final"]
    assert drawn[-1]["captions"][0] == ["", f"label {int(run.labels[0, 0])}"]
    assert (run.folder / "gallery.png").is_file()


def test_shows_what_there_is_when_the_run_breaks_off(run, drawn) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(run.attack(fail_at=20), Gallery(run.folder, victims=3, moments=(10,)))
    last = drawn[-1]
    assert last["rows"] == ["victim 0\n15 iterations", "victim 1\n20 iterations", "victim 2\n20 iterations"]
    assert error(last["images"][0][0], run.images[0, 0]) == 0, "the truth, though no validation has been"
    assert last["captions"][0][2].startswith("90.3 dB")


def test_draws_again_only_when_something_is_new(run, drawn) -> None:
    run.fit(run.attack(), Gallery(run.folder, victims=1, moments=()), val_check_interval=2)
    assert len(drawn) == 1


def test_snapshots_survive_a_resume(run, drawn) -> None:
    class StopAt(Callback):
        def on_train_batch_end(self, trainer, attack, outputs, batch, batch_idx) -> None:
            if attack.iteration == 20:
                raise KeyboardInterrupt

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(run.folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")

    def gallery() -> Gallery:
        return Gallery(run.folder, victims=3, moments=(5, 10, 20, 30))

    run.fit(run.attack(), gallery())
    whole = drawn[-1]
    kept = Path(run.folder / "checkpoints")
    with pytest.raises(SystemExit):
        run.fit(run.attack(), gallery(), saver(), StopAt(), enable_checkpointing=True)
    third = sorted(kept.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    attack = run.attack()
    run.fit(attack, gallery(), saver(), enable_checkpointing=True, resume=third)
    resumed = drawn[-1]
    assert attack.iteration == 65
    assert resumed["captions"] == whole["captions"]
    assert resumed["rows"] == whole["rows"]
    for row, expected in zip(resumed["images"], whole["images"], strict=True):
        for image, other in zip(row, expected, strict=True):
            assert (image is None) == (other is None)
            assert image is None or torch.equal(image, other)


def test_a_second_run_forgets_the_first(run, drawn) -> None:
    callback = Gallery(run.folder, victims=2, moments=(10,))
    run.fit(run.attack(), callback)
    run.images = 1 - run.images
    run.fit(run.attack(), callback)
    assert error(drawn[-1]["images"][0][0], run.images[0, 0]) == 0
    assert error(drawn[-1]["images"][0][1], run.images[0, 0]) < 2e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"victims": 0}, "Expected `victims` to be a whole number of at least 1, but got 0"),
        ({"moments": (0, -1)}, "Expected `moments` to be a whole number of at least 0, but got -1"),
        ({"moments": (1.5,)}, "Expected `moments` to be a whole number of at least 0, but got 1.5"),
        ({"moments": 5}, "Expected `moments` as a list of whole numbers, but got 5"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gallery(**arguments)
