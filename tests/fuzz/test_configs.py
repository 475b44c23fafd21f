from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from leakage.cli.fit import check_config
from leakage.cli.main import main


@settings(max_examples=25)
@given(data=st.data())
def test_a_configuration_runs_or_is_refused_in_one_line(
    fuzz: SimpleNamespace, folder: Path, marker: Path, data: st.DataObject
) -> None:
    fuzz.configs.check(data.draw(fuzz.configs.inputs(marker)), folder, marker)


def test_a_sound_one_runs(fuzz: SimpleNamespace, folder: Path, marker: Path) -> None:
    assert not fuzz.configs.check(yaml.safe_dump(fuzz.configs.SOUND).encode(), folder, marker).refusal


LAUGHS = "a0: &a0 [1]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"Expected at most 10000 values in '.*c.yaml', but got \d+, most of them from anchors"),
        ("a: &a [*a]", r"Expected at most 10000 values in '.*c.yaml', but got inf"),
        ("a: " + "[" * 5000 + "]" * 5000, "Expected YAML in '.*c.yaml', but got: values nested too deeply"),
        ("a: [", "Expected YAML in '.*c.yaml', but got: while parsing"),
        ("- 1", "Expected options and their values in '.*c.yaml', but got none"),
        ("", "Expected options and their values in '.*c.yaml', but got none"),
    ],
)
def test_yaml_that_the_parser_can_not_cope_with(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        check_config(path)


@pytest.mark.parametrize("given", [["--config"], ["-c"], ["--config="]])
def test_a_configuration_is_looked_at_however_it_is_named(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(LAUGHS)
    arguments = [f"{given[0]}{path}"] if given[0].endswith("=") else [*given, str(path)]
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("leakage fit: error: Expected at most 10000 values in")


def test_a_checkpoint_does_not_choose_the_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("from pathlib import Path\nPath('marker').touch()\n")
    version = {"pytorch-lightning_version": lightning.__version__}
    torch.save({"leakage": {}, "hyper_parameters": {"_class_path": "evil_module.Attack"}} | version, "evil.ckpt")
    model = ["--model", "IDLGAttack", "--data", "Victims", "--data.dataset", "sample", "--data.victims", "1"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *model, "--trainer.logger", "false", "--trainer.callbacks", "[]", "--ckpt_path", "evil.ckpt"])
    assert end.value.code == 2
    assert "Expected a checkpoint of IDLGAttack, but got one of another module" in capsys.readouterr().err
    assert not Path("marker").exists()
