"""``audit.sarif``: the audit in SARIF 2.1.0, for code-scanning dashboards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from leakage.audit.writers import words

if TYPE_CHECKING:
    from leakage.audit.report import AuditReport

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_RULES = {
    "threshold-exceeded": (
        "ThresholdExceeded",
        "error",
        "An attack found more than a threshold allows.",
        "The whole 95 % interval of a measured score lies above a threshold that the user set.",
        "Look at the worst victims in report.html. Larger batches, more local steps and DP-SGD make attacks harder.",
    ),
    "threshold-inconclusive": (
        "ThresholdInconclusive",
        "warning",
        "A threshold could not be shown to hold.",
        "The 95 % interval of a measured score reaches across a threshold, or the budget ended before all attacks ran.",
        "Raise the number of victims to narrow the interval, or the budget to reach every attack.",
    ),
    "self-check-failed": (
        "SelfCheckFailed",
        "error",
        "Attacker and client do not compute the same.",
        "At known images, the attack's objective is not zero, so finding nothing would prove nothing.",
        "Compare what was declared (learning rate, local steps, reduction of the loss) with what the client does.",
    ),
    "preflight-problem": (
        "PreflightProblem",
        "note",
        "Something about the model or its training limits what the audit can say.",
        "The preflight found something that attacks cannot handle, before any attack ran.",
        "The message says how to fix it, and what it means for the verdict.",
    ),
}
_IDS = list(_RULES)


def sarif_log(report: AuditReport) -> dict[str, Any]:
    """Write the log: one run with a rule for each kind of finding and a result for each finding.

    A threshold that is kept is not a finding, as dashboards would show it as an alert. An inconclusive threshold is a
    warning, as it was not shown to hold.

    A finding is about a client, an attack or a layer, so its location is a logical one. ``audit.json`` is added as its
    physical location, since code scanning on GitHub refuses results without one.
    """
    results = [_result(*finding) for finding in _findings(report)]
    rules = [
        {
            "id": identifier,
            "name": name,
            "shortDescription": {"text": short},
            "fullDescription": {"text": full},
            "help": {"text": text},
            "defaultConfiguration": {"level": level},
            "properties": {"tags": ["security", "privacy"]},
        }
        for identifier, (name, level, short, full, text) in _RULES.items()
    ]
    run = {
        "tool": {"driver": {"name": "leakage", "version": words.plain(report.leakage), "rules": rules}},
        "automationDetails": {"id": "leakage-audit/"},
        "invocations": [
            {
                "commandLine": words.plain(report.command),
                "exitCode": report.exit_code,
                "executionSuccessful": report.verdict != "failed check",
            }
        ],
        "columnKind": "unicodeCodePoints",
        "results": results,
        "properties": {"verdict": report.verdict, "summary": words.plain(report.summary)},
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _findings(report: AuditReport) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield each finding: its rule, its message, and the path to its subject as names with their kinds."""
    for check in report.checks:
        if not check.passed:
            text = f"Self-check “{check.name}” failed for client “{check.client}”. {check.finding}"
            yield "self-check-failed", text, [(check.client, "client"), (check.name, "self-check")]
    for one in report.thresholds:
        if one.decision != "within":
            where = [(one.client, "client"), (one.attack or "any attack", "attack"), (one.metric, "score")]
            yield f"threshold-{one.decision}", words.over(one), where
    for problem in report.preflight:
        text = f"{problem.where}: {problem.problem} What to do: {problem.fix} For the verdict: {problem.means}"
        yield "preflight-problem", text, [(report.model, "model"), (problem.where, "layer or setting")]


def _result(rule: str, text: str, where: list[tuple[str, str]]) -> dict[str, Any]:
    names = [(words.plain(name), kind) for name, kind in where]
    path = "/".join(name.replace("/", "~1") for name, _ in names)
    name, kind = names[-1]
    return {
        "ruleId": rule,
        "ruleIndex": _IDS.index(rule),
        "level": _RULES[rule][1],
        "message": {"text": words.plain(text)},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": "audit.json"}, "region": {"startLine": 1}},
                "logicalLocations": [{"name": name, "fullyQualifiedName": path, "kind": kind}],
            }
        ],
        # All results have the same line of the same file. The fingerprint tells them apart from audit to audit.
        "partialFingerprints": {
            "primaryLocationLineHash": hashlib.sha256(f"{rule}/{path}".encode()).hexdigest()[:16] + ":1"
        },
    }
