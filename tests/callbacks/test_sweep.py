"""``experiments/idlg/sweep.yaml`` is one that ``wandb sweep`` accepts, and its runs ones that ``leakage`` does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from leakage.cli.main import main

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "experiments" / "idlg" / "sweep.yaml"


@pytest.fixture
def sweep() -> dict[str, Any]:
    from wandb.sdk.launch.sweeps.utils import load_sweep_config  # here, as it imports a lot

    config = load_sweep_config(str(SWEEP))
    assert config is not None
    return config


def commands(sweep: dict[str, Any]) -> list[list[str]]:
    """The commands that W&B's agent would run."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    names = list(sweep["parameters"])
    runs = []
    for values in itertools.product(*(sweep["parameters"][name]["values"] for name in names)):
        macros = create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in zip(names, values, strict=True)}}
        )
        macros["env"] = ["/usr/bin/env"]
        command: list[str] = []
        for part in create_sweep_command(list(sweep["command"])):
            command += macros[part[2:-1]] if part.startswith("${") else [part]
        runs.append(command)
    return runs


def test_fits_the_schema_of_wandb(sweep) -> None:
    # The schema is part of `wandb[sweeps]`, which is where W&B's own server and controller take it from.
    sweeps = pytest.importorskip("sweeps", reason="the sweep schema comes with `pip install wandb[sweeps]`")
    assert sweeps.schema_violations_from_proposed_config(sweep) == []
    assert sweeps.schema_violations_from_proposed_config({**sweep, "method": "guess"}) != []


def test_is_a_grid_over_protocol_seed_and_data(sweep) -> None:
    assert sweep["method"] == "grid"
    assert set(sweep["parameters"]) == {"data.dataset", "data.seed", "model.protocol"}
    assert sweep["metric"] == {"name": "val/success_rate", "goal": "maximize"}
    assert len(commands(sweep)) == 12


def test_leakage_takes_every_command(sweep, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    seen = set()
    for command in commands(sweep):
        assert command[:2] == ["/usr/bin/env", "leakage"]
        with pytest.raises(SystemExit) as end:
            main([*command[2:], "--print_config"])
        assert end.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["trainer"]["logger"]["class_path"].endswith("OfflineSafeWandbLogger")
        seen.add(
            (
                config["data"]["init_args"]["dataset"],
                config["data"]["init_args"]["seed"],
                config["model"]["init_args"]["protocol"],
            )
        )
    assert seen == set(
        itertools.product(["mnist", "fashion_mnist"], [0, 1, 2], ["published", "robust"])
    )  # fmt: skip
