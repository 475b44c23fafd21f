"""One attack on the victims of one client: time it, run it within its budget, and keep its result on disk."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leakage.attacks import GradientInversion
from leakage.audit.client import slug
from leakage.audit.report import Measured, Planned, VictimRow
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules import SharedGradients
from leakage.files.records import from_json, to_json
from leakage.files.text import write_json, write_text
from leakage.inversion.reconstruction import Reconstruction

# Evaluations of the trial that measures how long an attack takes. The first one also includes the set-up.
_TRIED = 2
# The number of victims in the first group, and the largest number in a later one.
_FIRST_GROUP, _MOST_IN_GROUP = 4, 64


@dataclass
class Outcome:
    """The result of an attack: what it found, the seconds it took, and whether it finished all its victims."""

    found: Reconstruction
    seconds: float
    complete: bool


@dataclass
class Record:
    """An attack that is done, as kept on disk.

    Attributes:
        key: the digest that identifies the audit.
        planned: the entry of the plan, with its outcome.
        measured: the attack's figures; None if it did not run.
        rows: one row per image.
        reached: whether the budget was enough for the attack.
    """

    key: str
    planned: Planned
    measured: Measured | None = None
    rows: list[VictimRow] = field(default_factory=list)
    reached: bool = True


class _Clock(Callback):
    """Record when each training step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start of the first step."""
        self.ends.append(time.monotonic())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Record the end of a step."""
        self.ends.append(time.monotonic())

    @property
    def step(self) -> float:
        """Mean seconds of a step, without the first, which includes the set-up."""
        steps = [after - before for before, after in itertools.pairwise(self.ends)]
        later = steps[1:] or steps or [0.0]
        return sum(later) / len(later)


def fit(
    attack: GradientInversion,
    shared: SharedGradient,
    victim: Victim,
    *,
    accelerator: str,
    seconds: float | None = None,
    steps: int = -1,
    callbacks: tuple[Callback, ...] = (),
) -> Outcome:
    """Run an attack on shared gradients, and on nothing else, until it ends or its time is up."""
    trainer = Trainer(
        max_epochs=1,
        max_steps=steps,
        max_time=None if seconds is None else timedelta(seconds=max(seconds, 0.1)),
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )
    began = time.monotonic()
    lanes: int | str = len(shared) if len(shared) <= _FIRST_GROUP else "auto"  # "auto" takes time
    trainer.fit(attack, datamodule=SharedGradients(shared, victim, lanes=lanes))
    done = len(attack.finished)
    found = Reconstruction.cat([attack.finished, attack.current()]).map(lambda tensor: tensor.detach().cpu())
    return Outcome(found.select(found.ids.argsort()), time.monotonic() - began, done == len(shared))


def seconds_of_one(attack: GradientInversion, shared: SharedGradient, victim: Victim, *, accelerator: str) -> float:
    """Measure the seconds of one evaluation for one victim in a short trial.

    Raises:
        ValueError: the attack can't run on these victims.
    """
    clock = _Clock()
    fit(attack, shared, victim, accelerator=accelerator, steps=_TRIED, callbacks=(clock,))
    return clock.step / len(shared)


def fit_all(
    make: Callable[[], GradientInversion],
    share: Callable[[Sequence[int]], SharedGradient],
    victim: Victim,
    victims: int,
    *,
    accelerator: str,
    seconds: float,
    expected: float,
    folder: Path,
) -> Outcome:
    """Run an attack on as many victims as the time allows, group by group.

    Only the clock decides how many victims are attacked, so no victim is left out because of what was found. Each group
    is written to disk as soon as it is done.

    Args:
        make: a function that returns a fresh attack.
        share: a function that returns what the victims with some indices shared.
        victim: the client.
        victims: the number of victims.
        accelerator: the accelerator, as in the Trainer.
        seconds: the time for all victims.
        expected: the expected seconds for one victim.
        folder: the folder for the groups.
    """
    parts: list[Reconstruction] = []
    done, spent, size, complete = 0, 0.0, _FIRST_GROUP, True
    while done < victims:
        path = folder / f"{done}.safetensors"
        if path.is_file():
            part = Reconstruction.load(path)
            took = float(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        else:
            each = spent / done if done else expected
            left = seconds - spent
            fitting = int(left / each) if each > 0 else victims
            if done and fitting < 1:
                break
            number = max(1, min(size, fitting, victims - done))
            began = time.monotonic()
            shared = share(range(done, done + number))
            left -= time.monotonic() - began
            outcome = fit(make(), shared, victim, accelerator=accelerator, seconds=left)
            part, took = outcome.found, time.monotonic() - began
            if not outcome.complete:
                if done:
                    break
                complete = False
            else:
                write_json(path.with_suffix(".json"), took)
                part.save(path)
        parts.append(part)
        done, spent, size = done + len(part), spent + took, min(2 * size, _MOST_IN_GROUP)
        if not complete:
            break
    return Outcome(Reconstruction.cat(parts), spent, complete)


def save_record(folder: Path, record: Record) -> None:
    """Write a record, from which an audit that was killed resumes."""
    path = _record_path(folder, record.planned.client, record.planned.attack)
    write_text(path, json.dumps(to_json(record), allow_nan=False) + "\n")


def load_record(folder: Path, client: str, attack: str, key: str) -> Record | None:
    """Load the record of an attack on a client; None if there is no file.

    Raises:
        ValueError: the file is damaged or belongs to another audit.
    """
    path = _record_path(folder, client, attack)
    if not path.is_file():
        return None
    remedy = f"Remove '{folder}', or choose another folder."
    try:
        record = from_json(Record, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected '{path}' as an audit writes it, but got: {error} {remedy}") from None
    if record.key != key:
        raise ValueError(f"Expected `output` without another audit, but got '{path}' of one. {remedy}")
    return record


def _record_path(folder: Path, client: str, attack: str) -> Path:
    return folder / "runs" / slug(client) / f"{attack}.json"
