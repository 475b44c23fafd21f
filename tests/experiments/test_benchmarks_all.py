"""One command for all benchmarks: what it tells, what it skips, and that it goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from .conftest import EXPERIMENTS, load

WRITE = """
import json, sys
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.with_suffix(".png").write_bytes(b"a picture")
output.write_text(json.dumps({"ratio": {"to plain": 2.0}, "machine": {"cpu": "one"}, "arguments": sys.argv[3:],
  "methods": {"idlg": {"share": {"objective": 0.5}}, "dlg": {"share": {"objective": 0.25}}},
  "cells": [{"cell": "lenet/own/28/1", "memory": {"bytes_per_lane": 1024, "fixed_bytes": 2097152, "r_squared": 1.0},
             "rows": [{"lanes": 4, "seconds_per_victim_and_evaluation": 0.0025, "objective_share": 0.5,
                       "peak_bytes": 1048576}]}],
  "skipped": [{"cell": "lenet/own/28/1", "lanes": [8], "reason": "memory", "detail": "9 | 8"}]}))
"""


@pytest.fixture(scope="module")
def everything() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "benchmarks")  # as for a script that is run
        yield load("benchmarks/all.py")
        for name in ("setting", "attack_speed"):
            sys.modules.pop(name, None)


@pytest.fixture
def scripts(everything: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with other scripts in place of the benchmarks."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name, code in (
        ("good", WRITE),
        ("bad", "import sys\nprint('working')\nsys.exit('bad.py: error: no | luck')"),
        ("slow", "import time\ntime.sleep(60)"),
        ("throughput", WRITE),
    ):
        (folder / f"{name}.py").write_text(code)
    job = everything.Job
    chosen = [
        job("bad", "bad.py", ["--size", "3"], "A bad one"),
        job("good", "good.py", [], "A good one"),
        job("throughput", "throughput.py", [], "One that is told the time"),
    ]
    monkeypatch.setattr(everything, "HERE", folder)
    monkeypatch.setattr(everything, "jobs", lambda minutes, device: chosen)
    return folder


def test_goes_on_and_tells(
    everything: ModuleType, scripts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "bad.json").write_text("{}")  # of an earlier run
    with pytest.raises(SystemExit, match="Expected all benchmarks to succeed, but got failures in bad"):
        everything.main(["--output", str(output)])
    assert "2 of 3, good: " in capsys.readouterr().out
    page = (output / "index.md").read_text()
    assert f"torch {torch.__version__}" in page
    for line in (
        "Failed: exit code 1: bad.py: error: no \\| luck",
        "`bad.py --size 3`",
        "![A good one](good.png)",
        "| ratio: to plain | 2 |",
        "| figure | idlg | dlg |",
        "| share: objective | 0.5 | 0.25 |",
        "| lanes | 4 |",
        "| lenet/own/28/1 | 2.5 |",
        "| lenet/own/28/1 | 1 | 2 | 1.00000 |",
        "[bad.log](bad.log)",
        "Skipped: lenet/own/28/1, lanes [8]: memory (9 | 8).",
    ):
        assert line in page.splitlines(), page
    assert "bad.json" not in page
    assert "working" in (output / "bad.log").read_text()
    told = json.loads((output / "throughput.json").read_text())["arguments"]
    assert told[0] == "--total-seconds"
    assert 0 < float(told[1]) <= 480, "less than all that is left"


def test_only_some_and_none_for_lack_of_time(
    everything: ModuleType, scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    everything.main(["--output", str(output), "--only", "good"])
    assert sorted(path.name for path in output.iterdir()) == ["good.json", "good.log", "good.png", "index.md"]
    everything.main(["--output", str(output), "--only", "good", "--minutes", "0.1"])
    page = (output / "index.md").read_text()
    assert "Skipped: time: 6 s left" in page
    assert "good.png" not in page, "that of the run before"


def test_one_that_hangs_is_ended(everything: ModuleType, scripts: Path, tmp_path: Path) -> None:
    outcome = everything.run(everything.Job("slow", "slow.py", [], "A slow one"), tmp_path, 0.3)
    assert (outcome.status, outcome.reason) == ("skipped", "time: ended after 0 s")


def test_every_benchmark_takes_its_options(
    everything: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAKAGE_DATA", str(tmp_path / "none"))  # the bundled sample will do
    measured = []
    for minutes in (0.5, 10):
        for job in everything.jobs(minutes, torch.device("cpu")):
            script = load(f"benchmarks/{job.script}")
            monkeypatch.setattr(script, "_measure", lambda *_, name=job.name: measured.append(name))
            script.main(["--output", str(tmp_path / f"{job.name}.json"), *job.options])
    there = {path.stem for path in (EXPERIMENTS / "benchmarks").glob("*.py")} - {"all", "setting", "benchmark_plots"}
    assert {job.script for job in everything.jobs(10, torch.device("cuda"))} == {f"{name}.py" for name in there}
    assert len(measured) >= 2 * len(there)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "Expected `minutes` to be positive and finite, but got 0"),
        (["--only", "nothing"], "Expected `only` to be one of ['attack_speed_dlg', 'attack_speed_idlg'"),
        (["--output", "file"], "Expected `output` to be a folder that can be written, but got 'file'"),
    ],
)
def test_refuses_at_once(
    everything: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(everything, "run_all", None)
    with pytest.raises(SystemExit) as end:
        everything.main(["--output", "out", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
