"""The command line for condensation: `leakage fit` and `leakage evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from leakage.cli.main import main
from leakage.condensation import Recipe, Score, SyntheticSet, evaluate
from leakage.datamodules import LabelledImages
from leakage.models import MLP

FIT = [
    "fit", "--model", "GradientMatchingCondensation", "--model.iterations", "1",
    "--model.network", "ConvNet", "--model.network.width", "4",
    "--data", "LabelledImages", "--data.dataset", "sample", "--data.batch_size", "4",
    "--trainer.accelerator", "cpu", "--trainer.logger", "false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that `leakage fit` has condensed."""
    folder = tmp_path_factory.mktemp("run")
    main([*FIT, "--trainer.default_root_dir", str(folder)])
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code not in (0, None)
    said = end.value.code if isinstance(end.value.code, str) else ""
    return said + capsys.readouterr().err


def test_fit_condenses_with_the_callbacks_of_a_condensation(saved: Path) -> None:
    synthetic = SyntheticSet.load(saved / "synthetic.safetensors")
    assert (synthetic.dataset, len(synthetic)) == ("sample", 10)
    assert (saved / "synthetic.png").stat().st_size > 0
    config = yaml.safe_load((saved / "config.yaml").read_text())
    used = [entry["class_path"].split(".")[-1] for entry in config["trainer"]["callbacks"]]
    assert used == ["CondensationProgressBar", "SyntheticImages", "TimedCheckpoint"]


def test_callbacks_that_are_asked_for_are_kept(tmp_path: Path) -> None:
    evaluation = "leakage.callbacks.SyntheticEvaluation"
    options = ["--trainer.callbacks.at", "[]", "--trainer.callbacks.networks", "1", "--trainer.callbacks.epochs", "1"]
    main([*FIT, f"--trainer.callbacks+={evaluation}", *options])
    assert (tmp_path / "synthetic.png").exists(), "those by default"
    assert (tmp_path / "accuracy.csv").read_text().count("\n") == 2, "and the one that was added"


