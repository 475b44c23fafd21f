"""The audit: attack simulated clients and judge what their updates give away."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import leakage
from leakage.audit.client import Client, check_clients
from leakage.audit.consistency import check_update
from leakage.audit.data import Data, fit, quiet_lightning, seeded
from leakage.audit.measuring import fewest_others
from leakage.audit.plan import ATTACKS, candidates
from leakage.audit.preflight import NO_VERDICT, preflight
from leakage.audit.report import VERSION, AuditReport, Bound, Check, Declared, Figure, Planned, Problem, write_victims
from leakage.audit.run import Record
from leakage.audit.runner import Row, Runner
from leakage.audit.self_check import self_check, with_module_rate
from leakage.audit.subject import Subject
from leakage.audit.threat_models import THREAT_MODELS, problems_of
from leakage.audit.verdict import SHARES, bounds, check_thresholds, thresholds, victims_needed
from leakage.datamodules import Victims
from leakage.datamodules.base import GroundTruth
from leakage.errors import check_choice, check_count, check_positive
from leakage.files.whole import check_output
from leakage.labels import LabelReader
from leakage.metrics import SUCCESS_THRESHOLD, ShareOverVictims, baseline_guesses, score
from leakage.pieces import digest
from leakage.updates import read_update
from leakage.updates.weights import AnyWeights, open_weights

# The number of images that the auditor keeps.
_PUBLIC = 1000
# Networks with at most this many weights read labels with all images of the auditor; larger ones, with a few.
_SMALL, _FEW = 1_000_000, 200
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def audit(
    module: LightningModule,
    data: Data | None = None,
    client: Client | Sequence[Client] = Client(),  # noqa: B008 (frozen)
    *,
    budget: str | float = "10m",
    fail_above: Mapping[str, float] | None = None,
    victims: int = 100,
    attacks: Sequence[str] | None = None,
    threat_model: str = "D",
    update: AnyWeights | None = None,
    before: AnyWeights | None = None,
    asserted: Mapping[str, str] | None = None,
    success_threshold: float = SUCCESS_THRESHOLD,
    seed: int = 0,
    accelerator: str = "cpu",
    output: str | os.PathLike[str] = "audit",
    command: str = "",
    log: Callable[[str], object] | None = None,
) -> AuditReport:
    """Attack clients that train as the module does on the given data, and report what their updates give away.

    The audit first looks for everything that could hinder an attack. It then simulates a client on the auditor's own
    images and checks that it does what the module's ``training_step`` does. Then it plans the attacks and runs them on
    victims that hold images of the data, starting with the attacks that need no search. If a problem leaves nothing to
    attack, or a self-check fails, the audit ends and reports that. This never counts as "nothing leaked".

    To resume an audit that was killed, repeat the call. Each figure says what *these* attacks found within *this*
    budget. It is a lower limit of what an attacker can find.

    Args:
        module: the module to audit. It is copied and never changed. Clients start from its weights and modes.
        data: a LightningDataModule, DataLoader or Dataset of images and labels, if any. By default, the module's own
            ``train_dataloader``.
        client: a client or a list of clients.
        budget: the time for all attacks, in seconds or as ``"90s"``, ``"10m"`` or ``"2h"``.
        fail_above: limits for ``label_accuracy``, ``success_rate``, ``identified`` (shares), ``psnr`` (dB) or ``ssim``.
        victims: the largest number of victims for each client.
        attacks: names from :data:`leakage.audit.ATTACKS`, to run only these attacks.
        threat_model: a letter of :data:`leakage.audit.THREAT_MODELS`. From D on, attackers have similar images.
        update: what a client of a real system sent, in any form that :func:`leakage.updates.read_update` takes. It is
            audited in place of simulated clients and must be consistent with what is declared. Its images are unknown,
            so the report shows the labels and images that attacks find, but no scores.
        before: the weights that this client received. By default, those of ``module``.
        asserted: further statements about the clients, as a text for each topic.
        success_threshold: an image counts as reconstructed if its MSE is below this.
        seed: the seed of all random draws.
        accelerator: the accelerator for the attacks, as in Lightning's Trainer.
        output: the folder for the report, its pictures and the files needed to resume.
        command: the command that repeats the audit, for the report.
        log: a function that is called with each line of progress.

    Returns:
        The report, which is also written to ``output``.

    Raises:
        ValueError: an argument is out of range, ``module`` is not a LightningModule, the data can't be used, or
            ``output`` holds another audit. In these cases nothing is written.
        OSError: the folder can't be written.

    Example:
        >>> from leakage.audit.example import ExampleData, ExampleModule
        >>> report = audit(ExampleModule(), ExampleData(), Client(images=1), victims=4, budget="20s",
        ...                fail_above={"success_rate": 0.05}, output=folder)  # doctest: +SKIP
        >>> report.verdict  # doctest: +SKIP
        'exceeded'
    """
    made = _Audit(
        clients=check_clients(client),
        budget=seconds_of(budget),
        limits=check_thresholds(fail_above),
        victims=victims,
        attacks=attacks,
        threat_model=threat_model,
        success_threshold=success_threshold,
        seed=seed,
        accelerator=accelerator,
        folder=Path(output),
        log=log or (lambda line: None),
        update=update,
        before=module if before is None else before,
    )
    with quiet_lightning():
        return made.run(module, data, asserted=dict(asserted or {}), command=command)


def seconds_of(budget: str | float) -> float:
    """Convert a budget to seconds.

    Raises:
        ValueError: the budget is not positive, or has another form.

    Example:
        >>> seconds_of("10m"), seconds_of("1.5h"), seconds_of(90)
        (600.0, 5400.0, 90.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smh]?)\s*", budget) if isinstance(budget, str) else None
    seconds = float(match[1]) * _UNITS[match[2] or "s"] if match else budget
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ValueError(f"Expected `budget` as seconds above 0, or as '90s', '10m' or '2h', but got {budget!r}.")
    return float(seconds)


