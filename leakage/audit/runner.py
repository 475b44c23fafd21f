"""The attacks of an audit on all clients: time them, plan them, and run them within the budget."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakage.audit.client import Client, slug
from leakage.audit.measuring import measure, measure_labels
from leakage.audit.plan import Candidate, Share, share_out
from leakage.audit.report import Measured, Planned
from leakage.audit.run import (
    Record,
    fit_all,
    load_record,
    save_record,
    seconds_of_one,
)
from leakage.audit.subject import Subject
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import GroundTruth
from leakage.files.text import write_text
from leakage.labels import LabelReader

# The number of victims whose labels are read at once.
_READ_AT_ONCE = 32
# There is a trial only if one evaluation is expected to take at most this share of the budget.
_TRIAL_SHARE = 0.05

_CLOSED_FORMS = ("labels", "rgap")


@dataclass
class Row:
    """A client of an audit, ready to be attacked.

    Attributes:
        client: the declared client.
        subject: the audited network and data.
        victim: the simulated client.
        number: the number of victims.
        configuration: what the victims' images, networks and losses depend on.
        capture: a function that returns what the victims with some indices share.
        truth: a function that returns what these victims hold; None if nobody knows.
        candidates: the attacks, in the order in which they run.
        reader: the reader of labels.
        counts: the label counts ``(K,)`` that an attacker reads, for as many victims as were read.
        reading_seconds: the seconds that this took.
    """

    client: Client
    subject: Subject
    victim: Victim
    number: int
    configuration: dict[str, Any]
    capture: Callable[[Sequence[int]], SharedGradient]
    truth: Callable[[Sequence[int]], GroundTruth] | None
    candidates: list[Candidate]
    reader: LabelReader
    counts: list[Tensor] = field(default_factory=list)
    reading_seconds: float = 0.0

    @property
    def reads_labels(self) -> bool:
        """Whether labels are read off the shared gradients."""
        return any(candidate.name == "labels" for candidate in self.candidates)

    def read_labels(self, most: int, seconds: float = math.inf) -> int:
        """Read the labels of the first victims, of at least one, and return of how many they are known.

        Args:
            most: the number of victims.
            seconds: the time after which no more labels are read, with the time of earlier calls.
        """
        while len(self.counts) < min(most, self.number) and (not self.counts or self.reading_seconds < seconds):
            # The reader learns what it needs with the first victim.
            stop = min(len(self.counts) + _READ_AT_ONCE, most, self.number) if self.counts else 1
            began = time.monotonic()
            shared = self.capture(range(len(self.counts), stop))
            self.counts += self.reader(shared, self.victim.without_secrets()).counts
            self.reading_seconds += time.monotonic() - began
        return len(self.counts)

    @cached_property
    def seconds_of_a_pass(self) -> float:
        """Seconds of one forward and backward pass with the images of one victim."""
        self.capture([0])
        began = time.monotonic()
        self.capture([0])
        return (time.monotonic() - began) / self.client.local_steps

    def share(self, places: Sequence[int], *, reads: bool) -> SharedGradient:
        """Return what these victims shared, for attacks; with the labels that were read, if ``reads``."""
        shared = self.capture(places)
        if not reads or shared.labels is not None:
            return shared
        self.read_labels(max(places) + 1)
        counts = torch.stack([self.counts[place] for place in places])
        every = torch.arange(counts.shape[1]).repeat(len(counts))
        labels = every.repeat_interleave(counts.flatten().cpu()).view(len(counts), -1)
        return replace(shared, labels=labels)


@dataclass
class Runner:
    """Plan and run the attacks. A plan or an attack that is already on disk is read from there.

    Attributes:
        rows: the clients.
        budget: the seconds for all attacks.
        folder: the folder of the audit.
        key: the digest that identifies the audit in its files.
        accelerator: the accelerator, as in the Trainer.
        success_threshold: an image counts as reconstructed if its MSE is below this.
        log: a function that is called with each line of progress.
    """

    rows: list[Row]
    budget: float
    folder: Path
    key: str
    accelerator: str
    success_threshold: float
    log: Callable[[str], object]
    plan: dict[tuple[str, str], Share] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)

    def run(self) -> list[Record]:
        """Make the plan, print it and run it. Return one record for each client and attack."""
        spent = self._make_plan()
        self.log(f"Plan, for {self.budget:.0f} s, of which timing took {spent:.0f} s")
        for row in self.rows:
            for candidate in row.candidates:
                place = row.client.name, candidate.name
                said = self.refused.get(place) or f"about {self.plan[place].expected_seconds:.0f} s"
                self.log(f"  {row.client.name}: {candidate.name}: {said}")
        todo = [(row, candidate) for row in self.rows for candidate in row.candidates]
        todo.sort(key=lambda pair: pair[0].candidates.index(pair[1]))  # the first of all clients, then the second, ...
        left = self.budget - spent
        self.log("Attacks")
        done: dict[tuple[str, str], Record] = {}
        solved: set[str] = set()
        for number, (row, candidate) in enumerate(todo):
            place = row.client.name, candidate.name
            record = load_record(self.folder, *place, self.key)
            if record is None:
                later = sum(self._expected(other) for other in todo[number + 1 :])
                # At least its own share, even if earlier attacks took longer than expected.
                seconds = max(left - later, min(left, self._expected((row, candidate))), 0.0)
                record = self._run_one(row, candidate, seconds, solved)
                save_record(self.folder, record)
            if record.measured is not None:
                left -= record.measured.seconds
                self.log(f"  {_line(record.measured)}")
                if _solves(record.measured, row.number):
                    solved.add(row.client.name)
            else:
                self.log(f"  {': '.join(place)}: not run. {record.planned.reason}")
            done[place] = record
        return [done[row.client.name, candidate.name] for row in self.rows for candidate in row.candidates]

    def _expected(self, pair: tuple[Row, Candidate]) -> float:
        share = self.plan.get((pair[0].client.name, pair[1].name))
        return 0.0 if share is None else share.expected_seconds

    # The plan.

    @property
    def plan_path(self) -> Path:
        """The path of the plan."""
        return self.folder / "runs" / "plan.json"

    def check_folder(self) -> None:
        """Raise a ``ValueError`` if the folder holds another audit."""
        if self.plan_path.is_file() and self._saved().get("key") != self.key:
            raise ValueError(
                f"Expected `output` without another audit, but got '{self.folder}', which holds one of other clients, "
                "weights, data or budget. Remove it, or choose another folder."
            )

    def _saved(self) -> dict[str, Any]:
        try:
            plan = json.loads(self.plan_path.read_text(encoding="utf-8"))
        except ValueError:
            plan = None
        return plan if isinstance(plan, dict) else {}

    def _make_plan(self) -> float:
        """Time the attacks and divide the budget among them. Return the seconds that this took."""
        if self.plan_path.is_file():
            saved = self._saved()
            for client, attack, share, reason in saved["plan"]:
                if share is None:
                    self.refused[client, attack] = reason
                else:
                    self.plan[client, attack] = Share(**share)
            return float(saved["seconds"])
        self.log("Timing a few iterations of each attack")
        began = time.monotonic()
        needs: list[tuple[Row, Candidate, float]] = []
        for row in self.rows:
            for candidate in row.candidates:
                try:
                    needs.append((row, candidate, self._seconds(row, candidate)))
                except (ValueError, RuntimeError, MemoryError) as error:
                    self.refused[row.client.name, candidate.name] = f"It can't run here: {error}"
        # What reading labels took counts as that attack's time.
        spent = time.monotonic() - began - sum(row.reading_seconds for row in self.rows)
        pairs = [(candidate, seconds) for _, candidate, seconds in needs]
        shares = share_out(max(self.budget - spent, 0.0), pairs, [row.number for row, _, _ in needs])
        for (row, candidate, _), share in zip(needs, shares, strict=True):
            self.plan[row.client.name, candidate.name] = share
        kept = [
            *([*place, dataclasses.asdict(share), ""] for place, share in self.plan.items()),
            *([*place, None, reason] for place, reason in self.refused.items()),
        ]
        write_text(self.plan_path, json.dumps({"key": self.key, "seconds": spent, "plan": kept}, indent=1) + "\n")
        return spent

    def _seconds(self, row: Row, candidate: Candidate) -> float:
        """Return the seconds of one evaluation for one victim."""
        if candidate.make is None:
            row.read_labels(1)
            first = row.reading_seconds
            read = row.read_labels(1 + _READ_AT_ONCE, _TRIAL_SHARE * self.budget)
            return (row.reading_seconds - first) / (read - 1) if read > 1 else first
        shared = row.share([0], reads=row.reads_labels)
        if (seconds := candidate.passes * row.seconds_of_a_pass) > _TRIAL_SHARE * self.budget:
            return seconds  # a good enough estimate
        return seconds_of_one((candidate.trial or candidate.make)(), shared, row.victim, accelerator=self.accelerator)

    # One attack.

    def _run_one(self, row: Row, candidate: Candidate, seconds: float, solved: set[str]) -> Record:
        client, name = row.client.name, candidate.name
        if reason := self.refused.get((client, name)):
            # Closed forms are for some networks only. Without a search, no limit is known to be kept.
            return Record(self.key, Planned(client, name, 0.0, False, reason), reached=name in _CLOSED_FORMS)
        share = self.plan[client, name]
        planned = Planned(client, name, share.expected_seconds, False, "")
        if client in solved:
            reason = "Not needed: an earlier attack reconstructed every image."
            return Record(self.key, replace(planned, reason=reason))
        if candidate.make is None:
            read = row.read_labels(row.number, seconds)
            truth = None if row.truth is None else row.truth(range(read))
            measured = measure_labels(row.client, truth, torch.stack(row.counts), row.reading_seconds)
            if read < row.number:
                reason = f"The budget ran out after {_victims(read)}."
                return Record(self.key, replace(planned, reason=reason), measured, reached=False)
            return Record(self.key, replace(planned, done=True), measured)
        evaluation = share.seconds_of_one / (share.steps or candidate.evaluations)
        if evaluation > seconds > 0:
            reason = f"One evaluation takes about {evaluation:.0f} s, which is more than the budget allows it."
            return Record(self.key, replace(planned, reason=reason), reached=False)
        if seconds <= 0:
            return Record(self.key, replace(planned, reason="The budget ran out before this attack."), reached=False)
        make = partial(candidate.make, steps=share.steps) if candidate.shortens else candidate.make
        outcome = fit_all(
            make,
            partial(row.share, reads=row.reads_labels),
            row.victim,
            row.number,
            accelerator=self.accelerator,
            seconds=seconds,
            expected=share.seconds_of_one,
            folder=self.folder / "runs" / slug(client) / name,
        )
        if not len(outcome.found):
            return Record(self.key, replace(planned, reason="The budget ran out before this attack."), reached=False)
        truth = None if row.truth is None else row.truth(outcome.found.ids.tolist())
        measured, rows = measure(
            name,
            row.client,
            row.subject,
            outcome,
            truth,
            success_threshold=self.success_threshold,
            folder=self.folder,
        )
        if not outcome.complete:
            number = round(measured.iterations)
            evaluations = "one evaluation" if number == 1 else f"{number} evaluations"
            reason = f"The budget ran out after {evaluations} of {_victims(measured.victims)}."
            return Record(self.key, replace(planned, reason=reason), measured, rows, reached=False)
        fewer = f"Its time was enough for {measured.victims} of {row.number} victims."
        planned = replace(planned, done=True, reason=fewer if measured.victims < row.number else "")
        return Record(self.key, planned, measured, rows)


def _victims(number: int) -> str:
    return "one victim" if number == 1 else f"{number} victims"


def _solves(measured: Measured, victims: int) -> bool:
    """Whether an attack reconstructed every image of every victim."""
    figure = measured.metrics.get("success_rate")
    return figure is not None and figure.value == 1 and figure.victims == victims


def _line(measured: Measured) -> str:
    """Summarise an attack in one line for the terminal."""
    words = []
    for name, figure in measured.metrics.items():
        if name == "psnr":
            words.append(f"psnr {figure.value:.1f} dB")
        elif name != "ssim":
            words.append(f"{name} {figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]")
    words.append(f"{_victims(measured.victims)} in {measured.seconds:.0f} s")
    return f"{measured.client}: {measured.attack}: {', '.join(words)}"
