from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import shlex
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torchvision.models import resnet18

from leakage import Victim
from leakage.attacks import IDLGAttack
from leakage.cli.demo_page import PAGE
from leakage.cli.main import main
from leakage.comparison import FILES
from leakage.inversion.reconstruction import Reconstruction
from leakage.models import Generator
from tests import processes

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "experiments" / "idlg").glob("*.yaml") if path.name != "sweep.yaml")
SAMPLE = ["--data", "Victims", "--data.dataset", "sample"]
FEW = ["--model.max_evaluations", "5", "--model.restarts", "0", "--trainer.accelerator", "cpu"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """What is said when the arguments are refused."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    if isinstance(end.value.code, str):
        return end.value.code
    assert end.value.code == code
    said = capsys.readouterr()
    return said.err + said.out


@pytest.mark.slow
def test_the_start_imports_no_more_than_it_needs() -> None:
    """Lightning itself imports a lot, through torchmetrics; what counts is what comes on top of it."""
    code = """
import sys
import leakage.cli.main
leakage.cli.main.main([])
assert "torch" not in sys.modules
import torch
before = set(sys.modules)
from leakage import LeNet, Protocol, SharedGradient, Victim
assert not (set(sys.modules) - before) & {"lightning", "matplotlib", "scipy", "sympy", "torchmetrics", "torchvision"}
import lightning.pytorch
before = set(sys.modules)
for command in ("demo", "fit", "evaluate"):
    leakage.cli.main.load(command)
more = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not more & {"onnx", "pandas", "sklearn", "sympy", "tensorboard", "wandb"}, more
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refuses_another_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'fti' (choose from" in refused(capsys, "fti")


@pytest.mark.parametrize("attack", ["DLGAttack", "IDLGAttack", "RGAPAttack", "GaussNewtonAttack"])
def test_fits_every_attack(attack: str) -> None:
    main(
        [
            "fit",
            "--model",
            attack,
            *SAMPLE,
            "--data.victims",
            "2",
            "--trainer.accelerator",
            "cpu",
        ]
    )
    (table,) = Path("lightning_logs").rglob("victims.csv")
    assert table.read_text().count("converged") == 2


# The demo.


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--output", "out", "--victims", "3", "--seed", "0"])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith(("DLG  ", "iDLG  ", "Gauss-Newton  "))] == ["3"] * 3
    for name in FILES:
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert str(Path("out") / name) in lines
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(row["method"], row["dataset"], row["victims"]) for row in rows] == [
        ("dlg", "sample", 3),
        ("idlg", "sample", 3),
        ("gauss_newton", "sample", 3),
    ]
    assert rows[2]["mse_median"] < 1e-6
    assert rows[1]["label_accuracy"] == 1.0
    for row in rows:
        assert row["success_rate"] == 1.0, row["method"]
        assert row["mse_median"] < 1e-3
    assert f"{Path('out') / PAGE}: all results on one page" in said.out
    check_page((tmp_path / "out" / PAGE).read_text(encoding="utf-8"))
    # No terminal here: no flood of the bar's updates, and no warnings.
    assert len(said.out) < 5000
    assert said.err == ""


def check_page(page: str) -> None:
    """It needs no other file, shows every image and figure, and its commands are understood."""
    assert not re.findall(r"""(?:src|href)=["'](?!data:|summary|victims|gallery|fidelity|#)""", page)
    assert "<script" not in page
    assert "url(http" not in page
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="victim (\d), (.*?)"', page)
    assert [(victim, of) for _, victim, of in pictures] == [
        (victim, of) for victim in "012" for of in ("truth", "DLG", "iDLG", "Gauss-Newton")
    ]
    shown = [torch.tensor(bytearray(Image.open(io.BytesIO(b64decode(png))).tobytes())) for png, _, _ in pictures]
    for truth, *found in zip(*[iter(shown)] * 4, strict=True):
        assert len(truth) == 28 * 28
        assert truth.max() > 0
        for image in found:
            assert (image.int() - truth.int()).abs().max() < 16, "all of these attacks find the images"
    assert page.count("100.0 %") >= 6
    assert page.count("<svg") == 1
    assert "{{" not in page
    blocks = [html.unescape(code) for code in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)]
    commands = [shlex.split(line) for code in blocks for line in code.replace("\\\n", " ").splitlines()]
    for words in [words for words in commands if words[:1] == ["leakage"]]:
        with pytest.raises(SystemExit) as end:
            main([*words[1:], "--print_config"])
        assert not end.value.code, words
    (python,) = [code for code in blocks if code.startswith("from lightning")]
    compile(python, "page", "exec")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        (["--victims", "1001"], "at most the 1000 images of the data set, but got 1001 * 1 = 1001"),
        (["--victims", "many"], "invalid int value: 'many'"),
        (["--seed", "-1"], "Expected `seed` to be a whole number of at least 0, but got -1"),
        (["--output", "file/demo"], "Expected `output` to be a folder that can be written, but got 'file/demo'"),
    ],
)
def test_demo_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    said = refused(capsys, "demo", *arguments)
    assert message in said
    assert "DLG, iDLG and Gauss-Newton on" not in said, "nothing was begun"


