"""``junit.xml``: the audit as test cases for CI servers."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from leakage.audit.writers import words

if TYPE_CHECKING:
    from leakage.audit.report import AuditReport


def junit_xml(report: AuditReport) -> str:
    """Write self-checks, thresholds and attacks that did not run to the end as three suites of test cases.

    ============================ ===========================================================================
    a failed self-check          ``failure``
    an exceeded threshold        ``failure``
    an inconclusive threshold    ``error``: the test could not be carried out. With ``skipped``, a build that reads
                                 only this file would pass after an audit that decided nothing and has exit
                                 code 3
    an attack that did not run   ``skipped``. If it leaves a threshold open, that threshold is an ``error``
    ============================ ===========================================================================
    """
    root = ET.Element("testsuites")
    names = ("self-checks", "thresholds", "attacks that did not run to the end")
    checks, thresholds, plan = (ET.SubElement(root, "testsuite", {"name": name, "time": "0"}) for name in names)
    for check in report.checks:
        case = _case(checks, check.client, check.name)
        if not check.passed:
            _outcome(case, "failure", "failed check", check.finding)
    for threshold in report.thresholds:
        limit = words.number(threshold.limit, words.unit(threshold.metric))
        name = f"{threshold.metric} of {threshold.attack or 'any attack'} is at most {limit}"
        case = _case(thresholds, threshold.client, name)
        if threshold.decision != "within":
            outcome = "failure" if threshold.decision == "exceeded" else "error"
            _outcome(case, outcome, threshold.decision, words.over(threshold))
    for planned in report.plan:
        if not planned.done:
            _outcome(_case(plan, planned.client, planned.attack), "skipped", "", planned.reason)
    for suite in root:
        suite.attrib |= {"timestamp": words.plain(report.created), **_counts(suite)}
    root.attrib |= {"name": words.plain(f"leakage audit of {report.model}"), **_counts(root)}
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, client: str, name: str) -> ET.Element:
    # CI servers read dots in a class name as packages.
    attributes = {"classname": f"leakage.audit.{client.replace('.', '_')}", "name": name, "time": "0"}
    return ET.SubElement(suite, "testcase", {key: words.plain(value) for key, value in attributes.items()})


def _outcome(case: ET.Element, outcome: str, kind: str, message: str) -> None:
    attributes = {"message": words.plain(message)} | ({"type": kind} if kind else {})
    ET.SubElement(case, outcome, attributes).text = words.plain(message)


def _counts(element: ET.Element) -> dict[str, str]:
    """Count the test cases, and how many end in each way."""
    endings = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    found = {name: sum(1 for _ in element.iter(tag)) for name, tag in endings.items()}
    return {name: str(many) for name, many in {"tests": sum(1 for _ in element.iter("testcase")), **found}.items()}
