"""What `leakage fit` says of options, values and classes that there are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from leakage.cli.main import main
from leakage.cli.refusals import explain, own_words

ATTACK = ["--model", "IDLGAttack", "--data", "Victims", "--data.dataset", "sample"]
PIECES = ["--model", "GradientInversion", "--data", "Victims", "--data.dataset", "sample"]
CONDENSATION = ["--model", "GradientMatchingCondensation", "--data", "LabelledImages", "--data.dataset", "sample"]
NETWORKS = r"one of AlexNet, ConvNet, LeNet, MLP, ResNet18, ResNet20, VGG11, ViT"
NETWORK = rf"Expected `network` of GradientMatchingCondensation to be {NETWORKS}"
MODULE = r"the import path of another subclass of torch\.nn\.modules\.module\.Module"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("leakage fit: error: ")
    assert said.count("\n") == 1
    return said.removeprefix("leakage fit: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*ATTACK, "--model.restart", "3"],
            r"Expected an option of IDLGAttack, one of .*max_evaluations, .*restarts, .*seed.* "
            r"\(did you mean `restarts`\?\), but got `restart`\.",
        ),
        (
            [*ATTACK, "--data.nothing", "3"],
            r"Expected an option of Victims, one of .*images, .*seed, .*victims, .*but got `nothing`\.",
        ),
        (
            [*CONDENSATION, "--model.network", "ConvNet", "--model.network.widht", "4"],
            r"Expected an option of ConvNet, one of .*width \(did you mean `width`\?\), but got `widht`\.",
        ),
        (
            ["--modl", "IDLGAttack"],
            r"Expected one of --ckpt_path, --config, .*\(did you mean `--model`\?\), but got `--modl`\.",
        ),
        ([*ATTACK, "--trainer.max_stepp", "3"], r"Expected an option of Trainer, .*`max_steps`\?\), but got"),
        (
            [*ATTACK, "--seed_everything", str(2**32)],
            r"Expected `seed_everything` from 0 to 4294967295, but got 4294967296\.",
        ),
        ([*ATTACK, "--seed_everything", "-1"], r"Expected `seed_everything` from 0 to 4294967295, but got -1\."),
        ([*ATTACK, "--model.seed", "many"], r"Expected `seed` of IDLGAttack as int, but got 'many'\."),
        ([*ATTACK, "--model.restarts", "many"], r"Expected `restarts` of IDLGAttack as int \| None, but got 'many'\."),
        ([*ATTACK, "--trainer.max_steps", "many"], r"Expected `--trainer.max_steps` as int, but got 'many'\."),
        (
            [*CONDENSATION, "--model.network", "ConvNett"],
            rf"{NETWORK} .*`ConvNet`\?\), or {MODULE}, but got 'ConvNett'",
        ),
        ([*CONDENSATION, "--model.network", "leakage.models.Net"], rf"{NETWORK}.* or {MODULE}, but got 'leak"),
        ([*CONDENSATION, "--model.network", "nothing.Net"], rf"{NETWORK}.* or {MODULE}, but got 'nothing\.Net'"),
        ([*CONDENSATION, "--model.network", "pathlib.Path"], rf"{NETWORK}, or {MODULE}, but got 'pathlib\.Path'"),
        (
            ["--model", "DLGAtack", "--data", "Victims"],
            r"Expected `--model` to be .*`DLGAttack`\?\), or the import",
        ),
        (
            [*PIECES, "--model.objective", "CosinDistance"],
            r"Expected `objective` of Gradi.*`CosineDistance`",
        ),
        ([*PIECES, "--model.images", "leakage.dummies.Pixel"], r"Expected `images` of GradientInversion .*`Pixels`"),
        (
            [*PIECES, "--model.solver", "SignedAdam", "--model.solver.step", "5"],
            r"Expected an option of SignedAdam, one of .* \(did you mean `steps`\?\), but got `step`\.",
        ),
        (
            [*PIECES, "--model.solver", "SignedAdam", "--model.solver.steps", "many"],
            r"Expected `steps` of SignedAdam as int, but got 'many'\.",
        ),
        ([*PIECES, "--model.solver", "CosineDistance"], r"Expected `solver` of .*, but got 'CosineDistance'\."),
        (["--model", "IDLGAttack"], r"Expected `--data`, but got none\. See `leakage fit --help`\."),
        (["--trainer.max_epochs", "2"], r"Expected `--model` and `--data`, but got none\."),
        ([*ATTACK, "--trainer.callbacks+=Galery"], r"Expected `--trainer\.callbacks` to be .*`Gallery`\?\)"),
    ],
)
def test_on_the_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    said = refused(capsys, *arguments)
    assert re.match(message, said), said


def config(**init_args: Any) -> dict[str, Any]:
    return {
        "model": {"class_path": "leakage.condensation.GradientMatchingCondensation", "init_args": init_args},
        "data": {"class_path": "LabelledImages", "init_args": {"dataset": "sample"}},
    }


def network(name: str, **init_args: Any) -> dict[str, Any]:
    return config(network={"class_path": name, "init_args": init_args})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (config(restart=3), r"Expected an option of GradientMatchingCondensation, one of .*, but got `restart`\."),
        (config(images_per_class="many"), r"Expected `images_per_class` of GradientMatchingCondensation as int, but "),
        (
            network("leakage.models.ConvNet", widht=3),
            r"Expected an option of ConvNet, .*`width`\?\), but got `wi",
        ),
        (network("leakage.models.ConvNet", width="many"), r"Expected `width` of ConvNet as int, but got 'many'\."),
        (network("leakage.models.Net", a=3), rf"{NETWORK}.* or {MODULE}, but got 'leakage\.models\.Net'\."),
        (network("ConvNett"), rf"{NETWORK} .*`ConvNet`\?\), or {MODULE}, but got 'ConvNett'"),
        (network("pathlib.Path"), rf"{NETWORK}, or {MODULE}, but got 'pathlib\.Path'"),
        (config() | {"model": {"class_path": "Nope"}}, r"Expected `--model` to be one of .*, but got 'Nope'\."),
        (
            config() | {"trainer": {"max_step": 3}},
            r"Expected an option of Trainer, .*`max_steps`\?\), but got",
        ),
        (
            config() | {"modle": {"class_path": "IDLGAttack"}},
            r"Expected one of ckpt_path, data, model, .*`model`\?\), but got `modle`\.",
        ),
        (
            config() | {"trainer": {"callbacks": [{"class_path": "leakage.callbacks.Galery"}]}},
            r"Expected `--trainer\.callbacks` to be .*`Gallery`\?\), or the import path",
        ),
        (
            config()
            | {"trainer": {"callbacks": [{"class_path": "leakage.callbacks.Gallery", "init_args": {"victim": 3}}]}},
            r"Expected an option of Gallery, one of moments, output, victims \(did you mean `victims`\?\), but got `vi",
        ),
    ],
)
def test_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, written: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(written))
    said = refused(capsys, "--config", str(path))
    assert re.match(message, said), said


NETWORK_OF_ONES_OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int, **further: int) -> None:
        super().__init__()
"""


def test_what_is_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "model" in refused(capsys, "--data", "Victims", "--data.dataset", "sample")
    (tmp_path / "own_network.py").write_text(NETWORK_OF_ONES_OWN)
    monkeypatch.syspath_prepend(tmp_path)
    said = refused(capsys, *CONDENSATION, "--model.network", "own_network.Net")
    assert said.startswith("Expected the option `width` of Net, but got none.")


def test_words_that_it_does_not_know_are_put_in_one_line() -> None:
    assert explain("Something else\n  is wrong.") == "Something else is wrong."


def test_the_library_s_own_words_are_found_in_what_quotes_them() -> None:
    assert own_words(ValueError("Expected `a` of 3,\nbut got 4.")) == "Expected `a` of 3, but got 4."
    quoting = "Does not validate\n  - Expected a <class 'int'>\n  - Expected `a` of 3, but got 4."
    assert own_words(ValueError(quoting)) == "Expected `a` of 3, but got 4."
    assert own_words(ValueError("no")) is None
