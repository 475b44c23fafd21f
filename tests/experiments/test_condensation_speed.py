from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from leakage.condensation import GradientMatchingCondensation
from leakage.datamodules import LabelledImages
from leakage.models import ConvNet, draw_state

from .conftest import EXPERIMENTS, load

TINY = ["--dataset", "sample", "--width", "4", "--batch-size", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    return load("benchmarks/condensation_speed.py")


def options(speed: ModuleType, *more: str) -> argparse.Namespace:
    return speed._parser().parse_args([*TINY, *more, "--output", "unused"])


def no_turn(seconds: Mapping[str, float]) -> None:
    pass


def sample(given: argparse.Namespace) -> LabelledImages:
    data = LabelledImages("sample", batch_size=given.batch_size, seed=given.seed)
    data.setup("fit")
    return data


def test_both_sides_end_with_the_same_images_and_take_as_many_turns(speed: ModuleType) -> None:
    given = options(speed, "--iterations", "2", "--seed", "3")
    turns: dict[str, list[dict[str, float]]] = {"plain": [], "leakage": []}
    images = {
        "plain": speed.run_plainly(sample(given), given, lambda spent: turns["plain"].append(dict(spent))),
        "leakage": speed.run_ours(sample(given), given, lambda spent: turns["leakage"].append(dict(spent))),
    }
    change = images["plain"] - speed.start(sample(given), given)
    assert change.abs().amax(dim=(1, 2, 3)).min() > 1e-3, "all have moved"
    assert (images["plain"] - images["leakage"]).norm() / change.norm() < 1e-4
    for name, seen in turns.items():
        assert len(seen) == 1 + 2 + 1, f"{name}: before each iteration, and at the end"
        assert seen[0]["real"] == 0 < seen[1]["real"] < seen[2]["real"] < seen[3]["real"]
    assert turns["plain"][3]["network"] == 0, "it is never trained"


def test_several_images_per_class_train_the_network(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of more images than a batch, too."""
    monkeypatch.setattr(speed, "schedule", lambda count, loops: (2, 3))
    monkeypatch.setattr(speed, "NETWORK_BATCH_SIZE", 8)

    def condensation(count: int, **kwargs: object) -> GradientMatchingCondensation:
        return GradientMatchingCondensation(count, loops=(2, 3), network_batch_size=8, **kwargs)

    monkeypatch.setattr(speed, "GradientMatchingCondensation", condensation)
    given = options(speed, "--iterations", "1", "--images-per-class", "2")
    turns: list[dict[str, float]] = []
    plain = speed.run_plainly(sample(given), given, lambda spent: turns.append(dict(spent)))
    ours = speed.run_ours(sample(given), given, no_turn)
    assert len(turns) == 1 + 1 + 1, "one for both steps of an iteration"
    assert turns[1]["network"] > 0
    change = plain - speed.start(sample(given), given)
    assert (plain - ours).norm() / change.norm() < 1e-3


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 28, 16)])
def test_the_plain_network_is_the_librarys(speed: ModuleType, shape: tuple[int, int, int]) -> None:
    ours = ConvNet(shape[0], shape[1:], 5, width=8)
    plain = speed.plain_network(*shape, 5, 8)
    state = draw_state(ours, 1)
    ours.load_state_dict(state)
    plain.load_state_dict(state)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(images), ours(images))


def test_the_distance_by_hand(speed: ModuleType) -> None:
    rows = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    targets = torch.tensor([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]])
    assert float(speed.distance([rows], [targets])) == pytest.approx((1 - 24 / 25) + 2 + 1)
    assert float(speed.distance([rows, rows], [targets, rows])) == pytest.approx(0.04 + 2 + 1 + 1, abs=1e-5)


class InThread:
    """A side as a thread of this process, which has imported everything already."""

    script: ModuleType

    def __init__(self, command: list[str], **_: object) -> None:
        assert command[0] == sys.executable
        assert command[1] == str(EXPERIMENTS / "benchmarks" / "condensation_speed.py")
        options = argparse.Namespace(**json.loads(self.script._parser().parse_args(command[2:]).side))
        reads, writes = zip(os.pipe(), os.pipe(), strict=True)
        commands, self.stdout = (os.fdopen(end) for end in reads)
        self.stdin, answers = (os.fdopen(end, "w") for end in writes)
        self.thread = threading.Thread(target=self.script._be_a_side, args=(options, commands, answers))
        self.thread.start()

    def poll(self) -> int | None:
        return None if self.thread.is_alive() else 0

    def terminate(self) -> None:
        pass

    def wait(self) -> int:
        self.thread.join()
        return 0


def test_the_script(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InThread, "script", speed, raising=False)
    monkeypatch.setattr(speed.subprocess, "Popen", InThread)
    output = tmp_path / "speed.json"
    speed.main([*TINY, "--iterations", "2", "--output", str(output)])
    said = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert (result["dataset"], result["threads"], result["images_per_class"]) == ("sample", 1, 1)
    seconds = result["seconds_per_iteration"]
    assert result["ratio"] == pytest.approx(seconds["plain"] / seconds["leakage"])
    assert f"{result['ratio']:.2f} times faster" in said
    for name in ("plain", "leakage"):
        taken = result["seconds_of_iterations"][name]
        assert len(taken) == 2, "without the warm-up"
        assert seconds[name] == pytest.approx(sum(taken) / 2)
        parts = result["mean_seconds_by_part"][name]
        assert parts.keys() == {"real", "synthetic", "network", "other"}
        assert sum(parts.values()) == pytest.approx(sum(taken) / 2)
        assert parts["real"] > 0
        assert parts["other"] > 0
        peak, before = result["peak_memory_mib"][name], result["memory_before_mib"][name]
        # The kernel counts both in steps.
        assert peak is None or 50 < before < 1.05 * peak
    assert 0 < result["max_abs_difference"] < 1e-4
    assert 0 < result["relative_difference"] < result["relative_difference_of_change"] < 1e-3
    lines = [line for line in said.splitlines() if " of 3, " in line]
    assert [line.split(",")[1].split(":")[0].strip() for line in lines] == ["plain", "leakage"] * 3, "in turns"


class FakeSide:
    """Says what a side would, at once; the images of ours are off by ``error``."""

    error = 0.0

    def __init__(self, name: str, given: argparse.Namespace, folder: Path) -> None:
        self.file = folder / name
        start = torch.full((2, 1, 4, 4), 0.5)
        images = torch.ones(2, 1, 4, 4) + (self.error if name == "leakage" else 0)
        save_file({"images": images, "start": start}, self.file)
        self.turns = 0
        self.pace = {"plain": 2.0, "leakage": 1.0}[name]

    def __enter__(self) -> FakeSide:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def iterate(self) -> dict[str, float]:
        self.turns += 1
        # The warm-up, then iterations one of which was disturbed.
        seconds = {1: 50.0, 3: 9.0}.get(self.turns, self.pace)
        return {"seconds": seconds, "real": 0.5 * self.turns, "synthetic": 0.0, "network": 0.0}

    def hear(self) -> dict[str, float]:
        return {"memory": 100.0}


@pytest.mark.parametrize(
    ("error", "precision", "judged"),
    [(9e-4, "32-true", True), (2e-3, "32-true", False), (float("nan"), "32-true", False), (2e-3, "bf16-mixed", True)],
)
def test_medians_and_the_verdict(
    speed: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: float,
    precision: str,
    judged: bool,
) -> None:
    monkeypatch.setattr(FakeSide, "error", error)
    monkeypatch.setattr(speed, "Side", FakeSide)
    arguments = [*TINY, "--precision", precision, "--output", str(tmp_path / "speed.json")]
    if judged:
        speed.main(arguments)
    else:
        with pytest.raises(SystemExit, match=r"agree to 0\.001, but got a relative difference of"):
            speed.main(arguments)
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["ratio"] == 2.0
    assert result["seconds_per_iteration"] == {"plain": 2.0, "leakage": 1.0}
    assert result["mean_seconds_by_part"]["leakage"]["real"] == pytest.approx(0.5)
    if error == error:
        assert result["relative_difference"] == pytest.approx(error, rel=1e-3)
        assert result["relative_difference_of_change"] == pytest.approx(2 * error, rel=1e-3)
    else:
        assert result["relative_difference"] is None


def test_a_side_that_dies_is_told(speed: ModuleType, tmp_path: Path) -> None:
    given = options(speed)
    side = speed.Side.__new__(speed.Side)
    side.name = "plain"
    command = [speed.sys.executable, "-S", "-c", "import sys; sys.exit(7)"]
    pipe = speed.subprocess.PIPE
    side.process = speed.subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    with side, pytest.raises(SystemExit, match="the plain side ended with exit code 7"):
        side.iterate()
    assert given.side is None


def test_the_sample_where_there_is_no_fashion_mnist(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "Side", FakeSide)
    output = tmp_path / "speed.json"
    speed.main(["--root", str(tmp_path / "none"), "--output", str(output)])
    assert "FashionMNIST was not found" in capsys.readouterr().out
    assert json.loads(output.read_text())["dataset"] == "sample"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "0"], "Expected `iterations` to be a whole number of at least 1, but got 0"),
        (["--threads", "0"], "Expected `threads` to be a whole number of at least 1, but got 0"),
        (["--images-per-class", "2"], "Expected `loops` (outer, inner) with images_per_class=2"),
        (["--seed", "-1"], "Expected `seed` to be a whole number of at least 0, but got -1"),
        (["--dataset", "nothing"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (["--dataset", "sample", "--image-size", "9"], "Expected no `image_size` with 'sample', but got 9"),
        (["--precision", "64-true"], "invalid choice: '64-true'"),
        (["--output", "."], "Expected `--output` to be a file, but got the folder"),
        (["--output", "file/a.json"], "Expected `output` to be a folder that can be written, but got 'file'"),
    ],
)
def test_refuses_at_once(
    speed: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(speed, "_measure", None)
    output = [] if "--output" in arguments else ["--output", "a.json"]
    with pytest.raises(SystemExit) as end:
        speed.main([*arguments, *output])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses_a_gpu_that_is_not_there(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        speed.main([*TINY, "--accelerator", "cuda", "--output", str(tmp_path / "a.json")])
    assert "Expected `--accelerator` to be cpu, since torch finds no GPU, but got cuda" in capsys.readouterr().err
