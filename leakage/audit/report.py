"""What an audit found, as plain dataclasses: JSON out and in, and the files that people and machines read."""

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

#: Of the layout of ``audit.json``; files of other versions are refused.
VERSION = 1

#: What each verdict tells the shell.
EXIT_CODES = {"within": 0, "no thresholds": 0, "exceeded": 1, "failed check": 2, "inconclusive": 3}

PROBLEM_KINDS = ("never", "not yet", "replace")
DECISIONS = ("within", "exceeded", "inconclusive")


@dataclass(frozen=True)
class Figure:
    """A score over victims with its 95 % confidence interval, from :class:`leakage.metrics.Estimate`.

    NaN where there is none: the ends for a single victim, all three for none.
    """

    value: float
    low: float
    high: float
    victims: int


@dataclass(frozen=True)
class Problem:
    """What preflight found before anything ran.

    Attributes:
        kind: ``"never"`` (no attack can), ``"not yet"`` (none of ours can), ``"replace"`` (one can after the fix).
        where: the layer or the setting.
        problem: what it is.
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
    """A self-check of one client, or of a captured update: whether attacker and client compute the same.

    Attributes:
        client: its name.
        name: what was checked.
        passed: whether it held.
        residual: how far off, relative; ``None`` where nothing is measured.
        finding: in words.
    """

    client: str
    name: str
    passed: bool
    residual: float | None
    finding: str


@dataclass(frozen=True)
class Planned:
    """An attack of the plan; ``reason`` says why it was not run, ``""`` if it was."""

    client: str
    attack: str
    expected_seconds: float
    done: bool
    reason: str


@dataclass(frozen=True)
class VictimRow:
    """One image of one victim, a line of ``victims.jsonl``.

    Attributes:
        client: its name.
        attack: the attack's name.
        victim: the victim's index.
        image: the index among the victim's images.
        label: the true class.
        label_found: the class that the attack named.
        psnr: dB.
        mse: mean squared error for pixels in [0, 1].
        ssim: from -1 to 1.
        success: whether the MSE is below the audit's threshold.
        identified: whether the reconstruction is nearer to its own image than to any other.
        baseline: PSNR of the best guess that looks at no gradient, dB.
        truth: path of a PNG beside the report, relative, ``""`` where none was kept.
        reconstruction: the same for what the attack found.
        guess: the same for the best guess that looks at no gradient.
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
        client: its name.
        attack: the attack's name.
        adaptive: whether it knew of the client's defenses and allowed for them.
        images: N, the images behind one update.
        victims: how many were attacked.
        iterations: mean over victims.
        seconds: of the whole run.
        metrics: ``"label_accuracy"``, ``"success_rate"``, ``"identified"``, ``"psnr"`` (dB), ``"ssim"``.
        baselines: PSNR of guesses that look at no gradient (dB): ``"grey"``, ``"mean_colour"``, ``"nearest"``.
        worst: up to 8 images, the most leaked first.
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
    """What the user asserts; never mixed with what was measured.

    Attributes:
        threat_model: letter A to H of Carletti et al., *SoK: Gradient Inversion Attacks in Federated Learning*, with
            its words.
        prior: what the attacker knows of the images beforehand.
        clients: one object each, with ``name``, ``images``, ``local_steps``, ``learning_rate``, ``defenses``, ...
        asserted: anything else, in the user's words.
    """

    threat_model: str
    prior: str
    clients: list[dict[str, Any]]
    asserted: dict[str, str]


@dataclass(frozen=True)
class Threshold:
    """A limit of the user's own, and how a measured figure stands to it; there are no limits of ours."""

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
    """What no attacker can exceed against a declared mechanism, and the source of the theorem."""

    client: str
    mechanism: str
    metric: str
    value: float
    source: str


@dataclass
class AuditReport:
    """An audit: what was measured, what was declared, and the verdict against the user's own thresholds.

    Attributes:
        version: :data:`VERSION`.
        leakage: version of the library.
        created: ISO 8601, UTC.
        seed: everything random comes from it.
        model: the audited module.
        data: where the victims' images are from.
        success_threshold: an image is reconstructed if its MSE is below it.
        budget_seconds: what the attacks were given.
        command: runs the audit again.
        declared: what the user asserts.
        preflight: what was found before anything ran.
        checks: whether attacker and client compute the same.
        plan: every attack that was considered.
        measured: what the attacks found.
        bounds: what no attacker can exceed, for declared mechanisms.
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
        """A key of :data:`EXIT_CODES`; the worst of all checks and thresholds."""
        if not all(check.passed for check in self.checks):
            return "failed check"
        decisions = {threshold.decision for threshold in self.thresholds}
        return next((one for one in ("exceeded", "inconclusive", "within") if one in decisions), "no thresholds")

    @property
    def exit_code(self) -> int:
        """What ``leakage audit`` ends with: 0 within, 1 exceeded, 2 failed check, 3 inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def summary(self) -> str:
        """What the audit found, in a sentence or two."""
        return words.summary(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``audit.json``, ``report.html``, ``junit.xml``, ``audit.sarif`` and ``model_card.md`` to a folder.

        The folder is made. The page takes victims from its ``victims.jsonl`` and pictures from its ``images/``. All of
        them are ready before the first is written.

        Raises:
            OSError: one can't be written.
            ValueError: ``victims.jsonl`` can't be read, or a picture's path leads out of the folder.
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
        """Read ``audit.json`` of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no JSON, of another version, or has other fields or types.
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
                    f"Expected `{name}` {getattr(report, name)!r} in '{path}', as its checks and thresholds have it, "
                    f"but got {shorten(repr(derived[name]))}."
                )
        return report


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_victims(folder: str | os.PathLike[str], rows: Iterable[VictimRow]) -> None:
    """Write ``victims.jsonl``, one image a line.

    Raises:
        OSError: it can't be written.
    """
    lines = (json.dumps(to_json(row), allow_nan=False) + "\n" for row in rows)
    write_text(Path(folder, "victims.jsonl"), "".join(lines))


def read_victims(folder: str | os.PathLike[str]) -> list[VictimRow]:
    """Read ``victims.jsonl`` of a folder; none if there is no such file.

    Raises:
        ValueError: a line that is no JSON or has other fields or types; with its number.
    """
    path = Path(folder, "victims.jsonl")
    rows = []
    for number, line in enumerate(path.read_bytes().rstrip().splitlines() if path.is_file() else [], 1):
        try:
            rows.append(from_json(VictimRow, parse_json(line)))
        except ValueError as error:
            raise ValueError(f"Expected a victim in line {number} of '{path}', but got: {shorten(error)}") from None
    return rows
