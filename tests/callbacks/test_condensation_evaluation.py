from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from leakage.callbacks import SyntheticImages, condensation_evaluation, read_accuracies
from leakage.condensation import GradientMatchingCondensation, SyntheticSet, evaluate
from leakage.models import ConvNet
from tests.callbacks.condensation_runs import At, Copies, Stripes, fit, module, network, quick


def test_tests_a_copy_of_the_images_at_chosen_iterations_and_at_the_end(tmp_path: Path) -> None:
    condensation, copies, evaluation = module(iterations=5), Copies(), quick(tmp_path, at=(0, 2))
    fit(condensation, evaluation, copies)
    assert [(row.iteration, row.step) for row in evaluation.rows] == [(0, 0), (2, 2), (5, 5)]
    data = Stripes()
    for row in evaluation.rows:
        held = condensation.synthetic_set()
        held.images = copies.of[row.step]
        alone = evaluate(held, data, network=network(), networks=3, epochs=4, device="cpu", progress=False)
        assert row.accuracies == tuple(alone.accuracies.tolist())
    assert evaluation.last.accuracies.tolist() == list(evaluation.rows[-1].accuracies)


def test_the_saved_set_is_the_one_that_was_tested(tmp_path: Path) -> None:
    evaluation = quick(tmp_path)
    fit(module(), evaluation, SyntheticImages(tmp_path))
    saved = SyntheticSet.load(tmp_path / "synthetic.safetensors")
    alone = evaluate(saved, Stripes(), network=network(), networks=3, epochs=4, device="cpu", progress=False)
    assert alone.accuracies.equal(evaluation.last.accuracies)


