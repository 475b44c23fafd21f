"""``model_card.md``: a section for a model card."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from leakage.audit.writers import findings, words

if TYPE_CHECKING:
    from leakage.audit.report import AuditReport, Figure, Measured

_SCORES = ("success_rate", "identified", "label_accuracy", "psnr")

# Characters with a special meaning in Markdown or in the HTML within it.
_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|~$&!]")


def model_card_section(report: AuditReport) -> str:
    """Write the section: the verdict, what was measured, declared and combined, and what did not run; no pictures."""
    measured = [_measured(row) for row in findings.most_leaked_first(report.measured)]
    thresholds = [
        [
            text(f"{words.label(one.metric)}: at most {words.number(one.limit, words.unit(one.metric))}"),
            text(one.client),
            text(one.attack or "any"),
            _figure(one.metric, one.figure),
            one.decision,
        ]
        for one in report.thresholds
    ]
    bounds = [
        [
            text(one.client),
            text(one.mechanism),
            text(words.label(one.metric)),
            words.number(one.value, words.unit(one.metric)),
            text(one.source),
        ]
        for one in report.bounds
    ]
    missed = [f"- {text(one.attack)} on {text(one.client)}: {text(one.reason)}" for one in report.plan if not one.done]
    problems = [
        f"- {text(', '.join(places))}: {text(one.problem)} {text(one.means)}"
        for one, places in findings.grouped(report.preflight)
    ]
    asserted = [f"- {text(name.replace('_', ' '))}: {text(value)}" for name, value in report.declared.asserted.items()]
    ended = report.verdict == "failed check"
    nothing_judged = f"{'Nothing was judged' if ended else 'No thresholds were given'}."
    parts = [
        "## Gradient leakage",
        f"**{words.VERDICTS[report.verdict][0]}.** {text(report.summary)}",
        words.VERDICTS[report.verdict][1],
        f"Audited on {text(report.created)} with leakage {text(report.leakage)}, seed {report.seed}, on "
        f"{text(report.data)}, with a budget of {words.duration(report.budget_seconds)}.",
        "### Measured",
        _table(
            ["Client", "Attack", "Victims", *map(words.label, _SCORES), "Best guess"],
            measured,
        )
        or "No attack measured anything.",
        "### Declared",
        "\n".join(
            [
                f"- Threat model: {text(report.declared.threat_model) or 'none declared'}",
                f"- What the attacker knows about the images: {text(report.declared.prior) or 'none declared'}",
                *asserted,
            ]
        ),
        "### Combined",
        _table(["Threshold", "Client", "Attack", "Measured", "Decision"], thresholds) or nothing_judged,
        _table(["Client", "Mechanism", "Score", "No attacker exceeds", "Source"], bounds),
        "\n".join(["Not run, or ended early:", "", *missed]) if missed else "",
        "\n".join(["What limits the audit:", "", *problems]) if problems else "",
        "“Not reconstructed” means “not by these attacks at this budget”.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def text(words_of_user: object) -> str:
    r"""Escape a text so that Markdown shows it unchanged, on one line.

    Example:
        >>> text("a|b <script>")
        'a\\|b \\<script\\>'
    """
    line = " ".join(words.plain(words_of_user).split())
    return _SPECIAL.sub(r"\\\g<0>", line).replace("@", "&#64;")


def _measured(row: Measured) -> list[str]:
    figures = [_figure(name, row.metrics[name]) if name in row.metrics else "not measured" for name in _SCORES]
    guess = findings.best_guess(row)
    guessed = words.number(guess[1].value, "dB") if guess else "none"
    if findings.no_better(row):
        guessed += " (attack no better)"
    return [text(row.client), text(row.attack), f"{row.victims:,}", *figures, guessed]


def _figure(metric: str, figure: Figure) -> str:
    if not figure.victims:
        return "no victims"
    return text(f"{words.number(figure.value, words.unit(metric))} ({words.interval(figure, words.unit(metric))})")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
