"""Records of finished and stopped runs, from which a script with `--resume` continues."""

from __future__ import annotations

import copy
import json
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from leakage.files.checkpoints import WholeCheckpointIO


def holds_results(folder: Path) -> bool:
    """Return whether a folder contains a comparison, finished or not."""
    return (folder / "summary.json").exists() or any(folder.glob("*/run.json")) or any(folder.glob("*/seed_*/run.json"))


def code_version() -> str | None:
    """Return the commit of this code, with ``-dirty`` if it has changes; None if it is unknown."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def trainer_defaults() -> dict[str, Any]:
    """Return the default arguments of the Trainer."""
    return {
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "plugins": [WholeCheckpointIO()],
    }


def check_trainer(trainer: dict[str, Any]) -> None:
    """Check the arguments of the Trainer before any result of an earlier run is changed.

    Raises:
        ValueError: the Trainer refuses them.
    """
    try:
        Trainer(logger=False, **(trainer_defaults() | copy.deepcopy(trainer)))
    except (MisconfigurationException, TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in trainer.items())
        raise ValueError(f"Expected options that the Trainer accepts, but got {given}: {error}") from error


def read_record(folder: Path, configuration: dict[str, Any], kind: type) -> dict[str, Any] | None:
    """Read the row in a run's ``run.json``; None if the run is unfinished or was never started.

    Args:
        folder: folder of the run.
        configuration: the requested configuration.
        kind: the dataclass of the row.

    Raises:
        ValueError: the record is damaged or of another configuration.
    """
    record = folder / "run.json"
    if not record.is_file():
        return None
    damaged = (
        f"Expected '{record}' to be the whole record of a run, but got {{}}. Remove '{folder}' to run this method "
        "again, or choose another `output`."
    )
    try:
        saved = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(damaged.format(f"invalid JSON ({error})")) from error
    if not isinstance(saved, dict) or not isinstance(saved.get("configuration"), dict) or "row" not in saved:
        raise ValueError(damaged.format("another file"))
    differing = _differing(saved["configuration"], json.loads(json.dumps(configuration)))
    if differing:
        raise ValueError(
            f"Expected '{folder}' to hold a run of the same configuration, but got one that differs in "
            f"{'; '.join(differing)}. Choose another `output`, or don't resume."
        )
    row = saved["row"]
    if row is None:
        return None
    if not isinstance(row, dict) or row.keys() != {field.name for field in fields(kind)}:
        raise ValueError(damaged.format("a row with other columns"))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _differing(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in {**saved, **given}:
        there, here = saved.get(name), given.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found += _differing(there, here, f"{prefix}{name}.")
        elif there != here:
            found.append(f"`{prefix}{name}`: {there!r} there, {here!r} here")
    return found
