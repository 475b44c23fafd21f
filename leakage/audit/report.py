"""The report of an audit: plain dataclasses that are saved as JSON and as files for people and machines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakage.audit.writers import junit_xml, model_card_section, render_page, sarif_log, words
from leakage.errors import check_choice, check_positive
from leakage.files.records import from_json, parse_json, to_json
from leakage.files.tensors import shorten
from leakage.files.text import write_text

#: The version of the layout of ``audit.json``. Files of other versions are refused.
VERSION = 1

#: The exit code of each verdict.
EXIT_CODES = {"within": 0, "no thresholds": 0, "exceeded": 1, "failed check": 2, "inconclusive": 3}

PROBLEM_KINDS = ("never", "not yet", "replace")
DECISIONS = ("within", "exceeded", "inconclusive")


@dataclass(frozen=True)
class Figure:
    """A score over victims with its 95 % confidence interval, from :class:`leakage.metrics.Estimate`.

    For a single victim, the ends of the interval are NaN; without victims, the value is NaN too.
    """

    value: float
    low: float
    high: float
    victims: int


@dataclass(frozen=True)
class Problem:
    """A problem that the preflight found before any attack ran.

    Attributes:
        kind: ``"never"`` (no attack is possible), ``"not yet"`` (none of this library's attacks is possible), or
            ``"replace"`` (attacks are possible after the fix).
        where: the layer or setting.
        problem: what the problem is.
        fix: what to do about it.
        means: what it means for the verdict.
    """

    kind: str
    where: str
    problem: str
    fix: str
    means: str

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, PROBLEM_KINDS)


@dataclass(frozen=True)
class Check:
    """A check that attacker and client compute the same, for a simulated client or a captured update.

    Attributes:
        client: the name of the client.
        name: the name of the check.
        passed: whether the check passed.
        residual: the relative error; ``None`` if nothing is measured.
        finding: the finding in words.
    """

    client: str
    name: str
    passed: bool
    residual: float | None
    finding: str


@dataclass(frozen=True)
class Planned:
    """An attack of the plan; ``reason`` says why it did not run, or not on all victims, and is ``""`` otherwise."""

    client: str
    attack: str
    expected_seconds: float
    done: bool
    reason: str


@dataclass(frozen=True)
class VictimRow:
    """One image of one victim, a line of ``victims.jsonl``.

    Attributes:
        client: the name of the client.
        attack: the name of the attack.
        victim: the index of the victim.
        image: the index among the victim's images.
        label: the true class; -1 if labels are not classes, or in a captured update.
        label_found: the class that the attack found; -1 if labels are not classes.
        psnr: the PSNR in dB.
        mse: the mean squared error for pixels in [0, 1].
        ssim: the structural similarity, from -1 to 1.
        success: whether the MSE is below the audit's threshold.
        identified: whether the reconstruction is nearer to its own image than to any other.
        baseline: the PSNR in dB of the best guess that looks at no gradient.
        truth: the path of a PNG of the true image, relative to the report; ``""`` if none was kept.
        reconstruction: the path of a PNG of the image that the attack found, in the same form.
        guess: the path of a PNG of the best guess that looks at no gradient, in the same form.
    """

    client: str
    attack: str
    victim: int
    image: int
    label: int
    label_found: int
    psnr: float
    mse: float
    ssim: float
    success: bool
    identified: bool
    baseline: float
    truth: str
    reconstruction: str
    guess: str


@dataclass(frozen=True)
class Measured:
    """What one attack found on the victims of one client.

    Attributes:
        client: the name of the client.
        attack: the name of the attack.
        adaptive: whether the attack knew and simulated the client's defenses.
        images: N, the number of images behind one update.
        victims: the number of victims that were attacked.
        iterations: the mean number of iterations over victims.
        seconds: the seconds of the whole run.
        metrics: ``"label_accuracy"``, ``"success_rate"``, ``"identified"``, ``"psnr"`` (dB) and ``"ssim"``, by name.
        baselines: the PSNR in dB of guesses that look at no gradient: ``"grey"``, ``"mean_colour"``, ``"nearest"``.
        worst: up to 8 images, starting with the one that leaked most.
    """

    client: str
    attack: str
    adaptive: bool
    images: int
    victims: int
    iterations: float
    seconds: float
    metrics: dict[str, Figure]
    baselines: dict[str, Figure]
    worst: list[VictimRow]


@dataclass(frozen=True)
class Declared:
    """The user's statements, which are kept apart from what was measured.

    Attributes:
        threat_model: a letter from A to H of Carletti et al., *SoK: Gradient Inversion Attacks in Federated Learning*,
            with its description.
        prior: what the attacker knows about the images beforehand.
        clients: one object per client, with ``name``, ``images``, ``local_steps``, ``learning_rate``, ``defenses``, ...
        asserted: further statements, in the user's words.
    """

    threat_model: str
    prior: str
    clients: list[dict[str, Any]]
    asserted: dict[str, str]


@dataclass(frozen=True)
class Threshold:
    """A limit that the user set, and the decision for a measured figure. The library sets no limits."""

    metric: str
    limit: float
    client: str
    attack: str
    figure: Figure
    decision: str

    def __post_init__(self) -> None:
        check_choice("decision", self.decision, DECISIONS)


@dataclass(frozen=True)
class Bound:
    """A value that no attacker can exceed against a declared mechanism, and the source of the theorem."""

    client: str
    mechanism: str
    metric: str
    value: float
    source: str


@dataclass
class AuditReport:
    """The result of an audit: what was measured, what was declared, and the verdict on the user's thresholds.

    Attributes:
        version: :data:`VERSION`.
        leakage: the version of the library.
        created: the time in ISO 8601, UTC.
        seed: the seed of all random draws.
        model: the name of the audited module.
        data: the source of the victims' images.
        success_threshold: an image counts as reconstructed if its MSE is below this.
        budget_seconds: the time that the attacks could take, in seconds.
        command: the command that repeats the audit.
        declared: the user's statements.
        preflight: the problems found before any attack ran.
        checks: the checks that attacker and client compute the same.
        plan: all attacks that were considered.
        measured: the figures of the attacks.
        bounds: the bounds for declared mechanisms.
        thresholds: the user's limits, each with its decision.

    Example:
        >>> exceeded = Threshold("success_rate", 0.05, "one image", "iDLG", Figure(0.9, 0.8, 1.0, 40), "exceeded")
        >>> report = AuditReport(
        ...     version=VERSION, leakage="0.1", created="2026-01-01T00:00:00+00:00", seed=0, model="LeNet",
        ...     data="sample", success_threshold=1e-3, budget_seconds=60.0, command="leakage audit --example",
        ...     declared=Declared("A", "none", [], {}), preflight=[], checks=[], plan=[], measured=[], bounds=[],
        ...     thresholds=[exceeded],
        ... )
        >>> report.verdict, report.exit_code
        ('exceeded', 1)
    """

    version: int
    leakage: str
    created: str
    seed: int
    model: str
    data: str
    success_threshold: float
    budget_seconds: float
    command: str
    declared: Declared
    preflight: list[Problem]
    checks: list[Check]
    plan: list[Planned]
    measured: list[Measured]
    bounds: list[Bound]
    thresholds: list[Threshold]

    def __post_init__(self) -> None:
        check_positive(success_threshold=self.success_threshold)

    @property
    def verdict(self) -> str:
        """The worst outcome of all checks and thresholds, a key of :data:`EXIT_CODES`."""
        if not all(check.passed for check in self.checks):
            return "failed check"
        decisions = {threshold.decision for threshold in self.thresholds}
        return next((one for one in ("exceeded", "inconclusive", "within") if one in decisions), "no thresholds")

    @property
    def exit_code(self) -> int:
        """The exit code of ``leakage audit``: 0 within, 1 exceeded, 2 failed check, 3 inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def summary(self) -> str:
        """The result of the audit in a sentence or two."""
        return words.summary(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``audit.json``, ``report.html``, ``junit.xml``, ``audit.sarif`` and ``model_card.md`` to a folder.

        The folder is created. The page shows the victims of its ``victims.jsonl`` and the pictures in its ``images/``.
        All files are complete before the first is written.

        Raises:
            OSError: a file can't be written.
            ValueError: ``victims.jsonl`` can't be read, or the path of a picture leads out of the folder.
        """
        folder = Path(folder)
        derived = {"verdict": self.verdict, "exit_code": self.exit_code, "summary": self.summary}
        files = {
            "audit.json": _json(to_json(self) | derived),
            "report.html": render_page(self, read_victims(folder), folder),
            "junit.xml": junit_xml(self),
            "audit.sarif": _json(sarif_log(self)),
            "model_card.md": model_card_section(self),
        }
        for name, text in files.items():
            write_text(folder / name, text)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AuditReport:
        """Read ``audit.json`` from a folder.

        Raises:
            FileNotFoundError: the folder has no such file.
            ValueError: the file is not JSON, has another version, or has other fields or types.
        """
        path = Path(folder, "audit.json")
        if not path.is_file():
            raise FileNotFoundError(f"Expected an audit at '{path}', but got no such file.")
        try:
            content = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"Expected '{path}' as whole JSON, but got: {shorten(error)}.") from None
        version = content.get("version") if isinstance(content, dict) else None
        if isinstance(content, dict) and (version != VERSION or isinstance(version, bool)):
            raise ValueError(
                f"Expected version {VERSION} of `audit.json` in '{path}', but got {shorten(repr(version))}."
            )
        derived = {}
        if isinstance(content, dict):
            derived = {name: content.pop(name, None) for name in ("verdict", "exit_code", "summary")}
        try:
            report = from_json(cls, content)
        except ValueError as error:
            raise ValueError(f"{error} The file is '{path}'.") from None
        for name in ("verdict", "exit_code"):
            if derived[name] != getattr(report, name):
                raise ValueError(
                    f"Expected `{name}` {getattr(report, name)!r} in '{path}', which follows from its checks and "
                    f"thresholds, but got {shorten(repr(derived[name]))}."
                )
        return report


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_victims(folder: str | os.PathLike[str], rows: Iterable[VictimRow]) -> None:
    """Write ``victims.jsonl``, with one image per line.

    Raises:
        OSError: the file can't be written.
    """
    lines = (json.dumps(to_json(row), allow_nan=False) + "\n" for row in rows)
    write_text(Path(folder, "victims.jsonl"), "".join(lines))


def read_victims(folder: str | os.PathLike[str]) -> list[VictimRow]:
    """Read ``victims.jsonl`` from a folder; return an empty list if there is no such file.

    Raises:
        ValueError: a line is not JSON, or has other fields or types. The message has its number.
    """
    path = Path(folder, "victims.jsonl")
    rows = []
    for number, line in enumerate(path.read_bytes().rstrip().splitlines() if path.is_file() else [], 1):
        try:
            rows.append(from_json(VictimRow, parse_json(line)))
        except ValueError as error:
            raise ValueError(f"Expected a victim in line {number} of '{path}', but got: {shorten(error)}") from None
    return rows