@pytest.mark.parametrize("command", ["demo", "fit"])
def test_an_interrupt_ends_quietly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import signal

    handler = signal.getsignal(signal.SIGINT)

    def interrupt(self: IDLGAttack, batch: object, batch_idx: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("leakage.attacks.GradientInversion.training_step", interrupt)
    data = ["--victims", "2"] if command == "demo" else ["--model", "IDLGAttack", *SAMPLE, *FEW]
    try:
        said = refused(capsys, command, *data, code=130)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning has turned it off
    assert "Interrupted." in said
    if command == "demo":
        assert "Partial results: none yet" in said
    assert "Traceback" not in said


def test_an_interrupted_demo_tells_where_the_partial_results_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    handler = signal.getsignal(signal.SIGINT)
    step = IDLGAttack.training_step

    def interrupt(self: IDLGAttack, batch: object, batch_idx: int) -> None:
        if self.iteration == 5:
            raise KeyboardInterrupt
        step(self, batch, batch_idx)

    monkeypatch.setattr(IDLGAttack, "training_step", interrupt)
    try:
        said = refused(capsys, "demo", "--victims", "1", code=130)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert f"Partial results: {Path('demo/dlg')}, {Path('demo/idlg')}" in said
    assert "running" in Path("demo/idlg/victims.csv").read_text()


# Fit.


def test_fit_needs_no_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--model", "IDLGAttack", *SAMPLE, "--data.victims", "2", *FEW])
    folder = tmp_path / "lightning_logs" / "version_0"
    assert f"Results: {folder}" in capsys.readouterr().out
    assert len((folder / "victims.csv").read_text().splitlines()) == 3
    assert (folder / "gallery.png").stat().st_size > 0
    assert (folder / "reconstructions" / "part_0000.safetensors").exists()


def test_fit_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    data = ["--data.victims", "3", "--data.lanes", "2", *FEW]
    config = str(ROOT / "experiments" / "idlg" / "sample.yaml")
    every = "--trainer.callbacks.init_args.seconds=1e-9"
    main(["fit", "--config", config, every, *data])
    folder = tmp_path / "results" / "idlg_sample" / "version_0"
    table = (folder / "victims.csv").read_text()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] > 0
    resumed = ["--trainer.logger.version", "0", "--ckpt_path", str(checkpoint)]
    main(["fit", "--config", str(folder / "config.yaml"), *resumed])
    assert (folder / "victims.csv").read_text() == table


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_taken(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "fit", "--config", str(ROOT / "experiments" / "idlg" / name), "--print_config", code=0)
    config = yaml.safe_load(said)
    assert config["model"]["class_path"] == "leakage.attacks.IDLGAttack"
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "results"
    assert config["trainer"]["val_check_interval"] == 50
    callbacks = [callback["class_path"].rsplit(".", 1)[-1] for callback in config["trainer"]["callbacks"]]
    assert callbacks == ["AttackProgressBar", "VictimTable", "Gallery", "TimedCheckpoint"]


PIECES = str(ROOT / "experiments" / "inverting_gradients" / "pieces.yaml")


@pytest.mark.filterwarnings("ignore:The clients defend")
def test_an_attack_made_of_pieces_finds_images(tmp_path: Path) -> None:
    """Those of the file, and what the command line says of them."""

    def mse(steps: int) -> float:
        version = f"--trainer.logger.init_args.version={steps}"
        main(["fit", "--config", PIECES, "--model.solver.steps", str(steps), "--data.victims", "2", version])
        table = tmp_path / "results" / "inverting_gradients" / f"version_{steps}" / "victims.csv"
        rows = list(csv.DictReader(table.open(encoding="utf-8")))
        assert len(rows) == 2
        return sum(float(row["mse"]) for row in rows) / 2

    assert mse(150) < 0.2 * mse(1)


