from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from leakage.audit import AuditReport
from leakage.audit.example import ExampleModule
from leakage.cli.main import main

EXAMPLE = {"model": "leakage.audit.example.ExampleModule", "data": "leakage.audit.example.ExampleData"}
OF_EXAMPLE = "".join(f"{name}: {value}\n" for name, value in EXAMPLE.items())


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["audit", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that says why, with nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    assert ended(*arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("leakage audit: error: Expected ")
    assert sorted(Path.cwd().rglob("*")) == before
    return line.removeprefix("leakage audit: error: ")


def test_the_example_leaks(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("--example", "--victims", "8", "--attacks", '["labels", "rgap"]', "--output", "out") == 1
    said = capsys.readouterr().out
    assert "Plan, for 40 s" in said
    assert "exceeded: success_rate of 1 image, rgap: 1" in said
    report = AuditReport.load("out")
    assert report.verdict == "exceeded"
    assert report.command.startswith("leakage audit --example --victims 8")
    assert Path("out/report.html").is_file()


def test_a_file_and_arguments_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Path("audit.yaml").write_text(
        OF_EXAMPLE
        + textwrap.dedent("""\
        clients:
          - images: 1
          - images: 2
            name: two
            defenses:
              - class_path: leakage.defenses.Clip
                init_args: {norm: 1.0}
        attacks: [labels]
        victims: 3
        budget: 30s
        fail_above: {label_accuracy: 0.9}
        asserted: {channel: TLS}
        output: from_file
        """)
    )
    assert ended("--config", "audit.yaml") == 3  # three victims can't tell
    report = AuditReport.load("from_file")
    assert [client["name"] for client in report.declared.clients] == ["1 image", "two"]
    assert report.declared.clients[1]["defenses"] == [{"name": "Clip", "norm": 1.0}]
    assert report.declared.asserted == {"channel": "TLS"}
    model, data = (f"--{name}={value}" for name, value in EXAMPLE.items())
    options = ("--client.images", "2", "--victims=3", "--attacks+=labels", "--fail-above", "label_accuracy=0.0")
    assert ended(model, data, *options, "--budget", "30s", "--output", "from_arguments") == 1
    assert AuditReport.load("from_arguments").measured[0].images == 2
    capsys.readouterr()


def test_weights_are_those_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    module = ExampleModule()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    torch.save({"state_dict": module.state_dict()}, "best.ckpt")
    options = ("--example", "--victims", "2", "--attacks", '["labels"]', "--model.checkpoint", "best.ckpt")
    assert ended(*options, "--output", "with") in (1, 3)
    plain = ("--example", "--victims", "2", "--attacks", '["labels"]')
    # The folder holds an audit of other weights.
    assert "Expected `output` without another audit" in refused(capsys, *plain, "--output", "with")


def test_an_update_in_another_order_fails_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    arrays = [tensor.numpy() for tensor in ExampleModule().state_dict().values()]
    np.savez("before.npz", *arrays)
    np.savez("after.npz", *(array + 0.01 for array in reversed(arrays)))
    options = ("--example", "--update", "after.npz", "--before", "before.npz", "--client.learning_rate", "0.1")
    assert ended(*options, "--output", "out") == 2
    assert "in another order: that of `state_dict()`" in capsys.readouterr().out
    report = AuditReport.load("out")
    assert report.verdict == "failed check"
    assert not any(one.done for one in report.plan)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--budget 1m", "Expected `--model` with the import path of your LightningModule, but got none."),
        ("--modle x", "(did you mean `model`?), but got `--modle`."),
        ("--model no_such.Module", "No module named 'no_such'."),
        ("--model json.loads", "but got 'json.loads', which is not a LightningModule."),
        ("--model leakage.audit.example.ExampleModule", "Expected `data`, or a module with a `train_dataloader`"),
        ("--model leakage.audit.example.ExampleModule --model.rate 3", "Expected an option of ExampleModule"),
        ("--example --data leakage.models.LeNet", "Expected `--data` as the import path of your LightningDataModule"),
        ("--example --client.imags 3", "(did you mean `images`?), but got `imags`."),
        ("--example --client.images 0", "Expected `images` to be a whole number of at least 1, but got 0."),
        ("--example --client.images 900", "Expected at least 1351 images in the data"),
        ("--example --fail-above success_rate=often", "Expected `--fail-above` as metric=limit, such as"),
        ("--example --fail-above leak=0.1", "Expected `fail_above` to be one of"),
        ("--example --budget 0m", "Expected `budget` as seconds above 0"),
        (
            "--example --accelerator warp",
            "Expected `accelerator` as the Trainer has it on this machine, but got 'warp'",
        ),
        ("--model leakage.models.LeNet", "but got 'leakage.models.LeNet', which is not a LightningModule."),
        ("--example --client.dropout true", "Expected a module with torch.nn.Dropout in training mode"),
        ("--example --checkpoint none.ckpt", "but got 'none.ckpt': no such file."),
        ("--example --update none.safetensors", "none.safetensors"),
        ("--config none.yaml", "Expected `--config` to be a YAML file, but got 'none.yaml', which is not a file."),
    ],
)
def test_refuses_arguments_in_one_line(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    assert said in refused(capsys, *arguments.split())


CLIP = "{class_path: leakage.defenses.Clip, init_args: {norm: -1}}"


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("budgte: 3m", "(did you mean `budget`?), but got `budgte`.", 3),
        ("budget: none", "Expected `budget` as seconds above 0", 3),
        ("victims: many", "Expected `victims` to be a whole number of at least 1, but got 'many'.", 3),
        ("fail_above: {leak: 3}", "Expected `fail_above` to be one of", 3),
        ("fail_above: 3", "Expected `fail_above` with names and values, but got 3.", 3),
        ("attacks: rgap", "Expected `attacks` as a list of labels, rgap", 3),
        ("threat_model: Z", "Expected `threat_model` to be one of", 3),
        ("seed: -1", "Expected `seed` to be a whole number of at least 0, but got -1.", 3),
        ("clients: 3", "Expected `clients` with options such as `images: 8`, but got 3.", 3),
        ("clients:\n  - images: 1\n  - imags: 3", "(did you mean `images`?), but got `imags`.", 5),
        ("clients:\n  - images: 1\n  - epochs: -3", "Expected `epochs` to be a whole number of at least 0", 5),
        ("client:\n  local_steps: 2\n  momentum: 2", "Expected `momentum` below 1", 4),
        (f"client:\n  defenses: [{CLIP}]", "Expected `norm` to be positive and finite, but got -1", 4),
    ],
)
def test_refuses_fields_with_their_line(capsys: pytest.CaptureFixture[str], text: str, said: str, line: int) -> None:
    Path("audit.yaml").write_text(f"{OF_EXAMPLE}{text}\n")
    reason = refused(capsys, "--config", "audit.yaml")
    assert said in reason
    assert reason.endswith(f"It is in line {line} of 'audit.yaml'.")


