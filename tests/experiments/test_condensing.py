"""Several ways to make a small training set, side by side."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import Schedule  # in experiments/condensation, which conftest.py has put on the path
from condensation_rows import CondensationRow, format_table, sum_up
from condensing import condense, of_seed

from leakage.callbacks import read_accuracies
from leakage.condensation import (
    Evaluation,
    GradientMatchingCondensation,
    SyntheticSet,
    evaluate,
    evaluate_full,
    kmeans_images,
    random_images,
)
from leakage.condensation import training as module
from leakage.datamodules import LabelledImages
from leakage.metrics.estimates import mean_interval
from leakage.models import ConvNet

FEW: dict[str, Any] = {
    "iterations": 2, "networks": 2, "moments": (1,), "epochs": 2, "full_epochs": 1,
    "accelerator": "cpu", "enable_progress_bar": False,
}  # fmt: skip
TESTED: dict[str, Any] = {"networks": 2, "epochs": 2, "device": "cpu", "progress": False}


def network() -> ConvNet:
    return ConvNet(width=4)


def run(output: Path, methods: list[str], **options: Any) -> Any:
    return condense(methods, LabelledImages("sample", batch_size=4), output, network=network(), **{**FEW, **options})


def load(folder: Path, method: str, seed: int = 0) -> SyntheticSet:
    return SyntheticSet.load(folder / method / f"seed_{seed}" / "synthetic.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("condense")
    published = {"dc": 0.705, "dsa": 0.706}
    methods = ["dc", "fast", "random", "kmeans", "full"]
    return folder, run(folder, methods, sets=2, evaluations=("dc", "dsa"), published=published)


def test_a_row_per_method_and_evaluation_with_what_it_measured(done: tuple[Path, Any]) -> None:
    folder, rows = done
    made = ["dc", "fast", "random", "kmeans"]
    expected = [(method, evaluation) for method in made for evaluation in ("dc", "dsa")]
    assert [(row.method, row.evaluation) for row in rows] == [*expected, ("full", None)]
    assert [row.images_per_class for row in rows] == [1] * 8 + [None]
    assert [row.iterations for row in rows] == [2] * 4 + [None] * 5
    assert [row.published_accuracy for row in rows] == [0.705, 0.706] * 2 + [None] * 5
    assert [(row.sets, row.networks) for row in rows] == [(2, 2)] * 8 + [(1, 1)]
    saved = json.loads((folder / "summary.json").read_text())
    assert [row["accuracy_mean"] for row in saved] == [row.accuracy_mean for row in rows]
    # Each figure is that of the sets that were saved, tested on the test images.
    for row in rows[:8]:
        sets = [load(folder, row.method, seed) for seed in (0, 1)]
        tests = [
            evaluate(one, LabelledImages("sample"), network=network(), augmentation=row.evaluation, seed=seed, **TESTED)
            for seed, one in enumerate(sets)
        ]
        assert row.accuracy_mean == pytest.approx((tests[0].mean + tests[1].mean) / 2)
        assert row.accuracy_ci == mean_interval(torch.tensor([test.mean for test in tests], dtype=torch.float64))
        alike = torch.equal(sets[0].images, sets[1].images)
        assert alike == (row.method == "kmeans"), "with one image per class it is that nearest to the mean"
    data = LabelledImages("sample")
    assert torch.equal(load(folder, "random", 1).images, random_images(data, 1, 1).images)
    assert torch.equal(load(folder, "kmeans").images, kmeans_images(data, 1, 0).images)
    full = evaluate_full(data, network=network(), epochs=1, device="cpu", progress=False)
    assert (rows[8].accuracy_mean, rows[8].networks) == (full.mean, 1)
    assert math.isnan(rows[8].accuracy_std)
    assert rows[8].seconds > 0


def test_the_files(done: tuple[Path, Any]) -> None:
    folder, _ = done
    first = load(folder, "dc")
    assert torch.equal(SyntheticSet.load(folder / "synthetic.safetensors").images, first.images)
    for name in ("accuracy.png", "synthetic.png"):
        assert (folder / name).stat().st_size > 1000
    assert read_accuracies(folder / "fast" / "seed_1" / "accuracy.csv")[:, 0].tolist() == [1, 2]
    assert not list(folder.rglob("last.ckpt")), "no checkpoints of what is finished"


def test_the_recipe(done: tuple[Path, Any]) -> None:
    folder, rows = done
    for method, seed in (("fast", 1), ("random", 0)):
        recipe = load(folder, method, seed).recipe
        assert recipe is not None
        assert (recipe.method, recipe.seed) == (method, seed)
        assert recipe.scores == (), "of the default network alone, which others have too"
        assert (recipe.options.get("iterations"), recipe.seconds > 0) == (
            (2, True) if method == "fast" else (None, False)
        )
    recipe = load(folder, "fast").recipe
    assert recipe is not None
    assert recipe.seconds == pytest.approx(2 * rows[2].seconds - load(folder, "fast", 1).recipe.seconds)  # type: ignore[union-attr]


def test_the_score_is_in_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And kept as soon as it is known."""
    monkeypatch.setattr("leakage.condensation.evaluation.default_network", lambda data: network())
    methods: dict[str, Any] = {
        **FEW,
        "epochs": None,
        "networks": 1,
        "evaluations": ["dsa"],
        "test_precision": "bf16-mixed",
    }
    monkeypatch.setattr(module, "_EPOCHS_AUGMENTED", 3)
    (row,) = condense(["random"], LabelledImages("sample"), tmp_path, seed=4, **methods)
    (score,) = load(tmp_path, "random", 4).recipe.scores  # type: ignore[union-attr]
    assert score.accuracies == (row.accuracy_mean,)
    assert (score.evaluation, score.epochs, score.seed, score.precision) == ("dsa", 3, 4, "bf16-mixed")
    rows = condense(["random"], LabelledImages("sample"), tmp_path, seed=4, resume=True, **methods | {"networks": 2})
    (score,) = load(tmp_path, "random", 4).recipe.scores  # type: ignore[union-attr]
    assert len(score.accuracies) == rows[0].networks == 2


