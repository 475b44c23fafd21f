from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments/benchmarks/evaluation_speed.py"
SHORT = ["--networks", "2", "--epochs", "2", "--test-images", "40", "--network", "mlp", "--device", "cpu"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("experiments_evaluation_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_writes_both_sides(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "speed.json"
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        script.main([*SHORT, "--output", str(output), "--threads", "1", "--repeats", "2"])
        assert torch.get_num_threads() == 2, "as it was before"
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), before)
    result = json.loads(output.read_text())
    assert (result["dataset"], result["device"], result["threads"]) == ("sample", "cpu", 1)
    assert (result["networks"], result["images"], result["test_images"]) == (2, 10, 40)
    for part in ("training", "testing"):
        seconds = result["seconds"][part]
        assert seconds["stacked"] > 0
        assert result["ratio"][part] == pytest.approx(seconds["sequential"] / seconds["stacked"])
    assert len(result["accuracies"]["stacked"]) == 2
    assert result["greatest_difference_of_accuracy"] < 0.05
    assert result["used_by_default"] == "sequential"
    said = capsys.readouterr().out
    assert "turn 2 of 2, sequential: training" in said
    assert "2 networks" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "1"], "Expected `--networks` to be at least 2, to stack them, but got 1"),
        (["--repeats", "0"], "Expected `repeats` to be a whole number of at least 1, but got 0"),
        (["--dataset", "nothing"], "Expected `dataset` to be one of"),
        (["--images-per-class", "5000"], "Expected `images_per_class` of at most"),
        (["--device", "nonsense"], "Expected `--device` to be cpu or a GPU that works, but got 'nonsense'"),
        (["--output", "."], "Expected `--output` to be a file, but got the folder"),
    ],
)
def test_refuses_at_once(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "_measure", None)
    with pytest.raises(SystemExit) as end:
        script.main([*SHORT, "--output", "a.json", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