def test_fit_resumes_from_a_checkpoint(tmp_path: Path, saved: Path) -> None:
    main([*FIT, "--trainer.callbacks", "null", "--trainer.default_root_dir", "whole"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    main([*FIT, "--model.iterations", "1", "--ckpt_path", str(checkpoint), "--trainer.default_root_dir", "again"])
    images = [SyntheticSet.load(folder / "synthetic.safetensors").images for folder in (saved, tmp_path / "again")]
    assert images[0].equal(images[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.protocol", "quick"], "Expected `protocol` to be one of ['fast', 'published'], but got 'quick'"),
        (["--model.loops", "[0, 1]"], "Expected `loops` to be a whole number of at least 1, but got 0"),
        (["--model.images_per_class", "7"], "Expected `loops` (outer, inner) with images_per_class=7, but got None"),
        (
            ["--data", "Victims", "--data.dataset", "sample"],
            "with a labelled data set of `leakage.datamodules`, `LabelledImages`, but got Victims",
        ),
        (
            ["--model.network", "LeNet"],
            "Expected a `network` for images (1, 28, 28) and 10 classes of 'sample', but got LeNet",
        ),
        (["--model.learning_rate", "1e38", "--model.iterations", "3"], "Expected a finite matching loss"),
    ],
)
def test_fit_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    if arguments[-1] == "LeNet":
        arguments = [*arguments, "--model.network.image_size", "32"]
    # What belongs to the DataModule goes with it.
    given = FIT[:9] if "Victims" in arguments else FIT
    said = refused(capsys, *given, *arguments)
    assert said.startswith("leakage fit: error: ")
    assert message in said
    assert "Traceback" not in said


def test_evaluate_tells_the_accuracy(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    file = str(saved / "synthetic.safetensors")
    options = ["--network", "mlp", "--networks", "2", "--epochs", "40"]
    said = []
    for further in ([], ["--seed", "0"], ["--seed", "1"], ["--evaluation", "dsa"], ["--precision", "bf16-mixed"]):
        main(["evaluate", file, *options, *further])
        said.append(capsys.readouterr().out)
    assert f"{file}: test accuracy on sample, evaluation dc: " in said[0]
    assert "(2 networks, 95 % interval of the mean" in said[0]
    assert "recorded" not in said[0], "it was never tested"
    assert said[0] == said[1], "the same seed"
    assert "evaluation dsa" in said[3]
    assert len(set(said[1:4])) == 3, "another seed, another evaluation"
    main(["evaluate", file, *options, "--evaluation", "dsa", "dc"])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted((said[0] + said[3]).splitlines())


@pytest.fixture
def recorded(saved: Path, tmp_path: Path) -> str:
    """The same set with what it scores."""
    synthetic = SyntheticSet.load(saved / "synthetic.safetensors")
    assert synthetic.recipe is not None
    assert (synthetic.recipe.method, synthetic.recipe.options["iterations"]) == ("published", 1)
    found = evaluate(
        synthetic, LabelledImages("sample"), network=MLP(), networks=2, epochs=30, seed=3, augmentation="dsa",
        device="cpu", progress=False,
    )  # fmt: skip
    score = Score("dsa", tuple(found.accuracies.tolist()), network="mlp", epochs=30, seed=3)
    path = tmp_path / "recorded.safetensors"
    replace(synthetic, recipe=synthetic.recipe.with_score(score)).save(path)
    return str(path)


def test_evaluate_gives_the_recorded_figure_again(capsys: pytest.CaptureFixture[str], recorded: str) -> None:
    main(["evaluate", recorded, "--evaluation", "dsa"])
    first, second = capsys.readouterr().out.splitlines()
    assert second == f"recorded: {first.split('evaluation dsa: ')[1]}, the same for 2 networks"
    main(["evaluate", recorded, "--evaluation", "dsa", "--networks", "1", "--seed", "3"])
    first, second = capsys.readouterr().out.splitlines()
    assert "(1 network)" in first
    assert second.endswith(", the same for 1 network")
    main(["evaluate", recorded, "--evaluation", "dsa", "--seed", "4"])
    assert capsys.readouterr().out.splitlines()[1].endswith(", with other options")


def test_evaluate_tells_how_far_it_is_from_the_record(capsys: pytest.CaptureFixture[str], recorded: str) -> None:
    synthetic = SyntheticSet.load(recorded)
    assert synthetic.recipe is not None
    (score,) = synthetic.recipe.scores
    accuracies = (score.accuracies[0], score.accuracies[1] + 0.02)
    replace(synthetic, recipe=synthetic.recipe.with_score(replace(score, accuracies=accuracies))).save(recorded)
    main(["evaluate", recorded, "--evaluation", "dsa"])
    assert capsys.readouterr().out.splitlines()[1].endswith(", 2 networks differ by up to 2.00 %")


def test_evaluate_takes_a_folder_that_holds_the_data_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path
) -> None:
    """Whatever its name; but no other data set."""
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 16), (100 * label + 10, 60 * label, 99 - label)).save(folder / "1.png")
    images, std = torch.rand(2, 3, 16, 16), (0.2023, 0.1994, 0.2010)
    path = str(tmp_path / "s.safetensors")
    own = SyntheticSet(images, torch.tensor([0, 1]), (0.4914, 0.4822, 0.4465), std, ("cat", "dog"), "cifar10")
    replace(own, recipe=Recipe("random")).save(path)
    options = ["--network", "mlp", "--networks", "1", "--epochs", "1"]
    main(["evaluate", path, "--dataset", str(tmp_path / "photos"), *options])
    assert "test accuracy on cifar10, evaluation dc" in capsys.readouterr().out
    said = refused(capsys, "evaluate", path, "--dataset", "sample")
    message = "Expected the data set that the recipe of the synthetic set names, 'cifar10', but got 'sample'."
    assert f"leakage evaluate: error: {message}" in said
    replace(own, dataset="others", recipe=Recipe("random")).save(path)
    said = refused(capsys, "evaluate", path, "--dataset", str(tmp_path / "photos"))
    assert "that the recipe of the synthetic set names, 'others', but got 'photos'" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors"], "but got no such file"),
        (["FILE", "--networks", "0"], "Expected `networks` to be a whole number of at least 1, but got 0"),
        (["FILE", "--network", "lenet5"], "invalid choice: 'lenet5' (choose from"),
        (["FILE", "--dataset", "nothing"], "Expected `dataset` to be one of"),
        (["FILE", "--evaluation", "idc"], "invalid choice: 'idc' (choose from"),
        (["FILE", "--precision", "8"], "invalid choice: '8' (choose from"),
        (["FILE", "--image-size", "32"], "Expected no `image_size` with 'sample', but got 32"),
    ],
)
def test_evaluate_refuses(capsys: pytest.CaptureFixture[str], saved: Path, arguments: list[str], message: str) -> None:
    file = str(saved / "synthetic.safetensors")
    said = refused(capsys, "evaluate", *[file if argument == "FILE" else argument for argument in arguments])
    assert "leakage evaluate: error: " in said
    assert message in said
