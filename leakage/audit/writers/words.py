"""The wording of an audit: names of scores, numbers, verdicts and the summary."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from leakage.metrics.scores import PSNR_LIMIT

if TYPE_CHECKING:
    from leakage.audit.report import AuditReport, Figure, Measured, Threshold

#: Scores: the label, the unit, and the words before and after the figure in a sentence about an attack.
METRICS = {
    "success_rate": ("Reconstructed", "share", "reconstructed", "of the images of"),
    "identified": ("Identified", "share", "identified", "of the images of"),
    "label_accuracy": ("Labels read", "share", "read", "of the labels of"),
    "psnr": ("PSNR", "dB", "reached a mean PSNR of", "on"),
    "ssim": ("SSIM", "number", "reached a mean SSIM of", "on"),
}

#: Verdicts: the heading, and the limits of the verdict.
VERDICTS = {
    "exceeded": (
        "Threshold exceeded",
        "An attack shows the least that can be found: other attacks, or more time, may find more.",
    ),
    "within": (
        "Within your thresholds",
        "This holds for these attacks at this budget. It is no guarantee: other attacks, or more time, may find more.",
    ),
    "inconclusive": (
        "Inconclusive",
        "Raise the number of victims to narrow the intervals, or the budget to reach every attack, and run it again.",
    ),
    "failed check": (
        "Self-check failed",
        "Attacker and client do not compute the same, so whatever attacks find, or do not find, says nothing.",
    ),
    "no thresholds": (
        "Measured, not judged",
        "An attack shows the least that can be found. Set your own limits to get a verdict.",
    ),
}

BASELINES = {
    "grey": "a grey image",
    "mean_colour": "the image's mean colour",
    "mean_image": "the mean public image",
    "nearest": "the nearest public image",
}

# Without `strftime`, whose language depends on the machine.
_MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
_MONTHS += ["August", "September", "October", "November", "December"]
_MINUS, _SPACE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
# Control characters except tabs and line ends, lone surrogates, and characters that reverse the direction of text.
# Names may contain them, but XML may not, and they would mislead readers.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def plain(text: object) -> str:
    r"""Replace characters that no reader sees.

    Example:
        >>> plain("a\x00b")
        'a\ufffdb'
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def label(metric: str) -> str:
    """Return the name of a score for people.

    Example:
        >>> label("success_rate"), label("time_to_find")
        ('Reconstructed', 'Time to find')
    """
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ").capitalize()


def unit(metric: str) -> str:
    """Return the unit of a score: ``"share"``, ``"dB"`` or ``"number"``."""
    return METRICS[metric][1] if metric in METRICS else "number"


def number(value: float, kind: str = "number") -> str:
    """Format a number, rounded and with its unit; NaN is ``"none"``.

    Example:
        >>> [number(value, "share").replace(chr(160), " ") for value in (0.0, 0.0004, 0.125, 0.9999, 1.0)]
        ['0 %', '< 0.1 %', '12.5 %', '> 99.9 %', '100 %']
        >>> [number(value, "dB").replace(chr(160), " ") for value in (31.42, 150.0, float("inf"), float("nan"))]
        ['31.4 dB', '≥ 150 dB', '∞ dB', 'none']
    """
    if math.isnan(value):
        return "none"
    if kind == "share" and math.isfinite(1000 * value):
        edge = {0: "<", 1000: ">"}.get(round(1000 * value))
        if edge and value not in (0, 1):
            return f"{edge}{_SPACE}{'0.1' if edge == '<' else '99.9'}{_SPACE}%"
        return f"{100 * value:.1f}".removesuffix(".0").replace("-", _MINUS) + f"{_SPACE}%"
    if math.isinf(value):
        text = "∞" if value > 0 else f"{_MINUS}∞"
    elif kind == "dB":
        text = f"≥{_SPACE}{PSNR_LIMIT:.0f}" if value >= PSNR_LIMIT else f"{value:.1f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", _MINUS) + (f"{_SPACE}dB" if kind == "dB" else "")


def interval(figure: Figure, kind: str = "number") -> str:
    """Format the 95 % confidence interval, or say why there is none.

    Example:
        >>> from leakage.audit.report import Figure
        >>> interval(Figure(0.5, 0.25, 0.75, 12), "share").replace(chr(160), " ")
        '25 % to 75 %'
        >>> interval(Figure(30.0, float("nan"), float("nan"), 1), "dB")
        'no interval: 1 victim'
    """
    if math.isnan(figure.low) or math.isnan(figure.high):
        return "no interval" if figure.victims > 1 else f"no interval: {count(figure.victims, 'victim')}"
    return f"{number(figure.low, kind)} to {number(figure.high, kind)}"