def test_writes_a_row_for_each_test(tmp_path: Path) -> None:
    condensation, evaluation = module(), quick(tmp_path)
    fit(condensation, evaluation)
    with (tmp_path / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["0", "2", "4"]
    for row, kept in zip(rows, evaluation.rows, strict=True):
        accuracies = torch.tensor(kept.accuracies, dtype=torch.float64)
        mean, std = float(accuracies.mean()), float(accuracies.std())
        half = 4.302653 * std / 3**0.5  # Student's t of 2 degrees of freedom
        assert float(row["accuracy_mean"]) == pytest.approx(mean)
        assert float(row["accuracy_std"]) == pytest.approx(std, abs=1e-7)
        assert float(row["accuracy_low"]) == pytest.approx(mean - half, abs=1e-6)
        assert float(row["accuracy_high"]) == pytest.approx(mean + half, abs=1e-6)
        assert row["networks"] == "3"
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds[0] == 0
    assert seconds == sorted(seconds)
    spent = sum(seconds for part, seconds in condensation.seconds.items() if part != "evaluation")
    assert seconds[-1] == pytest.approx(spent)
    assert float(rows[-1]["evaluation_seconds"]) == pytest.approx(condensation.seconds["evaluation"])
    assert 0 < float(rows[0]["evaluation_seconds"]) < float(rows[1]["evaluation_seconds"])
    curve = read_accuracies(tmp_path / "accuracy.csv")
    assert curve.tolist() == [
        [float(row[column]) for column in ("iteration", "accuracy_mean", "accuracy_low", "accuracy_high")]
        for row in rows
    ]


def test_draws_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plot = condensation_evaluation.plot_accuracy

    def record(*args: Any, **options: Any):
        calls.append((args, options))
        return plot(*args, **options)

    monkeypatch.setattr(condensation_evaluation, "plot_accuracy", record)
    fit(module(), quick(tmp_path))
    ((curves,), options) = calls[-1]
    assert curves["synthetic images"][:, 0].tolist() == [0, 2, 4]
    assert options == {"title": "stripes: 1 image per class"}
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.size == (960, 630)


@pytest.mark.parametrize("callback", [quick, SyntheticImages])
def test_the_run_is_bit_for_bit_the_same_without(tmp_path: Path, callback) -> None:
    def run(*callbacks: Callback) -> GradientMatchingCondensation:
        torch.manual_seed(0)
        # A trained network too, so that its state is seen.
        condensation = module(images_per_class=2, loops=(2, 2), iterations=3, augmentation="crop_flip")
        fit(condensation, *callbacks)
        return condensation

    plain, state = run(), torch.get_rng_state()
    watched = run(callback(tmp_path))
    assert watched.synthetic_images.equal(plain.synthetic_images)
    assert torch.get_rng_state().equal(state)
    for name, tensor in plain.network.state_dict().items():
        assert watched.network.state_dict()[name].equal(tensor), name
    assert watched.network.training == plain.network.training
    assert watched.last_loss == plain.last_loss


def test_the_options_reach_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def record(*args: Any, **options: Any):
        calls.append(options)
        return evaluate(*args, **options)

    monkeypatch.setattr(condensation_evaluation, "evaluate", record)
    other = ConvNet(1, 8, 3, width=2, depth=1)
    fit(module(), quick(tmp_path, at=(), network=other, seed=3, stacked=False, precision="bf16-mixed"))
    (options,) = calls
    assert options["network"] is other
    assert {name: options[name] for name in options if name not in ("network", "device")} == {
        "networks": 3, "epochs": 4, "seed": 3, "stacked": False, "augmentation": "dc", "progress": False,
        "precision": "bf16-mixed",
    }  # fmt: skip


def test_logs_the_accuracy_with_the_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    evaluation = quick(tmp_path, at=(0, 2))
    fit(module(loops=(2, 1), network_reuse=3), evaluation, logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = {int(row["step"]): row for row in csv.DictReader(file) if row["eval/accuracy"]}
    assert list(logged) == [0, 4, 8]
    for row in evaluation.rows:
        found = logged[row.step]
        assert float(found["eval/accuracy"]) == pytest.approx(row.accuracy_mean)
        assert float(found["eval/accuracy_std"]) == pytest.approx(row.evaluation.std)
        low, high = float(found["eval/accuracy_low"]), float(found["eval/accuracy_high"])
        assert (low, high) == pytest.approx(row.evaluation.interval)
        assert float(found["eval/networks"]) == 3
        assert float(found["time/evaluation"]) == pytest.approx(row.evaluation_seconds)


def test_accuracy_and_loss_are_over_the_same_steps(tmp_path: Path) -> None:
    """A step has three updates of the images, each a step of the optimizer."""
    logger = CSVLogger(tmp_path)
    fit(module(loops=(2, 1), network_reuse=3), quick(tmp_path, at=(0, 2)), logger=logger, log_every_n_steps=1)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = {key: [int(row["step"]) for row in rows if row[key]] for key in ("train/loss", "eval/accuracy")}
    # The loss at a step is that of the images whose accuracy is at the same step.
    assert steps == {"train/loss": list(range(8)), "eval/accuracy": [0, 4, 8]}


def checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_neither_repeats_nor_loses_a_test(tmp_path: Path, step: int, monkeypatch) -> None:
    whole = quick(tmp_path / "whole")
    condensation = module()
    fit(condensation, checkpoints(tmp_path), whole)
    tested: list[int] = []

    def count(*args: Any, **options: Any):
        tested.append(1)
        return evaluate(*args, **options)

    monkeypatch.setattr(condensation_evaluation, "evaluate", count)
    resumed, again = quick(tmp_path / "resumed"), module()
    fit(again, resumed, resume=tmp_path / f"step={step}.ckpt")
    assert again.synthetic_images.equal(condensation.synthetic_images)
    keep = [(row.iteration, row.step, row.accuracies) for row in whole.rows]
    assert [(row.iteration, row.step, row.accuracies) for row in resumed.rows] == keep
    assert len(tested) == {1: 2, 2: 1, 3: 1, 4: 0}[step], "step 2 was tested before its checkpoint"
    assert len(read_accuracies(tmp_path / "resumed" / "accuracy.csv")) == 3
    assert resumed.last.accuracies.equal(whole.last.accuracies)


def test_a_checkpoint_before_the_test_of_its_step(tmp_path: Path) -> None:
    """As when a run is killed during a test, or a callback before this one writes the checkpoint."""
    save = At(2, lambda trainer, _: trainer.save_checkpoint(tmp_path / "run.ckpt"))
    whole = quick(tmp_path)
    fit(module(), save, whole)
    resumed = quick(tmp_path)
    fit(module(), resumed, resume=tmp_path / "run.ckpt")
    assert [row.accuracies for row in resumed.rows] == [row.accuracies for row in whole.rows]
    assert read_accuracies(tmp_path / "accuracy.csv")[:, 0].tolist() == [0, 2, 4]


def test_a_new_run_starts_with_no_rows(tmp_path: Path) -> None:
    evaluation = quick(tmp_path / "a", at=(0,))
    fit(module(), evaluation)
    with pytest.warns(UserWarning, match="earlier run"):
        fit(module(iterations=2), evaluation)
    assert [row.step for row in evaluation.rows] == [0, 2]


def test_a_run_ended_by_the_trainers_limit_is_tested_where_it_ends(tmp_path: Path) -> None:
    evaluation = quick(tmp_path, at=(1,))
    condensation = module(loops=(3, 1))
    fit(condensation, evaluation, SyntheticImages(tmp_path), max_steps=5)
    assert [(row.iteration, row.step) for row in evaluation.rows] == [(1, 3), (1, 5)]
    saved = SyntheticSet.load(tmp_path / "synthetic.safetensors")
    assert saved.images.equal(condensation.synthetic_set().images)


def test_training_that_diverges_gives_a_warning_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def diverge(*args: Any, **options: Any):
        calls.append(1)
        if len(calls) != 2:
            raise FloatingPointError("Expected finite losses")
        return evaluate(*args, **options)

    monkeypatch.setattr(condensation_evaluation, "evaluate", diverge)
    evaluation, condensation = quick(tmp_path), module()
    with pytest.warns(UserWarning, match="The images after 0 iterations could not be tested: Expected finite losses"):
        fit(condensation, evaluation)
    assert condensation.iteration == 4
    assert [row.step for row in evaluation.rows] == [2]
    assert len(calls) == 3, "the end is tried once"
    expected = "The images after 4 iterations could not be tested: Expected finite losses"
    with pytest.raises(FloatingPointError, match=expected):
        _ = evaluation.last
    monkeypatch.setattr(condensation_evaluation, "evaluate", evaluate)
    with pytest.warns(UserWarning, match="earlier run"):
        fit(module(), evaluation)
    assert evaluation.last.mean == evaluation.rows[-1].accuracy_mean


def test_a_test_that_failed_before_the_end_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def diverge(*args: Any, **options: Any):
        calls.append(1)
        if len(calls) == 2:
            raise FloatingPointError("Expected finite losses")
        return evaluate(*args, **options)

    monkeypatch.setattr(condensation_evaluation, "evaluate", diverge)
    evaluation = quick(tmp_path)
    with pytest.warns(UserWarning, match="The images after 2 iterations could not be tested"):
        fit(module(), evaluation)
    assert [row.step for row in evaluation.rows] == [0, 4]
    assert evaluation.last.accuracies.tolist() == list(evaluation.rows[-1].accuracies)


def test_one_network_has_no_interval(tmp_path: Path) -> None:
    evaluation = quick(tmp_path, networks=1)
    fit(module(), evaluation)
    assert read_accuracies(tmp_path / "accuracy.csv")[:, 2:].isnan().all()
    assert 0 <= evaluation.last.mean <= 1


def test_only_rank_zero_tests_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", False)
    evaluation = quick(tmp_path)
    fit(module(), SyntheticImages(tmp_path), evaluation)
    assert list(tmp_path.iterdir()) == []
    assert evaluation.rows == []