def test_a_trained_generator_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Generator(1, 28, code_size=5, width=2).save(tmp_path / "generator.safetensors")
    arguments = [
        "--model",
        "leakage.attacks.GIASAttack",
        *SAMPLE,
        "--data.victims",
        "2",
        "--trainer.accelerator",
        "cpu",
    ]
    few = ["--model.steps", "3", "--model.restarts", "0"]
    main(["fit", *arguments, *few, "--model.generator", "generator.safetensors"])
    (table,) = tmp_path.rglob("victims.csv")
    assert table.read_text(encoding="utf-8").count("exhausted") == 2
    capsys.readouterr()
    said = refused(capsys, "fit", *arguments, "--model.generator", "none.safetensors")
    assert said == ("leakage fit: error: Expected a safetensors file at 'none.safetensors', but got no such file.\n")


def call(folder: Path, *arguments: str) -> None:
    """As the installed script does, for which the folder is not on the path."""
    sys.path[:] = filter(None, sys.path)
    os.chdir(folder)
    main(arguments)


@pytest.mark.slow
def test_pieces_of_ones_own_by_their_import_path(tmp_path: Path) -> None:
    """From a module in the folder where `leakage` is called, in a file and on the command line."""
    (tmp_path / "my_pieces.py").write_text(
        """
import torch
from leakage.defenses import Defense
from leakage.objectives import Prior

class Smooth(Prior):
    def __init__(self, power: float):
        self.power = power

    def __call__(self, images):
        return images.diff(dim=-1).abs().pow(self.power).mean()

class Signs(Defense):
    def __call__(self, gradients, generator):
        return {name: tensor.sign() for name, tensor in gradients.items()}
""",
        encoding="utf-8",
    )
    config = yaml.safe_load(Path(PIECES).read_text(encoding="utf-8"))
    config["model"]["init_args"]["objective"]["init_args"]["terms"][1] = {
        "class_path": "my_pieces.Smooth",
        "init_args": {"power": 1.5},
    }
    config["model"]["init_args"]["solver"] = {
        "class_path": "leakage.solvers.LBFGS",
        "init_args": {"max_evaluations": 3},
    }
    config["data"]["init_args"]["defenses"] = [{"class_path": "my_pieces.Signs"}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = processes.run(tmp_path / "said.txt", call, tmp_path, "fit", "--config", "mine.yaml", "--data.victims", "2")
    assert done.returncode == 0, done.said
    script = Path(sys.executable).parent / "leakage"
    assert "leakage fit" in subprocess.run([script], capture_output=True, text=True, check=True).stdout
    (told,) = tmp_path.rglob("hparams.yaml")
    assert "0.01 * Smooth(power=1.5)" in told.read_text(encoding="utf-8")


@pytest.mark.slow
def test_own_gradients_of_a_resnet(tmp_path: Path) -> None:
    """BatchNorm included: a configuration can't call `eval()`."""
    victim = Victim(resnet18(num_classes=10).eval(), image_shape=(3, 32, 32))
    (tmp_path / "clients").mkdir()
    victim.share(torch.rand(1, 1, 3, 32, 32), torch.tensor([[7]])).save(tmp_path / "clients" / "a.safetensors")
    main(["fit", "--config", str(ROOT / "experiments" / "idlg" / "own_gradients.yaml"), *FEW])
    folder = tmp_path / "results" / "idlg_own_gradients" / "version_0"
    assert [line.split(",")[2] for line in (folder / "victims.csv").read_text().splitlines()[1:]] == ["7"]
    assert (folder / "gallery.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0."),
        (["--data.victims", "2000"], "at most the 1000 images of the data set"),
        (["--model.protocol", "fast"], "Expected `protocol` to be one of ['published', 'robust'], but got 'fast'."),
        (
            ["--model.protocol", "published", "--model.spectrum", "true"],
            "Expected no `spectrum` with protocol='published'",
        ),
        (["--data.dataset", "mnist", "--data.root", "none", "--data.download", "false"], "the train split of MNIST in"),
        (["--data.dataset", "imagenet"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist', 'cifar10',"),
        (["--data.split", "test"], "Expected `split` 'train' with 'sample', which has no separate test images"),
    ],
)
def test_fit_refuses_bad_input_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    said = refused(capsys, "fit", "--model", "IDLGAttack", *SAMPLE, *arguments)
    assert said.startswith("leakage fit: error: Expected ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "SGD"], "but got `--optimizer`."),
        (["--lr_scheduler", "StepLR"], "but got `--lr_scheduler`."),
        (["--data.victims", "many"], "Expected `victims` of Victims as int, but got 'many'."),
        (
            ["--model", "Nope"],
            "Expected `--model` to be one of ContinuationAttack, DLGAttack, DistributionMatchingCondensation, "
            "GIASAttack, GaussNewtonAttack, GradInversionAttack, GradientInversion, GradientMatchingCondensation, "
            "IDLGAttack, InvertingGradientsAttack, RGAPAttack, or the import path",
        ),
        (
            ["--data", "torch.nn.Linear"],
            "Expected `--data` to be one of LabelledImages, SharedGradients, Victims, or the import path",
        ),
    ],
)
def test_fit_refuses_what_it_does_not_know_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    said = refused(capsys, "fit", "--model", "IDLGAttack", *SAMPLE, *arguments)
    assert said.startswith("leakage fit: error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_steps", "-5"], "`max_steps` must be a non-negative integer or -1"),
        (["--trainer.accelerator", "nonsense"], "accelerator='nonsense'"),
        (["--trainer.default_root_dir", "file/x"], "file/x"),
        (["--ckpt_path", "none.ckpt"], "Expected a whole checkpoint of leakage at 'none.ckpt', but got no such file"),
        (["--ckpt_path", "empty.ckpt"], "Expected a whole checkpoint of leakage at 'empty.ckpt', but got a file"),
        (["--ckpt_path", "file"], "Expected a whole checkpoint of leakage at 'file', but got a file that is trunc"),
        (["--ckpt_path", "foreign.ckpt"], "at 'foreign.ckpt', but got a file of another kind"),
        (["--ckpt_path", "code.ckpt"], "at 'code.ckpt', but got a file that is truncated or of another kind"),
    ],
)
def test_fit_tells_an_error_of_others_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").touch()
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 0.1}}, tmp_path / "foreign.ckpt")
    torch.save(Path, tmp_path / "code.ckpt")
    data = ["--data.victims", "1", *FEW]
    said = refused(capsys, "fit", "--model", "IDLGAttack", *SAMPLE, *data, *arguments)
    assert said.startswith("leakage fit: error: ")
    assert message in said
    assert said.count("\n") == 1
    assert "weights_only" not in said