@dataclass
class _Audit:
    clients: tuple[Client, ...]
    budget: float
    limits: dict[str, float]
    victims: int
    attacks: Sequence[str] | None
    threat_model: str
    success_threshold: float
    seed: int
    accelerator: str
    folder: Path
    log: Callable[[str], object]
    update: AnyWeights | None = None
    before: AnyWeights | None = None

    def __post_init__(self) -> None:
        check_count(victims=self.victims)
        check_count(0, seed=self.seed)
        check_positive(success_threshold=self.success_threshold)
        check_choice("threat_model", self.threat_model, THREAT_MODELS)
        for name in self.attacks or ():
            check_choice("attacks", name, ATTACKS)
        if self.update is not None and len(self.clients) > 1:
            raise ValueError(f"Expected one client with `update`, but got {len(self.clients)}.")
        if self.attacks is not None and not self.attacks:
            raise ValueError("Expected `attacks` to name at least one attack, but got none.")

    def run(self, module: LightningModule, data: Data | None, *, asserted: dict[str, str], command: str) -> AuditReport:
        """Run the whole audit, write its files and return the report."""
        report = AuditReport(
            version=VERSION,
            leakage=leakage.__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seed=self.seed,
            model=f"{type(module).__module__}.{type(module).__qualname__}",
            data=_name_of(data),
            success_threshold=self.success_threshold,
            budget_seconds=self.budget,
            command=command,
            declared=Declared(f"{self.threat_model}: {THREAT_MODELS[self.threat_model]}", "", [], asserted),
            preflight=problems_of(self.threat_model),
            checks=[],
            plan=[],
            measured=[],
            bounds=[],
            thresholds=[],
        )
        try:
            Trainer(accelerator=self.accelerator, devices=1, logger=False, enable_checkpointing=False)
        except Exception as error:  # the type depends on the accelerator
            raise ValueError(
                f"Expected `accelerator` as the Trainer has it on this machine, but got {self.accelerator!r}: {error}"
            ) from error
        self.log("Preflight")
        rows = self._make_ready(module, data, report)
        for problem in report.preflight:
            self.log(f"  {problem.kind}: {problem.where}: {problem.problem}")
        if self.update is not None:
            report.checks += [check for row in rows for check in self._take_update(row)]
        runner = Runner(
            rows=rows,
            budget=self.budget,
            folder=self.folder,
            key=self._key(rows),
            accelerator=self.accelerator,
            success_threshold=self.success_threshold,
            log=self.log,
        )
        runner.check_folder()
        check_output(self.folder)
        self.log("Self-check")
        for row in rows:
            report.checks += self_check(row.subject, row.client, row.victim, self.seed)
        for check in report.checks:
            self.log(f"  {check.client}: {check.name}: {'' if check.passed else 'FAILED: '}{check.finding}")
        passed = all(check.passed for check in report.checks)
        records: list[Record] = runner.run() if passed else []
        report.plan = [record.planned for record in records] or _not_run(rows)
        report.measured = [record.measured for record in records if record.measured is not None]
        unreached = {record.planned.client for record in records if not record.reached}
        if passed:
            report.thresholds = thresholds(self.limits, self.clients, report.measured, unreached)
        report.bounds = [bound for row in rows for bound in self._bounds(row)]
        write_victims(self.folder, [victim for record in records for victim in record.rows])
        report.save(self.folder)
        return report

    # Before the attacks.

    def _make_ready(self, module: LightningModule, data: Data | None, report: AuditReport) -> list[Row]:
        """Return a row for each client; add a failed check to the report for a client that can't be attacked."""
        rows: list[Row] = []
        subjects: dict[int, Subject | None] = {}
        for client in self.clients:
            if client.epochs not in subjects:
                start = module
                if client.epochs and isinstance(module, LightningModule):
                    self.log(f"  training a copy for {client.epochs} epochs")
                    start = copy.deepcopy(module)
                    with seeded(self.seed):
                        fit(start, data, max_epochs=client.epochs, accelerator=self.accelerator)
                counts: dict[str, Any] = {"victims": self.victims, "public": _PUBLIC, "seed": self.seed}
                subject, problems = preflight(start, data, self.clients, **counts)
                report.preflight += [problem for problem in problems if problem not in report.preflight]
                subjects[client.epochs] = subject
                report.declared = replace(report.declared, prior=self._prior(subject))
            found = subjects[client.epochs]
            if found is None:
                finding = "; ".join(one.problem for one in report.preflight if one.means == NO_VERDICT)
                report.checks.append(Check(client.name, "preflight", False, None, finding))
                report.declared.clients.append(client.describe())
                continue
            if client.dropout:
                found = found.with_dropout()
            completed, problems = with_module_rate(client, found)
            report.preflight += [problem for problem in problems if problem not in report.preflight]
            report.declared.clients.append(completed.describe())
            if (row := self._row(completed, found, report)) is not None:
                rows.append(row)
        return rows

    def _row(self, client: Client, subject: Subject, report: AuditReport) -> Row | None:
        number = min(self.victims, len(subject.images) // client.images)
        if number < self.victims:
            self.log(f"  {client.name}: only {number} victims, as the data have no more images")
        self._check_victims(client, number, report)
        # A captured update comes without labels.
        revealed = subject.uses == "nothing" or (client.reveal_labels and self.update is None)
        if not revealed and subject.uses == "numbers":
            said = "labels that attacks can't search for: numbers, or classes by which the loss can't be differentiated"
            fix = "Declare the client with reveal_labels=True. The labels then count as known to the attacker."
            if self.update is not None:
                fix = "Audit simulated clients instead, as a captured update comes without its labels."
            report.preflight.append(Problem("not yet", client.name, said, fix, NO_VERDICT))
            report.checks.append(Check(client.name, "preflight", False, None, f"{said}. {fix}"))
            return None
        try:
            victims = Victims(
                TensorDataset(subject.images, subject.labels),
                num_classes=max(2, subject.num_classes) if subject.loss["label_kind"] == "classes" else None,
                victims=number,
                images=client.images,
                seed=self.seed,
                model=subject.network,
                weights="shared",
                reveal_labels=revealed,
                **subject.loss,
                **client.training,
            )
            victims.setup("fit")
        except ValueError as error:  # no such client can exist
            report.preflight.append(
                Problem(
                    *("not yet" if client.dropout or subject.has_own_loss else "never", client.name, str(error)),
                    "Declare a client that can train like this.",
                    NO_VERDICT,
                )
            )
            report.checks.append(Check(client.name, "preflight", False, None, str(error)))
            return None
        surrogate = self.threat_model >= "D"
        made = candidates(
            subject,
            replace(client, reveal_labels=revealed),
            victims.victim,
            seed=self.seed,
            success_threshold=self.success_threshold,
            surrogate=surrogate,
            chosen=self.attacks,
        )
        # Large networks take long on many images.
        small = sum(parameter.numel() for parameter in subject.network.parameters()) <= _SMALL
        own = subject.auxiliary(None if small else _FEW) if surrogate else None
        return Row(
            client=client,
            subject=subject,
            victim=victims.victim,
            number=number,
            configuration=victims.configuration | {"gradient": subject.size_of_gradient()},
            capture=victims.share,
            truth=partial(_truth, victims),
            candidates=made,
            reader=LabelReader(auxiliary=own, seed=self.seed),
        )

    def _check_victims(self, client: Client, number: int, report: AuditReport) -> None:
        """Add a problem to the report if there are too few victims for any figure to be within a limit."""
        limits = [limit for name, limit in self.limits.items() if name in SHARES]
        needed = max(map(victims_needed, limits), default=0)
        if needed > number and self.update is None:
            fix = f"Audit at least {needed} victims. If nothing is found, the interval then ends at the limit."
            report.preflight.append(
                Problem(
                    *("replace", f"victims of {client.name}", f"{number} victims can't show that a limit is kept"),
                    fix if needed < math.inf else "Set limits above 0, as no interval ends at 0.",
                    "The limit can be exceeded or inconclusive, but not kept.",
                )
            )

    def _take_update(self, row: Row) -> list[Check]:
        """Check a captured update. If all checks pass, it replaces the simulated clients of the row."""
        client, victim = row.client, row.victim
        holds, rate = open_weights(self.update, "update").holds, client.learning_rate
        before = row.subject.renamed(self.before, "before")
        update = row.subject.renamed(self.update, "update")
        checks = check_update(before, update, victim, holds=holds, learning_rate=rate, client=client.name)
        if all(check.passed for check in checks):
            shared = read_update(before, update, victim, holds=holds, learning_rate=rate)
            if row.subject.uses == "nothing":
                shared = replace(shared, labels=victim.protocol.blank_labels(1))
            row.configuration |= {"update": digest(shared.gradients), "before": digest(shared.state)}
            row.capture, row.truth, row.number = (lambda places: shared), None, 1
        return checks

    def _prior(self, subject: Subject | None) -> str:
        if subject is None or self.threat_model < "D":
            return "none"
        return f"{len(subject.own_images)} images of the same data, none of which a victim holds"

    def _key(self, rows: list[Row]) -> str:
        """Return a digest that identifies the audit. Limits are not part of it, as they may change."""
        parts = [
            *(self.seed, self.success_threshold, self.threat_model, self.budget, self.attacks),
            *(json.dumps(row.client.describe(), sort_keys=True) for row in rows),
            *(json.dumps(row.configuration, sort_keys=True, default=str) for row in rows),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _bounds(self, row: Row) -> list[Bound]:
        guessed = None  # the success rate of guessing the nearest of the auditor's images
        if row.truth is not None and row.client.defenses:
            truth = row.truth(range(row.number))
            nearest = baseline_guesses(truth.images, row.subject.own_images)["nearest"]
            scores = score(nearest, truth.labels, truth.images, truth.labels)
            guessed = Figure(*ShareOverVictims()((scores.mse < self.success_threshold).double().mean(1)))
        return bounds(row.client, fewest_others(row.subject), guessed)


def _not_run(rows: Sequence[Row]) -> list[Planned]:
    """Return the attacks that would have been planned if all checks had passed."""
    names = [(row.client.name, candidate.name) for row in rows for candidate in row.candidates]
    return [Planned(*place, math.nan, False, "A check failed, so nothing was attacked.") for place in names]


def _truth(victims: Victims, places: Sequence[int]) -> GroundTruth:
    victims.audited = list(places)
    try:
        return GroundTruth.cat(list(victims.val_dataloader()))
    finally:
        victims.audited = None


def _name_of(data: Data | None) -> str:
    if data is None:
        return "the module's own train_dataloader"
    kind = type(data.dataset) if isinstance(data, DataLoader) else type(data)
    return f"{kind.__module__}.{kind.__qualname__}"
