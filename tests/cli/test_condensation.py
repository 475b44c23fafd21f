"""The command line for condensation: `leakage fit` and `leakage evaluate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from leakage.cli.main import main
from leakage.condensation import SyntheticSet

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
            "Expected a `network` for images (1, 28, 28) and 10 classes, as 'sample' has, but got LeNet",
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
    for further in ([], ["--seed", "0"], ["--seed", "1"], ["--augmentation", "flip"], ["--augmentation", "mnist"]):
        main(["evaluate", file, *options, *further])
        said.append(capsys.readouterr().out)
    assert "test accuracy on sample" in said[0]
    assert "(2 networks, 95 % interval of the mean" in said[0]
    assert said[0] == said[1], "the same seed"
    assert len(set(said[1:])) == 4, "another seed, other augmentations"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors"], "but got no such file"),
        (["FILE", "--networks", "0"], "Expected `networks` to be a whole number of at least 1, but got 0"),
        (["FILE", "--network", "lenet5"], "invalid choice: 'lenet5' (choose from"),
        (["FILE", "--dataset", "nothing"], "Expected `dataset` to be one of"),
        (["FILE", "--augmentation", "twist"], "but got 'twist'"),
        (["FILE", "--image-size", "32"], "Expected no `image_size` with 'sample', but got 32"),
    ],
)
def test_evaluate_refuses(capsys: pytest.CaptureFixture[str], saved: Path, arguments: list[str], message: str) -> None:
    file = str(saved / "synthetic.safetensors")
    said = refused(capsys, "evaluate", *[file if argument == "FILE" else argument for argument in arguments])
    assert "leakage evaluate: error: " in said
    assert message in said
