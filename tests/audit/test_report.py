import dataclasses
import json
import typing
from pathlib import Path

import jsonschema
import pytest

import leakage.audit
from leakage.audit.report import AuditReport, Figure, Problem, Threshold, read_victims, write_victims
from leakage.files.records import from_json, to_json
from tests.audit.made_up import CHECKS, EXCEEDED, FAILED, INCONCLUSIVE, WITHIN, made_up_report, made_up_victims, variant

SCHEMA = json.loads(Path(leakage.audit.__file__).with_name("audit.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
VERDICTS = ["exceeded", "inconclusive", "within", "no thresholds", "failed check"]


def same(report, other):
    """NaN is not equal to itself; its text is."""
    return repr(report) == repr(other)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_saved_report_is_loaded_as_it_was(verdict, tmp_path):
    report = variant(verdict)
    report.save(tmp_path / "new")
    assert same(AuditReport.load(tmp_path / "new"), report)
    content = json.loads((tmp_path / "new/audit.json").read_text("ascii"), parse_constant=pytest.fail)
    assert content["verdict"] == verdict == report.verdict
    VALIDATOR.validate(content)


def test_the_schema_is_one_and_has_every_field_of_every_dataclass():
    VALIDATOR.check_schema(SCHEMA)
    kinds = {"": AuditReport, "victim": leakage.audit.report.VictimRow} | {
        kind.__name__.lower(): kind
        for hint in typing.get_type_hints(AuditReport).values()
        for kind in (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(kind)
    }
    kinds["figure"] = Figure
    assert set(kinds) - {""} == set(SCHEMA["$defs"]) - {"number"}
    for name, kind in kinds.items():
        part = SCHEMA["$defs"][name] if name else SCHEMA
        fields = {field.name for field in dataclasses.fields(kind)} | (set() if name else set(DERIVED))
        assert set(part["properties"]) == set(part["required"]) == fields
        assert part["additionalProperties"] is False


DERIVED = ("verdict", "exit_code", "summary")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("seed"), r"Expected `the record` with the fields .* but got one without \['seed'\]"),
        (lambda c: c.update(extra=1), r"but got one with \['extra'\]"),
        (lambda c: c.update(seed="0"), r"Expected `seed` as a whole number, but got '0'"),
        (lambda c: c.update(seed=True), r"Expected `seed` as a whole number, but got True"),
        (lambda c: c.update(budget_seconds="long"), r"Expected `budget_seconds` as a number, but got 'long'"),
        (lambda c: c.update(measured={}), r"Expected `measured` as a list, but got {}"),
        (lambda c: c["checks"][0].update(passed=1), r"Expected `checks\[0\].passed` as true or false, but got 1"),
        (
            lambda c: c["measured"][0]["metrics"].update(psnr=3.0),
            r"Expected `measured\[0\].metrics.psnr` as an object, but got 3.0",
        ),
        (
            lambda c: c["thresholds"][1].update(decision="safe"),
            r"Expected `decision` to be one of .*, but got 'safe'. It is in `thresholds\[1\]`",
        ),
        (lambda c: c["preflight"][0].update(kind="maybe"), r"Expected `kind` to be one of .*, but got 'maybe'"),
        (
            lambda c: c["declared"]["asserted"].update(a=None),
            r"Expected `declared.asserted.a` as a string, but got None",
        ),
    ],
)
def test_other_fields_and_types_are_refused_by_the_loader_and_by_the_schema(change, message, tmp_path):
    made_up_report().save(tmp_path)
    path = tmp_path / "audit.json"
    content = json.loads(path.read_bytes())
    assert VALIDATOR.is_valid(content)
    change(content)
    assert not VALIDATOR.is_valid(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        AuditReport.load(tmp_path)


def test_a_verdict_that_its_thresholds_do_not_give_is_refused(tmp_path):
    made_up_report().save(tmp_path)
    path = tmp_path / "audit.json"
    path.write_text(path.read_text().replace('"verdict": "exceeded"', '"verdict": "within"'))
    with pytest.raises(
        ValueError, match=r"Expected `verdict` 'exceeded' in .* which follows from its checks .* but got 'within'"
    ):
        AuditReport.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "as whole JSON, but got: Expecting value"),
        (b'{"version": 1, "lea', "as whole JSON, but got: Unterminated string"),
        (b"\xff\xfe{", "as whole JSON, but got: "),
        (b"[" * 100_000, "as whole JSON, but got: nested too deeply"),
        (b'{"version": NaN}', "as whole JSON, but got: NaN is not valid JSON"),
        (b"[]", r"Expected `the record` as an object, but got \[\]"),
        (b'{"version": 2}', "Expected version 1 of `audit.json` in .*, but got 2"),
        (b'{"version": true}', "Expected version 1 of `audit.json` in .*, but got True"),
        (b"{}", "Expected version 1 of `audit.json` in .*, but got None"),
    ],
)
def test_files_of_another_kind_are_refused(content, message, tmp_path):
    (tmp_path / "audit.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        AuditReport.load(tmp_path)


def test_a_folder_without_an_audit_is_told():
    with pytest.raises(FileNotFoundError, match=r"Expected an audit at 'nowhere/audit.json', but got no such"):
        AuditReport.load("nowhere")


@pytest.mark.parametrize(
    ("thresholds", "checks", "verdict", "exit_code"),
    [
        ([], CHECKS, "no thresholds", 0),
        ([WITHIN], CHECKS, "within", 0),
        ([WITHIN, EXCEEDED, INCONCLUSIVE], CHECKS, "exceeded", 1),
        ([WITHIN, INCONCLUSIVE], CHECKS, "inconclusive", 3),
        ([EXCEEDED], [*CHECKS, FAILED], "failed check", 2),
    ],
)
def test_the_worst_decides(thresholds, checks, verdict, exit_code):
    report = dataclasses.replace(made_up_report(), thresholds=thresholds, checks=checks)
    assert (report.verdict, report.exit_code) == (verdict, exit_code)


@pytest.mark.parametrize(
    ("verdict", "summary"),
    [
        (
            "exceeded",
            "Attack “Inverting Gradients” reconstructed 92.5 % of the images of client “phone” (95 % interval: "
            "80.1 % to 97.4 %); the limit is 5 %. 1 of 4 thresholds is exceeded.",
        ),
        (
            "inconclusive",
            "2 of 3 thresholds could not be decided: 1 interval too wide for the limit and 1 for which the budget "
            "ended first.",
        ),
        (
            "within",
            "The threshold is kept: nothing beyond your limits was found by these attacks at this budget.",
        ),
        (
            "failed check",
            "“declared learning rate” failed for client “phone”. The update is 10.0 times as large as the declared "
            "client's. A learning rate of 0.1 in place of 0.01 explains it.",
        ),
    ],
)
def test_summaries_in_plain_words(verdict, summary):
    assert variant(verdict).summary.replace("\N{NO-BREAK SPACE}", " ") == summary


def test_without_thresholds_the_summary_has_the_most_that_was_found_if_anything_was():
    report = variant("no thresholds")
    assert "No thresholds were given. The most that was found: " in report.summary
    assert "reconstructed 100" in report.summary
    empty = dataclasses.replace(report, measured=[])
    assert empty.summary == "No thresholds were given, and no attack measured anything."


def test_the_highest_excess_over_images_comes_first_in_the_summary():
    labels = Threshold("label_accuracy", 0.0, "phone", "iDLG", Figure(1.0, 1.0, 1.0, 40), "exceeded")
    report = dataclasses.replace(made_up_report(), thresholds=[labels, EXCEEDED])
    assert report.summary.startswith("Attack “Inverting Gradients” reconstructed")
    assert report.summary.endswith("2 of 2 thresholds are exceeded.")


def test_victims_survive_the_file_and_fit_the_schema(tmp_path):
    rows = made_up_victims()
    write_victims(tmp_path, rows)
    assert read_victims(tmp_path) == rows
    victim = VALIDATOR.evolve(schema={"$ref": "#/$defs/victim", "$defs": SCHEMA["$defs"]})
    for line in (tmp_path / "victims.jsonl").read_text("ascii").splitlines():
        victim.validate(json.loads(line))
    assert read_victims(tmp_path / "none") == []


def test_a_broken_line_of_victims_is_named(tmp_path):
    write_victims(tmp_path, made_up_victims()[:3])
    path = tmp_path / "victims.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"Expected a victim in line 3 of '.*victims.jsonl', but got: "):
        read_victims(tmp_path)


def test_nothing_is_written_if_a_file_cannot_be_made(tmp_path):
    (tmp_path / "victims.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="Expected a victim in line 1"):
        made_up_report().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["victims.jsonl"]


def test_kinds_and_decisions_are_checked():
    with pytest.raises(
        ValueError, match=r"Expected `kind` to be one of \['never', 'not yet', 'replace'\], but got 'no'"
    ):
        Problem("no", "", "", "", "")
    with pytest.raises(ValueError, match=r"Expected `success_threshold` to be positive and finite, but got 0.0"):
        dataclasses.replace(made_up_report(), success_threshold=0.0)
    with pytest.raises(ValueError, match=r"Expected `decision` to be one of .*, but got 'safe'"):
        dataclasses.replace(WITHIN, decision="safe")


def test_records_of_other_kinds_are_refused():
    assert from_json(Figure, to_json(EXCEEDED.figure)) == EXCEEDED.figure
    assert from_json(Figure, {"value": 1, "low": "-Infinity", "high": "Infinity", "victims": 1}).value == 1.0
    with pytest.raises(ValueError, match=r"Expected `the record` as an object, but got \[\]"):
        from_json(Figure, [])
    with pytest.raises(ValueError, match=r"Expected `here.low` as a number, but got None"):
        from_json(Figure, {"value": 1, "low": None, "high": 1, "victims": 1}, "here")