def test_progress_is_measured_on_held_out_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no image is condensed from; the test images are seen by the last test alone."""
    data = LabelledImages("sample", batch_size=4)
    data.setup("fit")
    watched: list[LabelledImages] = []

    def noted(synthetic: SyntheticSet, seen: LabelledImages, **options: Any) -> Evaluation:
        watched.append(seen)
        return evaluate(synthetic, seen, **options)

    monkeypatch.setattr("leakage.callbacks.condensation_evaluation.evaluate", noted)
    condense(["dc"], data, tmp_path, network=network(), held_out=0.1, **FEW)
    assert len(watched) == 2
    seen = watched[0]
    assert (len(seen.train), len(seen.test)) == (720, 80)
    known = {image.numpy().tobytes() for image in data.test.images}
    held_out = {image.numpy().tobytes() for image in seen.test.images}
    assert not held_out & known
    assert not held_out & {image.numpy().tobytes() for image in seen.train.images}
    watched.clear()
    condense(["dc"], data, tmp_path / "none", network=network(), held_out=None, **FEW)
    assert not watched


def test_the_table(done: tuple[Path, Any]) -> None:
    lines = format_table(done[1]).splitlines()
    assert len(lines) == 6
    assert lines[0].count("test accuracy (d") == 2
    assert lines[1].startswith("dc ")
    assert "2 x 2" in lines[1]
    assert lines[1].index("70.5 %") < lines[1].index("70.6 %")
    assert lines[5].split()[:2] == ["full", "all"]


def test_the_interval_is_over_sets() -> None:
    """Networks of a set that is better than another are not independent of one another."""
    found = [Evaluation(torch.tensor(accuracies)) for accuracies in ([0.70, 0.71], [0.74, 0.75], [0.78, 0.79])]
    summed = sum_up(found)
    assert summed["accuracy_mean"] == pytest.approx(0.745)
    half = 4.302653 * 0.04 / 3**0.5
    assert summed["accuracy_ci"] == pytest.approx((0.745 - half, 0.745 + half), abs=1e-6)
    assert summed["accuracy_std"] == pytest.approx(float(torch.tensor([0.70, 0.71, 0.74, 0.75, 0.78, 0.79]).std()))
    assert sum_up(found[:1])["accuracy_ci"] == pytest.approx(found[0].interval)
    one = sum_up([Evaluation(torch.tensor([0.7]))])
    assert math.isnan(one["accuracy_std"])
    assert math.isnan(one["accuracy_ci"][0])


def test_resuming_takes_what_is_finished_and_makes_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, ["random"])
    path = tmp_path / "random" / "seed_0" / "run.json"
    written = path.stat().st_mtime_ns
    trained: list[int] = []
    train = module.train

    def counted(networks: Any, numbers: Any, *rest: Any) -> None:
        trained.extend(numbers)
        train(networks, numbers, *rest)

    monkeypatch.setattr(module, "train", counted)
    both = run(tmp_path, ["random", "dc"], resume=True, moments=(), held_out=None)
    assert both[0] == first[0]
    assert path.stat().st_mtime_ns == written
    assert trained == [0, 1]
    assert run(tmp_path, ["random", "dc"], resume=True, moments=(), held_out=None) == both
    assert trained == [0, 1]
    (more,) = run(tmp_path, ["random"], resume=True, networks=3)
    assert trained == [0, 1, 2], "one network more"
    assert more.networks == 3
    (more,) = run(tmp_path, ["random"], resume=True, sets=2)
    assert trained == [0, 1, 2, 0, 1], "and one set more"
    assert more.sets == 2
    with pytest.raises(ValueError, match=r"differs in `images_per_class`: 1 there, 2 here"):
        run(tmp_path, ["random"], resume=True, images_per_class=2)
    with pytest.raises(ValueError, match=r"differs in `condensation\.iterations`: 2 there, 3 here"):
        run(tmp_path, ["dc"], resume=True, iterations=3, held_out=None)
    with pytest.raises(ValueError, match=r"differs in `data\.images`: 800 there, 780 here"):
        run(tmp_path, ["dc"], resume=True)


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
    assert (tmp_path / "stopped" / "dc" / "seed_0" / "last.ckpt").is_file()
    resumed = run(tmp_path / "stopped", ["dc"], resume=True)
    assert resumed[0].accuracy_mean == whole[0].accuracy_mean
    assert torch.equal(load(tmp_path / "whole", "dc").images, load(tmp_path / "stopped", "dc").images)


def test_a_stopped_test_loses_one_network_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", ["random"], sets=2)
    train, trained = module.train, []

    def stop(networks: Any, numbers: Any, *rest: Any) -> None:
        if len(trained) == most:
            raise KeyboardInterrupt
        trained.extend(numbers)
        train(networks, numbers, *rest)

    monkeypatch.setattr(module, "train", stop)
    most = 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", ["random"], sets=2)
    (row,) = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert row["sets"] == 1, "what is known so far"
    most = 4
    assert run(tmp_path / "stopped", ["random"], sets=2, resume=True) == whole
    assert trained == [0, 1, 0, 1]


def test_a_budget_is_one_schedule_for_all_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"iterations": None, "moments": None, "sets": 2}
    with pytest.raises(ValueError, match=r"`budget` of at least .* minutes, for the preparation and one network"):
        run(tmp_path / "short", ["fast"], **options, budget=1e-6)
    asked: list[Any] = []

    def fit(make: Any, *given: Any) -> tuple[Schedule, str]:
        asked.append((make(2).protocol.iterations, *given))
        return Schedule(15, 3, (2,)), "some minutes a set"

    monkeypatch.setattr("condensing.fit_schedule", fit)
    capsys.readouterr()
    (row,) = run(tmp_path, ["fast"], **options, budget=15)
    said = capsys.readouterr().out
    assert "fast: some minutes a set" in said
    ((iterations, data, budget, watch, moments, tested, _),) = asked
    assert (iterations, len(data.train), budget, moments) == (2, 780, 15, None)
    assert tested == 2
    assert watch.moments == []
    assert row.iterations == 3
    for seed in (0, 1):
        recipe = load(tmp_path, "fast", seed).recipe
        assert recipe is not None
        assert recipe.options["iterations"] == 3
        assert read_accuracies(tmp_path / "fast" / f"seed_{seed}" / "accuracy.csv")[:, 0].tolist() == [2, 3]
    assert run(tmp_path, ["fast"], resume=True, **options, budget=15) == [row]
    assert len(asked) == 1
    with pytest.raises(ValueError, match=r"Expected the `budget` of the run in '.*', 15, but got 20"):
        run(tmp_path, ["fast"], resume=True, **options, budget=20)


def test_the_factor_must_fit_before_anything_is_made(tmp_path: Path) -> None:
    run(tmp_path, ["random"])
    with pytest.raises(ValueError, match="Expected `factor` to divide the size of the images, 28 x 28, but got 3"):
        run(tmp_path, ["random", "dc"], factor=3)
    assert load(tmp_path, "random").factor == 1, "what is there stays"
    run(tmp_path, ["dc", "fast"], factor=1)
    assert load(tmp_path, "dc").factor == load(tmp_path, "fast").factor == 1


def test_dsa_starts_from_real_images_with_its_augmentation(tmp_path: Path) -> None:
    run(tmp_path, ["dsa"], moments=())
    recipe = load(tmp_path, "dsa").recipe
    assert recipe is not None
    assert recipe.options["initialization"] == "real"
    assert recipe.options["augmentation"] == "color_crop_cutout_flip_scale_rotate"


def test_other_batches_of_the_same_images() -> None:
    data = LabelledImages("sample", batch_size=4, seed=3)
    data.setup("fit")
    other = of_seed(data, 4)
    assert data.seed == data.configuration["seed"] == 3
    assert other.configuration["seed"] == 4
    expected = LabelledImages("sample", batch_size=4, seed=4)
    expected.setup("fit")
    assert torch.equal(other.class_batch(0).images, expected.class_batch(0).images)


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ([], {}, "Expected `methods` to name at least one method, but got none"),
        (["idc"], {}, r"Expected `methods` to be one of \['dc', 'dm', 'dsa', 'fast', .*\], but got 'idc'"),
        (["dc"], {"images_per_class": 0}, "Expected `images_per_class` to be a whole number of at least 1"),
        (["dc"], {"sets": 0}, "Expected `sets` to be a whole number of at least 1, but got 0"),
        (["dc"], {"evaluations": ()}, "Expected `evaluations` to name at least one evaluation, but got none"),
        (["dc"], {"evaluations": ["idc"]}, r"Expected `evaluations` to be one of \['dc', 'dsa'\], but got 'idc'"),
        (["dc"], {"held_out": 1.0}, "Expected `held_out` to be above 0 and below 1, but got 1.0"),
        (["dc"], {"budget": 5}, "Expected `budget` or `iterations`, but got both, 5 and 2"),
        (["dc"], {"test_precision": "16"}, "Expected `precision` to be one of"),
        (["dc"], {"images_per_class": 7}, r"Expected `loops` \(outer, inner\) with images_per_class=7"),
        (["random"], {"images_per_class": 81}, "Expected `images_per_class` of at most 80"),
        (["kmeans"], {"images_per_class": 81}, "Expected `images_per_class` of at most 80"),
        (["dc"], {"accelerator": "abacus"}, "Expected options that the Trainer accepts, but got accelerator='abacus'"),
    ],
)  # fmt: skip
def test_refuses(tmp_path: Path, methods: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, methods, **options)


def test_distribution_matching_as_published(tmp_path: Path) -> None:
    (row,) = run(tmp_path, ["dm"], images_per_class=7, loops=(2, 1), moments=())
    recipe = load(tmp_path, "dm").recipe
    assert recipe is not None
    expected = {"learning_rate": 1.0, "momentum": 0.5, "initialization": "real", "loops": [1, 0], "pool": 0}
    assert expected.items() <= recipe.options.items()
    assert recipe.options["augmentation"] == "color_crop_cutout_flip_scale_rotate"
    assert (recipe.method, row.method, row.iterations) == ("dm", "dm", 2)


def test_any_loops(tmp_path: Path) -> None:
    (row,) = run(tmp_path, ["dc"], images_per_class=2, loops=(2, 1), iterations=1, moments=())
    assert row.images_per_class == 2
    assert torch.equal(read_accuracies(tmp_path / "dc" / "seed_0" / "accuracy.csv")[:, 0], torch.tensor([1.0]).double())


def test_what_is_bad_is_told_before_the_first_method_is_run(tmp_path: Path) -> None:
    for options in ({"images_per_class": 81, "loops": (1, 1)}, {"epochs": 0}, {"moments": (-1,)}):
        with pytest.raises(ValueError, match="Expected"):
            run(tmp_path, ["dc", "random"], **options)
        assert not list(tmp_path.rglob("run.json"))


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
    assert (tmp_path / "dc" / "seed_0" / "run.json").exists(), "of a method that was not asked for"


def test_only_what_a_run_writes_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "thesis.txt").write_text("mine")
    first = run(tmp_path, ["random"], seed=1)
    assert run(tmp_path, ["random"]) != first
    assert not (tmp_path / "random" / "seed_1" / "run.json").exists()
    assert (tmp_path / "random" / "thesis.txt").read_text() == "mine"


def test_the_whole_set_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path / "a", ["full"], cache=tmp_path / "cache")
    monkeypatch.setattr("leakage.condensation.evaluation.train_and_test", None)
    again = run(tmp_path / "b", ["full"], cache=tmp_path / "cache")
    assert again[0].accuracy_mean == first[0].accuracy_mean


def test_rows_of_the_sets_that_are_done(tmp_path: Path) -> None:
    """A row of two sets takes the place of that of the first, and the table has no gaps."""
    rows = run(tmp_path, ["random"], sets=2)
    row = rows[0]
    assert isinstance(row, CondensationRow)
    lines = format_table([row, replace(row, method="other", evaluation="dsa")]).splitlines()
    assert [len(line) for line in lines]
    assert lines[2].split()[-7:-4] != lines[1].split()[-7:-4]
