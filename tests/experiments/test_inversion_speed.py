from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from .conftest import EXPERIMENTS, load

SHORT = ["--network", "lenet", "--lanes", "3", "--plain-victims", "1", "--iterations", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "benchmarks")  # as for a script that is run
        yield load("benchmarks/inversion_speed.py")


@pytest.mark.parametrize("weights", ["shared", "own"])
def test_writes_both_sides(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    output = tmp_path / "speed.json"
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        script.main([*SHORT, "--weights", weights, "--output", str(output), "--threads", "1", "--repeats", "2"])
        assert torch.get_num_threads() == 2, "as it was before"
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert output.with_suffix(".png").stat().st_size > 0
    result = json.loads(output.read_text())
    assert (result["network"], result["weights"], result["lanes"], result["machine"]["threads"]) == (
        "lenet", weights, 3, 1,
    )  # fmt: skip
    assert set(result["largest_differences"]) == {"objective", "gradient"}
    assert 0 < max(result["largest_differences"].values()) < 1e-3
    for part in ("seconds", "cpu_seconds"):
        seconds = result[f"{part}_per_victim_and_iteration"]
        assert set(seconds) == {"plain", "vmap", "leakage"}
        assert min(seconds.values()) > 0
    assert set(result["ratio"]) == set(result["ratio_of_cpu_time"]) == {"vmap", "leakage"}
    assert "turn 2 of 2" in capsys.readouterr().out


def test_the_plain_search_ends_where_ours_does(script: ModuleType, tmp_path: Path) -> None:
    """The same algorithm, with the same decays: signs of tiny derivatives aside, the same images."""
    given = script.make_parser().parse_args([*SHORT, "--iterations", "8", "--output", str(tmp_path / "a.json")])
    given.device = torch.device("cpu")
    victims = script.make_victims(given)
    shared = victims.share(range(3))
    plain = script.Plain(victims.victim.model, shared, 8)
    attack = script.make_attack(given, steps=8)
    seen = []
    evaluate = script.Evaluator.__call__

    def noted(evaluator: object, shared: object, kept: object, unknowns: dict[str, torch.Tensor]) -> object:
        seen.append(unknowns["images"].detach().clone())
        return evaluate(evaluator, shared, kept, unknowns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Evaluator, "__call__", noted)
        script.make_trainer(given.device, limit_val_batches=0).fit(attack, datamodule=script.make_victims(given))
    plain.steps = 8
    path = plain.search(0, script.starts(given)[0])
    assert torch.equal(seen[-8][0], script.starts(given)[0])
    # The last step is made after the last evaluation.
    plain_before = plain.search(0, script.starts(given)[0], until=7)
    assert float((seen[-1][0] - plain_before).abs().gt(1e-4).double().mean()) < 0.02
    assert float((path - plain_before).abs().max()) > 1e-5


def test_a_difference_is_told(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.Plain, "evaluate", lambda self, images: (torch.ones(()), torch.ones_like(images)))
    with pytest.raises(ArithmeticError, match="Expected both sides to agree"):
        script.main([*SHORT, "--output", str(tmp_path / "a.json")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "1"], "Expected `iterations` to be a whole number of at least 2, but got 1"),
        (["--repeats", "0"], "Expected `repeats` to be a whole number of at least 1, but got 0"),
        (["--plain-victims", "4"], "Expected `--plain-victims` of at most the 3 lanes, but got 4"),
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