def test_refuses_other_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("audit.yaml").write_text("model: [1\n")
    assert "Expected YAML in 'audit.yaml', but got" in refused(capsys, "--config", "audit.yaml")
    Path("audit.yaml").write_text("data: leakage.audit.example.ExampleData\n")
    assert "Expected `--model` with the import path" in refused(capsys, "--config", "audit.yaml")
    Path("audit.yaml").write_text(f"{OF_EXAMPLE}client: {{images: 2}}\nclients: [{{images: 1}}]\n")
    assert "Expected either one client (`client`) or several" in refused(capsys, "--config", "audit.yaml")
    Path("best.ckpt").write_bytes(b"no checkpoint")
    assert "truncated, of another kind" in refused(capsys, "--example", "--checkpoint", "best.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, "best.ckpt")
    assert "Missing key(s) in state_dict" in refused(capsys, "--example", "--checkpoint", "best.ckpt")


def test_refuses_a_module_that_can_t_be_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("broken.py").write_text(
        "from lightning import LightningModule\n\n\nclass Broken(LightningModule):\n"
        "    def __init__(self):\n        raise RuntimeError('no GPU here')\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # nothing but the audit is to leave files
    said = refused(capsys, "--model", "broken.Broken", "--data", EXAMPLE["data"])
    assert "no GPU here" in said
    assert json.dumps(said).count("\\n") == 0
