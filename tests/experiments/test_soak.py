"""The soak in a short form, and that it notices what is lost."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from leakage.inversion.reconstruction import Reconstruction
from tests import processes

from .conftest import EXPERIMENTS, load

SHORT = [
    *("--victims", "5", "--lanes", "2", "--kills", "4", "--scenario-victims", "4", "--dataset", "sample"),
    *("--max-evaluations", "12", "--checkpoint-seconds", "0.05", "--scenarios", "disk_full", "sigterm"),
]


@pytest.fixture(scope="module")
def soak() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "robustness")  # as for a script that is run
        yield load("robustness/soak.py")
        for name in ("child", "scenarios"):
            sys.modules.pop(f"soak_{name}", None)


def run_script(output: Path) -> None:
    script = EXPERIMENTS / "robustness" / "soak.py"
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *SHORT, "--output", str(output)]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a process of its own, which may be forked."""
    output = tmp_path_factory.mktemp("soak")
    outcome = processes.run(tmp_path_factory.mktemp("said") / "said.txt", run_script, output)
    assert outcome.returncode == 0, outcome.said[-3000:]
    return output


def verdict(done: Path, name: str) -> dict[str, Any]:
    verdicts = json.loads((done / "soak.json").read_text(encoding="utf-8"))["verdicts"]
    (found,) = (one for one in verdicts if one["scenario"] == name)
    assert found["passed"]
    assert found["problems"] == []
    figures: dict[str, Any] = found["figures"]
    assert [figures[count] for count in ("missing", "repeated", "different")] == [0, 0, 0]
    return figures


def test_nothing_is_lost_by_kills(done: Path) -> None:
    figures = verdict(done, "killed")
    assert figures["kills"] == 4
    assert figures["kinds"] == dict.fromkeys(
        ("iteration", "start", "checkpoint half written", "file not yet replaced"), 1
    )
    assert figures["victims"] == 5
    # Those between the last whole checkpoint and the one that was half written, at least.
    assert 1 <= figures["iterations repeated"] <= 4 * figures["iterations"]
    assert figures["resumed from a checkpoint"] >= 1


def test_nothing_is_lost_by_a_full_disk(done: Path) -> None:
    figures = verdict(done, "disk_full")
    assert figures["exit code"] == 1
    assert 0 < figures["last whole checkpoint"] == figures["resumed at"]


def test_sigterm_leaves_a_checkpoint_in_time(done: Path) -> None:
    figures = verdict(done, "sigterm")
    assert figures["exit code"] == 143
    assert figures["resumed at"] == figures["iterations"] > 0


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done / "killed", tmp_path / "copy")
    return tmp_path / "copy"


def problems(soak: ModuleType, done: Path, other: Path) -> tuple[str, dict[str, int]]:
    found, counts = sys.modules["soak_scenarios"].lost(done / "whole", other, 5)
    return "; ".join(found), counts


def test_a_lost_a_repeated_and_another_victim_are_noticed(soak: ModuleType, done: Path, copy: Path) -> None:
    assert problems(soak, done, copy)[0] == ""
    path = copy / "idlg" / "reconstructions" / "part_0000.safetensors"
    whole = Reconstruction.load(path)
    whole.select(torch.arange(4)).save(path)
    said, counts = problems(soak, done, copy)
    assert (counts["missing"], counts["repeated"]) == (1, 0)
    assert "not every victim is present once" in said
    Reconstruction.cat([whole, whole.select(torch.tensor([2]))]).save(path)
    said, counts = problems(soak, done, copy)
    assert (counts["missing"], counts["repeated"]) == (0, 1)
    assert "not every victim is present once" in said
    for name in ("images", "loss", "evaluations", "labels"):
        other = Reconstruction(**{key: tensor.clone() for key, tensor in vars(whole).items() if tensor is not None})
        tensor = getattr(other, name)
        tensor[3] = torch.nextafter(tensor[3], tensor[3] + 1) if tensor.is_floating_point() else tensor[3] + 1
        other.save(path)
        said, counts = problems(soak, done, copy)
        assert counts["different"] == 1
        assert said == "1 victims differ"
    path.unlink()
    assert problems(soak, done, copy)[1]["missing"] == 5


def test_other_files_and_debris_are_noticed(soak: ModuleType, done: Path, copy: Path) -> None:
    (copy / "idlg" / "victims.csv").write_text("victim\n")
    (copy / "fidelity.png").unlink()
    (copy / "idlg" / "last.ckpt.3.partial").touch()
    rows = json.loads((copy / "summary.json").read_text())
    rows[0]["mse_median"] *= 2
    (copy / "summary.json").write_text(json.dumps(rows))
    said, _ = problems(soak, done, copy)
    assert "idlg/victims.csv differs from that of the undisturbed run; fidelity.png differs" in said
    assert "summary.json has" in said
    assert "files were left behind: ['idlg/last.ckpt.3.partial']" in said


def test_a_problem_is_told_and_fails(soak: ModuleType) -> None:
    found = sys.modules["soak_scenarios"].Verdict("sigterm", figures={"rows": 3})
    found.expect(True, "nothing")
    assert str(found) == "sigterm: ok (rows 3)"
    found.expect(False, "a victim is present twice")
    assert str(found) == "sigterm: FAILED (rows 3)\n    a victim is present twice"
    assert not found.passed


@pytest.mark.parametrize(("first", "problems"), [(5, 0), (-1, 0), (0, 1), (4, 1)])
def test_a_run_that_begins_anew_is_noticed(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, first: int, problems: int
) -> None:
    scenarios, child = sys.modules["soak_scenarios"], sys.modules["soak_child"]
    monkeypatch.setattr(scenarios, "_saved_at", lambda job: 5)
    monkeypatch.setattr(scenarios, "run", lambda job: child.Ending(0, first, 9, None, ""))
    monkeypatch.setattr(scenarios, "_compare", lambda *given: None)
    job = child.Job(Path(), "sample", None, 1, 1, 0, 1.0)
    found = scenarios.Verdict("killed")
    scenarios._resume(found, job, job)
    assert found.problems == [f"resumed from {first}, but the checkpoint is of 5"] * problems


def test_without_the_right_to_mount_the_length_of_files_is_limited(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with sys.modules["soak_scenarios"]._small_disk(tmp_path / "disk") as (folder, filler):
        assert folder.is_dir()
        assert filler is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        (["--kills", "-1"], "Expected `kills` to be a whole number of at least 0, but got -1"),
        (["--scenario-victims", "1"], "Expected `scenario_victims` to be a whole number of at least 2, but got 1"),
        (["--checkpoint-seconds", "0"], "Expected `checkpoint_seconds` to be positive and finite, but got 0.0"),
        (["--max-evaluations", "0"], "Expected `max_evaluations` to be a whole number of at least 1, but got 0"),
        (["--scenarios", "flood"], "Expected `--scenarios` to be one of ['command_line', 'disk_full'"),
        (["--dataset", "nothing"], "Expected `dataset` to be one of"),
        (["--output", "full"], "Expected `--output` to be an empty folder, but got 'full'"),
    ],
)
def test_refuses_at_once(
    soak: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "soak.json").touch()
    monkeypatch.setattr(soak, "soak", None)
    with pytest.raises(SystemExit):
        soak.main(["--output", "out", *options])
    assert message in capsys.readouterr().err