def test_the_scores_are_curves_and_change_no_reconstruction(tmp_path: Path) -> None:
    config = str(ROOT / "experiments" / "idlg" / "sample.yaml")
    data = ["--data.victims", "2", "--model.max_evaluations", "25", "--model.restarts", "0"]
    steps = []
    for name, every in (("often", "10"), ("once", "1000")):
        main(
            ["fit", "--config", config, *data, f"--trainer.logger.name={name}", f"--trainer.val_check_interval={every}"]
        )
        folder = tmp_path / "results" / name / "version_0"
        with (folder / "metrics.csv").open(newline="") as file:
            steps.append([int(row["step"]) for row in csv.DictReader(file) if row["val/mse"]])
    assert len(steps[0]) == 3
    assert len(steps[1]) == 1
    often, once = (
        Reconstruction.load(tmp_path / "results" / name / "version_0" / "reconstructions" / "part_0000.safetensors")
        for name in ("often", "once")
    )
    for name, found in vars(often).items():  # the files' bytes differ: the header's entries have no order
        other = vars(once)[name]
        assert found is other or torch.equal(found, other), name


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: IDLGAttack, batch: object, batch_idx: int) -> None:
        raise ValueError("a fault of somebody's own model")

    monkeypatch.setattr(IDLGAttack, "training_step", fail)
    with pytest.raises(ValueError, match="somebody's own model"):
        main(
            [
                "fit",
                "--model",
                "IDLGAttack",
                *SAMPLE,
                "--data.victims",
                "1",
                *FEW,
            ]
        )