def count(many: int, thing: str) -> str:
    """Format a number of things.

    Example:
        >>> count(1, "victim"), count(1200, "victim")
        ('1 victim', '1,200 victims')
    """
    return f"{many:,} {thing}{'' if many == 1 else 's'}"


def moment(created: str) -> str:
    """Format an ISO 8601 time in words; return any other text unchanged.

    Example:
        >>> moment("2026-01-31T12:00:00+00:00")
        '31 January 2026, 12:00 UTC'
    """
    try:
        when = datetime.fromisoformat(created).astimezone(UTC)
    except ValueError:
        return created
    return f"{when.day} {_MONTHS[when.month - 1]} {when.year}, {when:%H:%M} UTC"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units.

    Example:
        >>> [duration(seconds) for seconds in (0.04, 42.0, 600.0, 3900.0)]
        ['< 0.1 s', '42 s', '10 min', '1 h 5 min']
    """
    if not math.isfinite(seconds):
        return "not known"
    if seconds < 59.5:
        return "< 0.1 s" if 0 < seconds < 0.1 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest if not hours else 0, "s")]
    return " ".join(f"{many} {name}" for many, name in parts if many)


def found(metric: str, attack: str, client: str, figure: Figure) -> str:
    """Describe what an attack found, as a sentence without its full stop.

    Example:
        >>> from leakage.audit.report import Figure
        >>> found("success_rate", "iDLG", "phone", Figure(0.5, 0.25, 0.75, 12)).replace(chr(160), " ")
        'Attack “iDLG” reconstructed 50 % of the images of client “phone” (95 % interval: 25 % to 75 %)'
        >>> found("success_rate", "", "phone", Figure(0.0, 0.0, 1.0, 0))
        'No attack measured the score “Reconstructed” on client “phone”'
    """
    if not figure.victims:
        return f"No attack measured the score “{label(metric)}” on client “{client}”"
    before, after = METRICS[metric][2:] if metric in METRICS else (f"measured {label(metric).lower()}:", "on")
    kind = unit(metric)
    ends = interval(figure, kind)
    ends = ends if ends.startswith("no ") else f"95{_SPACE}% interval: {ends}"
    return f"Attack “{attack}” {before} {number(figure.value, kind)} {after} client “{client}” ({ends})"


def over(threshold: Threshold) -> str:
    """Describe a threshold that was not kept, in a sentence."""
    limit = number(threshold.limit, unit(threshold.metric))
    return f"{found(threshold.metric, threshold.attack, threshold.client, threshold.figure)}; the limit is {limit}."


def summary(report: AuditReport) -> str:
    """Summarise the audit in a sentence or two."""
    thresholds, verdict = report.thresholds, report.verdict
    if verdict == "failed check":
        check = next(check for check in report.checks if not check.passed)
        return f"“{check.name}” failed for client “{check.client}”. {check.finding}"
    if verdict == "exceeded":
        exceeded = [one for one in thresholds if one.decision == "exceeded"]
        several = f" {len(exceeded)} of {len(thresholds)} thresholds {'is' if len(exceeded) == 1 else 'are'} exceeded."
        return over(max(exceeded, key=_excess)) + (several if len(thresholds) > 1 else "")
    if verdict == "inconclusive":
        undecided = [one for one in thresholds if one.decision == "inconclusive"]
        unmeasured = sum(not one.figure.victims for one in undecided)
        across = sum(not one.figure.high <= one.limit for one in undecided) - unmeasured
        why = [
            (across, "interval too wide for the limit", "intervals too wide for the limit"),
            (unmeasured, "without a measurement", "without a measurement"),
            (len(undecided) - across - unmeasured, *["for which the budget ended first"] * 2),
        ]
        reasons = " and ".join(f"{many} {one if many == 1 else several}" for many, one, several in why if many)
        return f"{len(undecided)} of {count(len(thresholds), 'threshold')} could not be decided: {reasons}."
    if verdict == "within":
        kept = "The threshold is" if len(thresholds) == 1 else f"All {len(thresholds)} thresholds are"
        return f"{kept} kept: nothing beyond your limits was found by these attacks at this budget."
    most = most_found(report.measured)
    if most is None:
        return "No thresholds were given, and no attack measured anything."
    return f"No thresholds were given. The most that was found: {most}."


def most_found(measured: list[Measured]) -> str | None:
    """Describe the highest score that an attack reached, images before labels; None if nothing was measured."""
    for metric in METRICS:
        rows = [row for row in measured if metric in row.metrics and row.metrics[metric].victims]
        if rows:
            row = max(rows, key=lambda row: (row.metrics[metric].value, row.victims))
            return found(metric, row.attack, row.client, row.metrics[metric])
    return None


def _excess(threshold: Threshold) -> tuple[bool, float]:
    """Sort key: scores of images first, then the distance above the limit."""
    return threshold.metric in ("success_rate", "identified"), threshold.figure.low - threshold.limit
