"""The first screen, and what `--help` prints."""

from __future__ import annotations

import contextlib
import inspect

import pytest

import leakage
from leakage.audit import ATTACKS, Client, audit
from leakage.cli.audit import _CHECKS
from leakage.cli.main import main


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed, and nothing on standard error, where refusals go."""
    with contextlib.suppress(SystemExit):
        main(arguments)
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def test_the_first_screen_is_short_and_leads_on(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys)
    lines = said.splitlines()
    assert lines[0] == f"leakage {leakage.__version__}: what a shared gradient gives away"
    assert len(lines) <= 24, "fits a terminal"
    assert max(map(len, lines)) <= 80
    for command in ("demo", "fit", "evaluate"):
        assert f"  leakage {command} " in said
    assert "  leakage fit --model IDLGAttack --help " in said
    assert said in printed(capsys, "--help")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"leakage {leakage.__version__}\n"


def test_commands_list_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "demo", "--help")
    assert all(option in said for option in ("--output", "--victims", "--seed"))
    assert "--network" in printed(capsys, "evaluate", "--help")


def test_audit_lists_its_options_and_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "audit", "--help")
    assert said == printed(capsys, "audit") == printed(capsys, "audit", "--example", "-h")
    assert len(said.splitlines()) < 70
    assert max(map(len, said.splitlines())) <= 80
    words = " ".join(said.split())
    own, client = inspect.signature(audit).parameters, inspect.signature(Client).parameters
    options = {name: own.get(name) for name in _CHECKS} | {f"client.{name}": one for name, one in client.items()}
    for name, option in options.items():
        _, found, text = words.partition(f"--{name} ")
        assert found or name in ("client", "clients"), name
        default = None if option is None else option.default
        if type(default) in (int, float, str) and default != "":
            number = f"{default:g}" if isinstance(default, float) else default
            assert f"(default: {number})" in text.partition(" --")[0], name
    assert [attack for attack in ATTACKS if attack not in words] == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["--config", "run.yaml", "--help"]])
def test_fit_lists_what_there_is_and_where_the_options_are(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    said = printed(capsys, "fit", *arguments)
    assert all(option in said for option in ("--config", "--model", "--data", "--trainer.OPTION", "--ckpt_path"))
    attacks, condensations = said.partition("\nattacks:\n")[2].split("\ncondensations")
    first = [line.split()[0] for line in attacks.splitlines() if line[2:3].strip()]
    assert first == sorted(first)
    assert {"DLGAttack", "GradientInversion", "IDLGAttack"} <= set(first)
    assert not {"GradientMatchingCondensation", "LBFGSAttack", "Generator"} & set(first)
    assert "  GradientMatchingCondensation " in condensations
    assert "  LabelledImages " in condensations.partition("\ndata:\n")[2]
    assert "  leakage fit --model IDLGAttack --help\n" in said
    assert len(said.splitlines()) < 80


def test_fit_lists_the_options_of_one_class(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "fit", "--model", "IDLGAttack", "--help")
    assert said.startswith("IDLGAttack: iDLG: read the labels")
    assert "  --model.max_evaluations " in said
    assert "additional starts for a victim" in said
    assert ":data:`" not in said
    assert "--trainer" not in said
    assert "--data" not in said


def test_fit_lists_the_options_of_two_classes(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "fit", "--model=leakage.attacks.GradientInversion", "--data", "Victims", "-h")
    attack, _, victims = said.partition("\nVictims: ")
    words = " ".join(attack.split())
    assert "one of Adam, Continuation, GaussNewton, LBFGS, " in words
    assert "one of BatchNormStatistics, CosineDistance, " in words
    assert "Prior" not in words.replace("GaussianPrior", ""), "an abstract class"
    words = " ".join(victims.split())
    assert "one of AlexNet, ConvNet, LeNet, MLP, ResNet18, ResNet20, VGG11, ViT)" in words
    assert "torchvision" not in words.partition("--data.victims")[0]


def test_fit_lists_the_options_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "fit", "--trainer.help")
    assert "  --trainer.max_epochs " in said
    assert "--model" not in said


def test_fit_lists_the_options_of_a_class_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "fit", "--model", "leakage.inversion.gradient_inversion.GradientInversion", "--help")
    assert "  --model.solver " in said


@pytest.mark.parametrize("name", ["Nope", "leakage.attacks.Nope", "nothing.Nope", "leakage.models.LeNet"])
def test_no_help_for_what_there_is_not(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model", name, "--help"])
    assert end.value.code == 2
    assert "Expected `--model` to be one of ContinuationAttack, DLGAttack, " in capsys.readouterr().err
