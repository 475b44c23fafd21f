"""Throughput, parts, processes and start: that they measure what they say, on tiny sizes; never how long it took."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from leakage.attacks import IDLGAttack, InvertingGradientsAttack
from leakage.datamodules import Victims
from leakage.inversion.lanes import Lanes
from leakage.solvers import lbfgs

from .conftest import EXPERIMENTS, load

NAMES = ("throughput", "parts", "processes", "start", "defense_speed")
MACHINE = {"cpu", "system", "cores", "threads", "device", "gpu", "torch", "python"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "benchmarks")  # as for a script that is run
        yield {name: load(f"benchmarks/{name}.py") for name in NAMES}
        sys.modules.pop("setting", None)


@pytest.fixture
def throughput(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["throughput"]


@pytest.fixture
def parts(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["parts"]


@pytest.fixture
def processes(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["processes"]


@pytest.fixture
def start(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["start"]


def read(output: Path) -> dict[str, Any]:
    assert output.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    result: dict[str, Any] = json.loads(output.read_text())
    assert set(result["machine"]) == MACHINE
    return result


CPU = ["--device", "cpu", "--threads", "1"]


def test_throughput_over_lanes(throughput: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "throughput.json"
    cells = ["lenet/own/28/1", "lenet/shared/28/2"]
    limits = ["--seconds", "1000", "--total-seconds", "1000", "--evaluations", "5"]
    throughput.main([*CPU, "--output", str(output), "--cells", *cells, "--lanes", "1", "2", "4", *limits])
    result = read(output)
    assert result["skipped"] == []
    assert [cell["cell"] for cell in result["cells"]] == cells
    for cell in result["cells"]:
        rows = cell["rows"]
        assert [row["lanes"] for row in rows] == [1, 2, 4]
        assert rows[0]["ratio_to_first"] == 1
        for row in rows:
            assert row["seconds_per_victim_and_evaluation"] == row["seconds_per_step"] / row["lanes"] > 0
            assert 0 < row["objective_share"] < 1
            assert row["stopped_early"] == 0
        peaks = [row["peak_bytes"] for row in rows]
        assert peaks == sorted(peaks)
        assert cell["memory"]["bytes_per_lane"] == pytest.approx((peaks[2] - peaks[1]) / 2, rel=0.2)
        assert cell["memory"]["r_squared"] > 0.99
    own, shared = (cell["rows"][0] for cell in result["cells"])
    pairs = IDLGAttack().search.history_size
    assert own["full_history_bytes_per_lane"] == 4 * (2 * pairs * 784 + pairs**2)
    assert shared["full_history_bytes_per_lane"] == 4 * (2 * pairs * 2 * 784 + pairs**2)
    assert "2 of 2" in capsys.readouterr().out


def test_what_the_limits_leave_out_is_told(
    throughput: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"seconds_per_step": 1.0, "objective_share": 0.5, "peak_bytes": 2**20, "stopped_early": 0.0}

    def measure(cell: Any, lanes: int, given: Any) -> dict[str, Any]:
        if cell.weights == "shared" and lanes == 2:
            raise throughput.UnmeasuredError("memory", "allocation failed with 2 lanes")
        return {**row, "lanes": lanes, "seconds_per_victim_and_evaluation": 1 / lanes, "full_history_bytes_per_lane": 1}

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "free_memory", lambda device: 4 * 2**20)
    output = tmp_path / "a.json"
    cells = ["--cells", "lenet/own/28/1", "lenet/shared/28/1"]
    throughput.main([*CPU, "--output", str(output), *cells, "--lanes", "1", "2", "8", "16"])
    result = read(output)
    assert result["skipped"] == [
        {
            "cell": "lenet/own/28/1",
            "lanes": [8, 16],
            "reason": "memory",
            "detail": "about 0.0 GiB needed, 0.0 GiB free",
        },
        {
            "cell": "lenet/shared/28/1",
            "lanes": [2, 8, 16],
            "reason": "memory",
            "detail": "allocation failed with 2 lanes",
        },
    ]
    assert result["cells"][1]["memory"] is None, "no line through one point"
    assert "skipped: lenet/own/28/1, lanes [8, 16]: memory" in capsys.readouterr().out

    moments = iter(range(0, 10_000, 10))
    monkeypatch.setattr(throughput.time, "monotonic", lambda: float(next(moments)))
    throughput.main([*CPU, "--output", str(output), *cells[:2], "--lanes", "1", "2", "--seconds", "35"])
    (skipped,) = read(output)["skipped"]
    assert (skipped["lanes"], skipped["reason"]) == ([2], "time")
    assert "20 s needed" in skipped["detail"]


def test_an_allocation_that_fails_is_no_measurement(throughput: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Lanes.evaluate

    def little_memory(lanes: Lanes) -> Any:
        if len(lanes) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return evaluate(lanes)

    monkeypatch.setattr(Lanes, "evaluate", little_memory)
    cell = throughput.Cell.parse("lenet/own/28/1")
    with pytest.raises(throughput.UnmeasuredError, match="allocation failed with 2 lanes"):
        throughput.attack(cell, 2, 4, torch.device("cpu"), 0)


def test_a_search_that_is_over_at_once_is_no_measurement(
    throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "TOLERANCE", 1e9)
    cell = throughput.Cell.parse("lenet/own/28/1")
    with pytest.raises(throughput.UnmeasuredError, match="all victims stopped after 1 evaluations"):
        throughput.attack(cell, 2, 4, torch.device("cpu"), 0)


def test_the_line_is_that_of_least_squares(throughput: ModuleType) -> None:
    def rows(*peaks: float) -> list[dict[str, float]]:
        return [{"lanes": 2**power, "peak_bytes": peak} for power, peak in enumerate(peaks)]

    assert throughput.line(rows(5)) is None
    exact = throughput.line(rows(7, 10, 16))
    assert exact == pytest.approx({"bytes_per_lane": 3, "fixed_bytes": 4, "r_squared": 1})
    bent = throughput.line(rows(1, 4, 16))
    lanes, peaks = torch.tensor([[1.0, 1], [2, 1], [4, 1]]), torch.tensor([[1.0], [4], [16]])
    slope, fixed = torch.linalg.lstsq(lanes, peaks).solution.flatten().tolist()
    assert (bent["bytes_per_lane"], bent["fixed_bytes"]) == pytest.approx((slope, fixed))
    assert 0.9 < bent["r_squared"] < 0.995
    assert throughput.line(rows(3, 3))["r_squared"] == 1


def test_parts_of_a_run(parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    monkeypatch.setattr(parts, "SIZES", ((1, 16), (4, 8)))
    direct, evaluate = lbfgs.push_and_direct, Lanes.evaluate
    output = tmp_path / "parts.json"
    sizes = ["--victims", "4", "--lanes", "3", "--repeats", "1", "--methods", "idlg"]
    parts.main([*CPU, "--output", str(output), *sizes])
    assert (lbfgs.push_and_direct, Lanes.evaluate) == (direct, evaluate), "nothing is left behind"
    result = read(output)
    found = result["methods"]["idlg"]
    assert sum(found["share"].values()) == pytest.approx(1)
    assert list(found["share"]) == [*parts.PARTS, parts.OTHER]
    assert all(share > 0 for share in found["share"].values())
    assert found["share"]["objective"] > found["share"]["lanes found"]
    assert found["most_lanes"] == 3
    assert found["success_rate"] == 1
    # Three lanes in every step of the first; at the end fewer.
    assert 0 <= found["idle_share_of_lane_evaluations"] < 0.5
    assert set(result["operations_per_second"]) == {"1x16x16", "4x8x8"}
    limit = result["limit_seconds_per_evaluation"]["plain autograd"]
    fastest = max(result["operations_per_second"].values())
    assert limit == pytest.approx(result["operations_per_evaluation"]["plain autograd"] / fastest)
    seconds = found["seconds_per_victim_and_evaluation"]["objective"]
    assert found["ratio_to_limit"]["objective, plain autograd"] == pytest.approx(seconds / limit)


def test_idle_lanes_are_counted(parts: ModuleType) -> None:
    """Against the evaluations of each victim: two lanes that run until the slower one is done."""
    victims = Victims("sample", victims=2, lanes=2)
    victims.setup("fit")
    given = parts.argparse.Namespace(seed=0, device=torch.device("cpu"))
    run = parts.run_once("idlg", victims, given, None)
    assert run["evaluations"] <= run["lane_evaluations"] <= 2 * run["steps"]


def test_only_the_innermost_part_counts(parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(moments))
    watch = parts.Parts(torch.device("cpu"))
    inner = watch.time("inner", lambda: 5)
    assert watch.time("outer", lambda: inner() + 1)() == 6
    assert dict(watch.seconds) == {"outer": 5.0, "inner": 2.0}


def test_operations_of_plain_autograd(parts: ModuleType) -> None:
    """LeNet has 0.9 million multiplications and additions forwards; both derivatives take six to eight times that."""
    victims = Victims("sample", victims=1)
    victims.setup("fit")
    counts = parts.count_operations(victims, parts.argparse.Namespace(seed=0))
    forwards = 2 * (14**2 * 25 * 12 + 7**2 * 25 * 144 * 2 + 5880)
    assert 6 * forwards < counts["plain autograd"] < 9 * forwards
    assert counts["library"] > 3 * forwards


def outcome(**changes: Any) -> dict[str, Any]:
    return {
        "ids": torch.arange(3),
        "labels": torch.tensor([[1], [2], [3]]),
        "success": torch.tensor([True, True, False]),
        "images": torch.zeros(3, 1, 1, 2, 2),
    } | changes


def test_sides_are_compared(processes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {(1, 1): 8.0, (1, 2): 6.0, (2, 1): 4.0}
    turns: list[tuple[int, int]] = []

    def run(given: Any, count: int, threads: int, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
        turns.append((count, threads))
        return {"seconds": seconds[count, threads], "start_up": 1.0}, outcome()

    monkeypatch.setattr(processes, "_run", run)
    output = tmp_path / "processes.json"
    processes.main(["--output", str(output), "--victims", "4", "--repeats", "2"])
    result = read(output)
    assert turns == [(1, 1), (1, 2), (2, 1)] * 2, "in turn"
    assert result["ratio"] == {"to 1 process, 1 thread": 2.0, "to 1 process, 2 threads": 1.5}
    assert result["seconds_per_victim"]["2 processes, 1 thread each"] == 1.0

    def differing(given: Any, count: int, threads: int, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
        labels = torch.tensor([[1], [2], [count]])
        return {"seconds": 1.0, "start_up": 1.0}, outcome(labels=labels)

    monkeypatch.setattr(processes, "_run", differing)
    with pytest.raises(SystemExit, match=r"Expected the results of '1 process, 1 thread' from \['2 processes, 1 thre"):
        processes.main(["--output", str(output), "--victims", "4", "--repeats", "1"])


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"images": torch.full((3, 1, 1, 2, 2), 0.03)}, True),
        ({"images": torch.full((3, 1, 1, 2, 2), 0.04)}, False),
        ({"images": torch.tensor([0.0, 0.0, 9.0]).view(3, 1, 1, 1, 1).expand(3, 1, 1, 2, 2)}, True),
        ({"success": torch.tensor([True, True, True])}, False),
        ({"labels": torch.tensor([[1], [2], [4]])}, False),
        ({"ids": torch.tensor([0, 2, 1])}, False),
    ],
)
def test_what_counts_as_the_same(processes: ModuleType, changes: dict[str, Any], same: bool) -> None:
    assert processes.compare_outcomes(outcome(), outcome(**changes))["same"] is same


def test_a_side_writes_what_it_found(processes: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "outcome.pt"
    options = {"dataset": "sample", "root": None, "image_size": None, "victims": 3, "lanes": 2, "seed": 0}
    side = options | {"processes": 1, "threads": 1, "output": str(file), "began": 0.0}
    processes.main(["--output", str(file), "--side", json.dumps(side)])
    found = torch.load(file, weights_only=True)
    assert found["ids"].tolist() == [0, 1, 2]
    assert found["success"].tolist() == [True] * 3
    assert found["said"]["seconds"] > 0


def test_the_first_evaluation_of_the_demo_ends_it(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class EndError(BaseException):
        """Of the process."""

    def end(code: int) -> None:
        raise EndError(code)

    evaluate, calls = Lanes.evaluate, []
    monkeypatch.setattr(Lanes, "evaluate", lambda lanes: (calls.append(lanes), evaluate(lanes))[1])
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path), "2"])
    with pytest.raises(EndError):
        exec(start.DEMO, {})
    assert len(calls) == 1
    assert start.MARK in capsys.readouterr().out


def test_moments_of_new_processes(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = "import sys; print('in one line with the ', end='')\n"
    monkeypatch.setattr(start, "MOMENTS", {"import torch": start.PRINT, start.FIRST: bar + start.PRINT})
    output = tmp_path / "start.json"
    start.main(["--output", str(output), "--repeats", "2"])
    result = read(output)
    assert list(result["seconds"]) == ["import torch", start.FIRST]
    assert all(0 < spent < 60 for spent in result["seconds"].values())
    assert "turn 2 of 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a process ended with 3"):
        start.seconds_until("import sys; sys.exit(3)", 2)


def test_the_machine_has_no_name(scripts: dict[str, ModuleType]) -> None:
    machine = sys.modules["setting"].describe_machine()
    assert platform.node() not in json.dumps(machine)
    assert machine["threads"] == torch.get_num_threads()
    assert machine["gpu"] is None
    assert not any(isinstance(value, float) and math.isnan(value) for value in machine.values())


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("throughput", ["--cells", "lenet"], "Expected `--cells` as NETWORK/WEIGHTS/SIZE/IMAGES (such as lenet/own"),
        ("throughput", ["--cells", "nothing/own/28/1"], "Expected `network` to be one of ['alexnet', 'convnet'"),
        ("throughput", ["--cells", "lenet/mine/28/1"], "Expected `weights` to be one of ['own', 'shared']"),
        ("throughput", ["--cells", "lenet/own/28/0"], "Expected `images` to be a whole number of at least 1"),
        ("throughput", ["--lanes", "2", "1"], "Expected `--lanes` in ascending order, but got [2, 1]"),
        ("throughput", ["--lanes", "0"], "Expected `lanes` to be a whole number of at least 1, but got 0"),
        ("throughput", ["--evaluations", "3"], "Expected `evaluations` to be a whole number of at least 4, but got 3"),
        ("throughput", ["--seconds", "0"], "Expected `seconds` to be positive and finite, but got 0"),
        ("throughput", ["--device", "abacus"], "Expected `--device` to be cpu or a GPU that works, but got 'abacus'"),
        ("throughput", ["--output", "."], "Expected `--output` to be a file, but got the folder"),
        ("throughput", ["--output", "a.txt"], "Expected `--output` to end with .json, but got 'a.txt'"),
        ("parts", ["--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        ("parts", ["--lanes", "0"], "Expected `lanes` to be a whole number of at least 1, but got 0"),
        ("parts", ["--dataset", "nothing"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        ("processes", ["--processes", "1"], "Expected `processes` to be a whole number of at least 2, but got 1"),
        ("processes", ["--victims", "1"], "Expected `--victims` to be at least the 2 processes, but got 1"),
        ("start", ["--repeats", "0"], "Expected `repeats` to be a whole number of at least 1, but got 0"),
        ("start", ["--output", "file/a.json"], "Expected `output` to be a folder that can be written, but got 'file'"),
    ],
)
def test_refuses_at_once(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(scripts[script], "_measure", None)
    output = [] if "--output" in arguments else ["--output", "a.json"]
    with pytest.raises(SystemExit) as end:
        scripts[script].main([*arguments, *output])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_defenses_take_turns_with_none(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    script, output, ran = scripts["defense_speed"], tmp_path / "speed.json", []
    measure = script.run

    def recorded(cell: Any, given: Any) -> dict[str, float]:
        ran.append((cell.name, measure(cell, given)))
        return ran[-1][1]

    sizes = ["--threads", "1", "--lanes", "2", "--evaluations", "2", "--repeats", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "run", recorded)
        script.main(["--output", str(output), "--defenses", "clip", *sizes])
    assert [name for name, _ in ran] == ["none", *["none", "clip"] * 2]
    ran = ran[1:]  # without the one that warms up
    (_, plain), (_, clipped), *_ = ran
    assert plain.keys() == clipped.keys() == {"capturing", "evaluation"}
    assert min(*plain.values(), *clipped.values()) > 0
    rows = {row["defense"]: row for row in read(output)["rows"]}
    for part in plain:
        ratios = [ran[place + 1][1][part] / ran[place][1][part] for place in (0, 2)]
        assert rows["none"][f"{part}_ratio"] == 1
        assert rows["clip"][f"{part}_ratio"] == pytest.approx(sum(ratios) / 2)
    assert isinstance(script.make_attack("inverting_gradients", 3, 0), InvertingGradientsAttack)


def test_bad_options_of_the_defenses(scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scripts["defense_speed"].main(["--output", "speed.txt"])
    assert "Expected `--output` to end with .json, but got 'speed.txt'" in capsys.readouterr().err
