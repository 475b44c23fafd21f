"""A run that is interrupted anywhere ends with the same bits as one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from leakage.callbacks.timed_checkpoint import TimedCheckpoint
from leakage.condensation import DistributionMatchingCondensation, GradientMatchingCondensation
from leakage.files.checkpoints import WholeCheckpointIO

INNER: dict[str, Any] = {"loops": (3, 2), "iterations": 2, "network_batch_size": 4}
RUNS: dict[str, dict[str, Any]] = {
    "one step per network": {"images_per_class": 1, "iterations": 4},
    "inner loop": {"images_per_class": 2, **INNER},
    "augmentation and reuse": {"images_per_class": 2, "augmentation": "color_crop_flip", "network_reuse": 2, **INNER},
    "decay, real start, strong momentum": {
        "images_per_class": 1, "decay": True, "initialization": "real", "momentum": 0.9, "network_reuse": 3, **INNER
    },
    "several images in one": {
        "images_per_class": 1, "iterations": 9, "pool": 1, "factor": 2, "synthetic_batch_size": 3,
        "initialization": "real",
    },
    "pool, new networks": {"images_per_class": 1, "iterations": 13, "pool": 1, "pool_passes": 2},
    "pool": {"images_per_class": 3, "iterations": 17, "pool": 2, "decay": True, "augmentation": "color_crop_flip"},
    "distribution matching": {
        "kind": DistributionMatchingCondensation, "images_per_class": 2, "iterations": 5, "network_reuse": 2
    },
    "distribution matching on a pool": {
        "kind": DistributionMatchingCondensation, "images_per_class": 1, "iterations": 9, "pool": 1, "factor": 2,
        "synthetic_batch_size": 3, "initialization": "noise", "decay": True,
    },
    "real images from clusters": {
        "images_per_class": 2, "real_images": "kmeans", "data_batch_size": 2, "augmentation": "color_crop_flip", **INNER
    },
    "real images from clusters on a pool": {
        "images_per_class": 1, "real_images": "kmeans", "data_batch_size": 2, "pool": 2, "iterations": 17
    },
}  # fmt: skip


def every_step(folder: Path) -> dict[str, Any]:
    """Options of a Trainer that keeps a checkpoint of each step, at which the images have made some updates."""
    saver = ModelCheckpoint(
        folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", save_on_train_epoch_end=False
    )
    return {"enable_checkpointing": True, "callbacks": [saver], "plugins": [WholeCheckpointIO()]}


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))


@pytest.mark.parametrize(
    ("run", "norm"),
    [
        *((run, "instance") for run in RUNS),
        ("inner loop", "batch"),
        ("pool", "batch"),
        ("distribution matching", "batch"),
    ],
)
def test_resumes_bit_for_bit_from_every_step(kit: Any, run: str, norm: str, tmp_path: Path) -> None:
    options = RUNS[run]
    whole = kit.condense(network=kit.network(norm=norm), **options, trainer=every_step(tmp_path))
    plain = kit.condense(network=kit.network(norm=norm), **options)
    assert torch.equal(kit.images(whole), kit.images(plain)), "writing checkpoints changes nothing"
    paths = checkpoints(tmp_path)
    assert len(paths) == whole.step == whole.outer * options["iterations"]
    for done, path in list(enumerate(paths, start=1))[:: max(1, len(paths) // 3)]:
        trainer = {"plugins": [WholeCheckpointIO()]}
        resumed = kit.condense(network=kit.network(norm=norm), **options, ckpt_path=str(path), trainer=trainer)
        assert torch.equal(kit.images(resumed), kit.images(whole)), f"after step {done}"
        assert resumed.last_loss == whole.last_loss
        assert resumed.iteration == whole.iteration == options["iterations"]


@pytest.mark.parametrize("run", ["augmentation and reuse", "distribution matching", "real images from clusters"])
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_resumes_bit_for_bit_in_other_precisions(kit: Any, precision: str, run: str, tmp_path: Path) -> None:
    options = RUNS[run]
    whole = kit.condense(**options, trainer={"precision": precision} | every_step(tmp_path))
    paths = checkpoints(tmp_path)
    assert len(paths) == whole.step > 1
    for path in paths[1::3]:
        resumed = kit.condense(**options, ckpt_path=str(path), trainer={"precision": precision})
        assert torch.equal(kit.images(resumed), kit.images(whole)), path


def test_resumes_again_and_again(kit: Any, tmp_path: Path) -> None:
    options = RUNS["inner loop"]
    whole = kit.condense(**options)
    path = None
    for limit in (1, 2, 4, 5, -1):
        run = GradientMatchingCondensation(network=kit.network(), **options)
        trainer = kit.trainer(max_steps=limit)
        trainer.fit(run, datamodule=kit.data(batch_size=6), ckpt_path=path)
        assert run.step == (6 if limit == -1 else limit)
        path = str(tmp_path / f"{limit}.ckpt")
        trainer.save_checkpoint(path)
    assert torch.equal(kit.images(run), kit.images(whole))


def test_how_far_it_is_survives(kit: Any, tmp_path: Path) -> None:
    options = RUNS["inner loop"]
    kit.condense(**options, trainer=every_step(tmp_path))
    path = checkpoints(tmp_path)[3]
    saved = torch.load(path, weights_only=True)["leakage"]
    assert saved["step"] == 4
    run = kit.condense(**options, ckpt_path=str(path), trainer={"max_steps": 4})
    assert (run.step, run.iteration) == (4, 1)
    assert run.seconds == saved["seconds"]
    resumed = kit.condense(**options, ckpt_path=str(path))
    assert all(resumed.seconds[part] >= seconds for part, seconds in saved["seconds"].items())
    assert resumed.seconds["real"] > saved["seconds"]["real"]


def test_a_run_that_is_complete_ends_at_once(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RUNS["inner loop"]
    whole = kit.condense(**options, trainer=every_step(tmp_path))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a step was made")

    monkeypatch.setattr(GradientMatchingCondensation, "_move", refuse)
    again = kit.condense(**options, ckpt_path=str(checkpoints(tmp_path)[-1]))
    assert torch.equal(kit.images(again), kit.images(whole))
    assert (again.iteration, again.last_loss) == (2, whole.last_loss)


@pytest.mark.parametrize("moment", ["last step", "end of the epoch", "after the run"])
@pytest.mark.parametrize("loops", [(1, 1), (2, 2)])
def test_a_run_that_was_complete_goes_on_with_more_iterations(
    kit: Any, loops: tuple[int, int], moment: str, tmp_path: Path
) -> None:
    savers = {"filename": "{step}", "save_top_k": -1}
    if moment == "last step":
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_on_train_epoch_end=False, **savers)
    else:
        saver = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True, **savers)
    few = GradientMatchingCondensation(network=kit.network(), iterations=2, loops=loops)
    trainer = kit.trainer(enable_checkpointing=True, callbacks=[saver])
    trainer.fit(few, datamodule=kit.data(batch_size=6))
    path = checkpoints(tmp_path)[-1]
    if moment == "after the run":
        path = tmp_path / "after.ckpt"
        trainer.save_checkpoint(path)
    more = kit.condense(iterations=4, loops=loops, ckpt_path=str(path))
    assert more.iteration == 4
    assert torch.equal(kit.images(more), kit.images(kit.condense(iterations=4, loops=loops)))


def test_fewer_iterations_than_it_has_made_are_no_more_to_do(kit: Any, tmp_path: Path) -> None:
    whole = kit.condense(iterations=4, trainer=every_step(tmp_path))
    third = kit.condense(iterations=2, ckpt_path=str(checkpoints(tmp_path)[2]))
    assert third.iteration == 3
    assert not torch.equal(kit.images(third), kit.images(whole))


def test_refuses_a_checkpoint_of_another_method(kit: Any, checkpoint: str) -> None:
    message = "Expected a checkpoint of DistributionMatchingCondensation, but got one of GradientMatchingCondensation"
    with pytest.raises(ValueError, match=message):
        kit.condense(2, kind=DistributionMatchingCondensation, iterations=2, ckpt_path=checkpoint)


@pytest.fixture
def checkpoint(kit: Any, tmp_path: Path) -> str:
    kit.condense(2, loops=(2, 1), iterations=2, trainer=every_step(tmp_path))
    return str(checkpoints(tmp_path)[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images_per_class": 1}, r"configuration of the checkpoint.*images_per_class=2 \(now 1\)"),
        ({"loops": (2, 2)}, r"loops=\(2, 1\) \(now \(2, 2\)\)"),
        ({"seed": 1}, r"seed=0 \(now 1\)"),
        ({"distance": "squared"}, r"distance='row_cosine' \(now 'squared'\)"),
        ({"augmentation": "flip"}, r"augmentation=None \(now 'flip'\)"),
        ({"learning_rate": 0.2}, r"learning_rate=None \(now 0.2\)"),
        ({"real_images": "kmeans", "data_batch_size": 5}, r"real_images=None \(now 'kmeans'\)"),
        ({"trainer": {"precision": "64-true"}}, "Expected the checkpoint's precision '32-true', but got '64-true'"),
    ],
)
def test_refuses_a_checkpoint_of_another_configuration(
    kit: Any, checkpoint: str, changed: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"images_per_class": 2, "loops": (2, 1), "iterations": 2} | changed
    with pytest.raises(ValueError, match=message):
        kit.condense(**options, ckpt_path=checkpoint)


def test_refuses_a_checkpoint_of_another_network(kit: Any, checkpoint: str) -> None:
    for other in (kit.network(width=8), kit.network(activation="sigmoid"), kit.network(norm="none")):
        with pytest.raises(
            ValueError, match="Expected the network of the checkpoint, but got one of another architecture"
        ):
            kit.condense(2, loops=(2, 1), iterations=2, network=other, ckpt_path=checkpoint)


def test_refuses_a_checkpoint_of_a_network_of_another_width(kit: Any, tmp_path: Path) -> None:
    """Also where its layers print alike."""

    class Bare(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.zeros(64, width)), nn.Parameter(torch.zeros(width, 3))

        def reset_parameters(self) -> None:
            nn.init.normal_(self.first)
            nn.init.normal_(self.second)

        def forward(self, images: Tensor) -> Tensor:
            return (images.flatten(1) @ self.first).relu() @ self.second

    run = kit.condense(1, loops=(1, 1), iterations=1, network=Bare(4))
    path = tmp_path / "bare.ckpt"
    run.trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match="Expected the network of the checkpoint, but got one of another architecture"):
        kit.condense(1, loops=(1, 1), iterations=1, network=Bare(5), ckpt_path=str(path))


def test_refuses_a_checkpoint_of_other_data(kit: Any, checkpoint: str) -> None:
    with pytest.raises(
        ValueError, match="Expected a checkpoint of the same data, but got seed 0 in the checkpoint and 1"
    ):
        kit.condense(2, loops=(2, 1), iterations=2, data=kit.data(batch_size=6, seed=1), ckpt_path=checkpoint)


def test_with_decay_the_number_of_iterations_is_part_of_the_configuration(kit: Any, tmp_path: Path) -> None:
    kit.condense(iterations=2, decay=True, trainer=every_step(tmp_path))
    with pytest.raises(ValueError, match=r"iterations=2 \(now 4\)"):
        kit.condense(iterations=4, decay=True, ckpt_path=str(checkpoints(tmp_path)[0]))


def test_a_timed_checkpoint_is_written_after_a_while_and_at_the_end_and_resumed_exactly(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"iterations": 4, "network_reuse": 2}
    whole = kit.condense(**options)
    written: list[tuple[str, int]] = []
    save = Trainer.save_checkpoint

    def note(self: Trainer, path: Path, *given: Any, **options: Any) -> None:
        written.append((path.parent.name, self.global_step))
        save(self, path, *given, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", note)
    seldom = TimedCheckpoint(tmp_path / "seldom", seconds=1000.0)
    often = TimedCheckpoint(tmp_path / "often", seconds=1e-9)
    stopped = kit.trainer(callbacks=[seldom, often], max_steps=4, enable_checkpointing=True)
    stopped.fit(GradientMatchingCondensation(network=kit.network(), **options), datamodule=kit.data(batch_size=6))
    steps = [step for name, step in written if name == "often"]
    assert len(steps) > 1
    assert [step for name, step in written if name == "seldom"] == steps[-1:]
    for name in ("seldom", "often"):
        resumed = GradientMatchingCondensation(network=kit.network(), **options)
        kit.trainer().fit(resumed, datamodule=kit.data(batch_size=6), ckpt_path=tmp_path / name / "last.ckpt")
        assert resumed.iteration == 4
        assert torch.equal(resumed.synthetic_images, whole.synthetic_images)


def test_a_timed_checkpoint_goes_to_the_folder_of_the_run_by_default(kit: Any, tmp_path: Path) -> None:
    trainer = kit.trainer(
        callbacks=[TimedCheckpoint(seconds=1e-9)], default_root_dir=tmp_path, enable_checkpointing=True
    )
    trainer.fit(GradientMatchingCondensation(network=kit.network(), iterations=1), datamodule=kit.data(batch_size=6))
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    with pytest.raises(ValueError, match="Expected `seconds` to be positive and finite, but got 0"):
        TimedCheckpoint(seconds=0)


def test_refuses_a_checkpoint_within_a_step(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    condensation = GradientMatchingCondensation(network=kit.network(), iterations=2, network_reuse=3)
    moved = []

    def fail(self: GradientMatchingCondensation, *given: Any) -> None:
        if len(moved) == 1:
            raise OSError("the second update")
        moved.append(given)

    monkeypatch.setattr(GradientMatchingCondensation, "_move", fail)
    trainer = kit.trainer()
    with pytest.raises(OSError, match="the second update"):
        trainer.fit(condensation, datamodule=kit.data(batch_size=6))
    with pytest.raises(RuntimeError, match="Expected a checkpoint between two training steps, but got one within"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
