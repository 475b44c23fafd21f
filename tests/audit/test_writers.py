import dataclasses
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from leakage.audit.report import Figure, Measured, Threshold, VictimRow, write_victims
from leakage.audit.writers import junit_xml, model_card_section, render_page, sarif_log
from leakage.audit.writers.curves import TABLE, curves
from leakage.audit.writers.findings import no_better, side_by_side
from leakage.audit.writers.pictures import data_uri
from leakage.audit.writers.words import plain
from leakage.metrics import wilson_interval
from tests.audit.made_up import (
    FAILED,
    HOSTILE,
    INFINITE,
    NAN,
    made_up_report,
    made_up_victims,
    variant,
    write_pictures,
)

VERDICTS = {
    "exceeded": "Threshold exceeded",
    "inconclusive": "Inconclusive",
    "within": "Within your thresholds",
    "no thresholds": "Measured, not judged",
    "failed check": "Self-check failed",
}


class Page(HTMLParser):
    """Tags with their attributes, and the text of each section."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.sections, self.section, self.hidden = [], Counter(), "", False
        self.text = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag in ("style", "title")
        if tag == "section" and "id" in dict(attrs):
            self.section = dict(attrs)["id"]

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.text[self.section] = self.text.get(self.section, "") + f" {data}"

    def words(self, section):
        return " ".join(self.text.get(section, "").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return render_page(made_up_report(), made_up_victims(), folder)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# The page


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_verdict_and_its_summary_are_at_the_top(verdict, folder):
    report = variant(verdict)
    page = Page(render_page(report, made_up_victims(), folder))
    assert f"Verdict: {VERDICTS[verdict]} " in page.words("")
    assert " ".join(plain(report.summary).replace("`", "").split()) in page.words("")
    assert f"Exit code {report.exit_code}" in page.words("")


def test_the_page_runs_nothing_and_fetches_nothing(page, html):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "style" not in attributes
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,")
        if tag == "a":
            assert re.match(r"#|https://(arxiv|example)\.org/", attributes["href"])
    assert "@import" not in html
    assert "url(" not in html
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_hostile_names_are_shown_as_text(page, html):
    assert "<script" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    for section in ("measured", "declared", "preflight", "checks", "plan"):
        assert plain(HOSTILE) in page.text[section], section


def test_the_three_blocks_are_not_mixed(page):
    assert page.words("measured").startswith("Measured What these attacks found at this budget")
    assert page.words("declared").startswith("Declared What you declared")
    assert page.words("combined").startswith("Combined What follows from both")
    assert "at most 5" in page.words("combined")
    assert "at most 5" not in page.words("measured") + page.words("declared")
    assert "honest but curious" in page.words("declared")
    assert "honest but curious" not in page.words("measured") + page.words("combined")
    assert "noise multiplier 1.1" in page.words("combined")
    assert "noise multiplier 1.1" not in page.words("measured")


def test_rows_have_intervals_and_say_where_there_are_none(page):
    measured = page.words("measured").replace("\N{NO-BREAK SPACE}", " ")
    assert "92.5 % 80.1 % to 97.4 %" in measured
    assert "∞ dB no interval " in measured
    assert "100 % no interval: 1 victim" in measured
    assert "no victims" in measured
    assert "nan" not in measured.lower().replace("nano", "")


def test_an_attack_that_is_no_better_than_a_guess_is_marked_and_no_other(page):
    assert page.words("measured").count("attack no better than this guess") == 1
    row = next(row for row in made_up_report().measured if row.client.startswith("hospital"))
    assert no_better(row)
    better = dataclasses.replace(row, metrics={"psnr": Figure(15.3, 15.0, 15.6, 40)})
    assert not no_better(better)
    equal = dataclasses.replace(row, metrics={"psnr": Figure(15.2, 15.0, 15.6, 40)})
    assert no_better(equal)
    assert not no_better(dataclasses.replace(row, baselines={}))
    assert not no_better(dataclasses.replace(row, baselines={"grey": Figure(NAN, NAN, NAN, 0)}))
    assert no_better(dataclasses.replace(row, metrics={"psnr": Figure(NAN, NAN, NAN, 0)}))


def test_what_leaked_most_comes_first(page):
    measured = page.words("measured").split("Success over threshold")[0]
    assert measured.index("Inverting Gradients on phone") < measured.index("iDLG on phone")
    assert measured.index("iDLG on phone") < measured.index("iDLG on hospital, DP-SGD")


def test_galleries_show_worst_and_typical_victims_once_with_words_for_each_picture(page, html):
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(one["alt"] for one in pictures)
    kinds = Counter(one["alt"].split(" of ")[0].split(" for ")[0] for one in pictures)
    assert kinds["Truth"] == kinds["What the attack found"] == kinds["Best guess without gradient"] >= 3 * 8
    measured = page.words("measured")
    assert measured.count("Worst victims") == measured.count("Typical victims") == 3
    report, victims = made_up_report(), made_up_victims()
    own = [row for row in victims if (row.client, row.attack) == ("phone", "Inverting Gradients") and row.truth]
    assert len(own) == 16
    captions = re.findall(
        r"victim (\d+), image 0", measured.split("Inverting Gradients on phone")[-1].split("iDLG on")[0]
    )
    assert len(captions) == len(set(captions))
    worst = [row.victim for row in report.measured[1].worst if row.truth]
    assert [int(victim) for victim in captions[: len(worst)]] == worst


def test_clients_without_measurements_have_no_curves(folder):
    page = Page(render_page(variant("failed check"), made_up_victims(), folder))
    assert "Success over threshold" not in page.words("measured")
    assert "No attack measured anything. The audit ended at the self-check." in page.words("measured")
    assert "Nothing was judged: the audit ended at the self-check." in page.words("combined")
    assert "None was computed: the audit ended at the self-check." in page.words("combined")
    assert not [attributes for tag, attributes in page.tags if tag == "img"]


def test_missing_pictures_leave_a_gap(tmp_path):
    html = render_page(made_up_report(), made_up_victims(), tmp_path)
    assert "no picture" in html
    assert "<img" not in html


def test_audits_of_many_clients_open_the_first_galleries_only(folder):
    report = made_up_report()
    row = report.measured[1]
    report.measured = [dataclasses.replace(row, attack=f"attack {i}") for i in range(6)]
    html = render_page(report, [], folder)
    assert html.count('<details class="gallery" open>') == 4
    assert html.count('<details class="gallery">') == 2


def test_a_threshold_that_nothing_measured_is_told_everywhere(folder):
    nothing = Threshold("success_rate", 0.05, "phone", "", Figure(NAN, NAN, NAN, 0), "inconclusive")
    report = dataclasses.replace(made_up_report(), thresholds=[nothing])
    told = "No attack measured the score “Reconstructed” on client “phone”; the limit is 5\N{NO-BREAK SPACE}%."
    assert report.summary == "1 of 1 threshold could not be decided: 1 without a measurement."
    combined = Page(render_page(report, [], folder)).words("combined")
    assert "inconclusive not measured no attack on phone" in combined
    assert ET.fromstring(junit_xml(report)).find("testsuite/testcase/error").get("message") == told
    result = next(one for one in sarif_log(report)["runs"][0]["results"] if one["ruleId"] == "threshold-inconclusive")
    assert result["message"]["text"] == told
    assert "| phone | any | no victims | inconclusive |" in model_card_section(report)


def test_clients_stand_side_by_side_if_one_is_defended(folder):
    report = made_up_report()
    combined = Page(render_page(report, [], folder)).words("combined").replace("\N{NO-BREAK SPACE}", " ")
    table = combined.split("Clients side by side")[1]
    assert "Accuracy, declared" in table
    # Of the phone, the attack that got most.
    assert "phone none not given 92.5 % 80.1 % to 97.4 %" in table
    assert "hospital, DP-SGD clip 1, noise 1.1 0.913 0 % 0 % to 8.8 %" in table
    assert side_by_side(report)[0].worst.attack == "Inverting Gradients"
    for client in report.declared.clients:
        client.pop("accuracy", None)
    assert "Accuracy, declared" not in Page(render_page(report, [], folder)).words("combined")
    del report.declared.clients[1]
    assert side_by_side(report) == []
    assert "Clients side by side" not in Page(render_page(report, [], folder)).words("combined")


def test_only_attacks_on_defended_clients_are_called_adapted(folder):
    report = made_up_report()
    report.measured = [dataclasses.replace(row, adaptive=True) for row in report.measured[:2]]
    measured = Page(render_page(report, [], folder)).words("measured")
    assert measured.count("adapted to its defenses") == 1


def test_addresses_become_links_and_backticks_code(folder):
    report = made_up_report()
    address = "https://example.org/a?b=1&c=2"
    report.declared.asserted["one"] = f"`a<b>` or ` {address}; <i>(http://example.com/x).</i> javascript:alert(1)"
    html = render_page(report, [], folder)
    shown = address.replace("&", "&amp;")
    assert "<code>a&lt;b&gt;</code> or ` <a href=" in html
    assert f'<a href="{shown}" rel="noreferrer">{shown}</a>; &lt;i&gt;(' in html
    assert '"http://example.com/x" rel="noreferrer">http://example.com/x</a>).&lt;/i&gt; javascript:alert(1)<' in html


def test_the_same_problem_in_several_places_is_told_once(folder):
    report = made_up_report()
    places = [dataclasses.replace(report.preflight[0], where=f"block{i}.relu") for i in range(3)]
    report = dataclasses.replace(report, preflight=[*places, report.preflight[1]])
    preflight = Page(render_page(report, [], folder)).words("preflight")
    assert "block0.relu , block1.relu , block2.relu : ReLU(inplace=True)" in preflight
    assert preflight.count("What to do") == 2
    assert "- block0.relu, block1.relu, block2.relu: ReLU(inplace=True) None once done." in model_card_section(report)


def test_attacks_that_were_stopped_are_told_from_those_that_did_not_begin(folder):
    report = made_up_report()
    report.plan = [dataclasses.replace(one, done=False, reason="late") for one in report.plan[2:4]]
    plan = Page(render_page(report, [], folder)).words("plan")
    assert "0 of 2 attacks ran to the end." in plan
    assert "iDLG on hospital, DP-SGD 1 min ended early late" in plan
    assert "GIAS on hospital, DP-SGD 1 h 10 min not run late" in plan


def test_defenses_are_told_in_words(folder):
    report = made_up_report()
    report.declared.clients[0]["defenses"] = [{"name": "Clip", "norm": 1.0}, {"name": "Sign"}]
    declared = Page(render_page(report, [], folder)).words("declared")
    assert "defenses Clip (norm 1), Sign epochs" in declared


@pytest.mark.parametrize("value", [INFINITE, -INFINITE, 1e308, -0.5, 7.0])
def test_shares_that_cannot_be_stay_within_the_page(value, folder):
    report = made_up_report()
    figure = Figure(value, value, value, 40)
    report.measured = [dataclasses.replace(report.measured[0], metrics={"success_rate": figure, "psnr": figure})]
    report.thresholds = [dataclasses.replace(report.thresholds[0], limit=value, figure=figure)]
    html = render_page(report, [], folder)
    places = [float(x) for x in re.findall(r' x[12]?="([-0-9.]+)"', html)]
    assert places
    assert all(0 <= x <= 100 for x in places)


def test_dotted_names_may_be_broken_and_stay_text(folder):
    report = dataclasses.replace(made_up_report(), model="a.b<i>.C")
    assert "<h1><bdi>a.<wbr>b&lt;i&gt;.<wbr>C</bdi></h1>" in render_page(report, [], folder)


# Pictures


def test_small_pictures_keep_their_pixels_and_large_ones_are_made_smaller(tmp_path):
    for mode in ("L", "RGB", "RGBA"):
        Image.effect_noise((32, 28), 50).convert(mode).save(tmp_path / "small.png")
        small = _decoded(data_uri(tmp_path, "small.png"), tmp_path)
        assert (small.mode, small.tobytes()) == (mode, Image.open(tmp_path / "small.png").tobytes())
        Image.linear_gradient("L").resize((640, 320)).convert(mode).save(tmp_path / "large.png")
        large = _decoded(data_uri(tmp_path, "large.png"), tmp_path)
        assert (large.format, large.size) == ("JPEG", (160, 80))
        assert len(data_uri(tmp_path, "large.png")) < 5_000
        top, bottom = (large.convert("L").getpixel((80, y)) for y in (2, 77))
        assert bottom - top > 200


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<svg/>", None])
def test_broken_pictures_are_left_out(content, tmp_path):
    if content is None:
        Image.new("L", (28, 28)).save(tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()[:-30]
    (tmp_path / "a.png").write_bytes(content)
    for path in ("a.png", "missing.png", "", "a\x00.png", "a\ud800.png", "a" * 1000):
        assert data_uri(tmp_path, path) == "", path


@pytest.mark.parametrize("path", ["../secret.png", "/etc/secret.png", "images/../../secret.png", "link/secret.png"])
def test_pictures_outside_the_folder_are_refused(path, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="Expected pictures within the audit's folder, but got"):
        data_uri(tmp_path / "audit", path)


def _decoded(uri, folder):
    import base64

    (folder / "decoded.png").write_bytes(base64.b64decode(uri.split(",")[1]))
    return Image.open(folder / "decoded.png")


# Curves


def _row(victim, psnr, baseline=12.0, attack="a", image=0):
    return VictimRow("c", attack, victim, image, 0, 0, psnr, 1.0, 0.0, False, False, baseline, "", "", "")


def test_curves_are_shares_that_reach_a_threshold():
    scores = [5.0, 20.0, 31.0, INFINITE, NAN]
    attack, guess = curves(_row(victim, psnr) for victim, psnr in enumerate(scores))
    assert attack.table == [sum(psnr >= x for psnr in scores) / 5 for x in TABLE]
    assert guess.name == ""
    assert guess.table == [1.0, *[0.0] * (len(TABLE) - 1)]
    # From the left at the top for what all reach (none here, as one is no number) to the right at one of five.
    line = [tuple(map(float, point.split(","))) for point in attack.line.split()]
    assert line[0] == (46.0, 24 + 206 * 0.2)
    assert line[-1][0] == 456.0
    assert line[-1][1] == pytest.approx(24 + 206 * 0.8, abs=0.06)


def test_bands_count_victims_not_images():
    rows = [_row(victim, 30.0 if victim else 10.0, image=image) for victim in range(4) for image in range(5)]
    band = [tuple(map(float, point.split(","))) for point in curves(rows)[0].band.split()]
    low, high = wilson_interval(0.75, 4)
    at = [y for x, y in band if x == pytest.approx(46 + 410 * 20 / 60, abs=0.06)]
    assert at == [pytest.approx(24 + 206 * (1 - end), abs=0.06) for end in (low, high)]


def test_the_guess_is_that_of_the_attack_that_met_most_victims():
    rows = [_row(0, 30.0, attack="short"), *(_row(victim, 10.0, baseline=25.0 * victim) for victim in range(2))]
    assert curves(rows)[-1].table[TABLE.index(20)] == 0.5
    assert curves([]) == []


# JUnit


def test_junit_has_a_case_for_each_threshold_and_check():
    root = ET.fromstring(junit_xml(made_up_report()))
    checks, thresholds, missed = root
    assert [len(suite.findall("testcase")) for suite in root] == [3, 4, 2]
    outcomes = [next((child.tag for child in case), "passed") for case in thresholds]
    assert outcomes == ["failure", "passed", "error", "error"]
    assert {child.tag for case in missed for child in case} == {"skipped"}
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("9", "1", "2", "2")
    assert (thresholds.get("tests"), thresholds.get("failures"), thresholds.get("errors")) == ("4", "1", "2")
    failure = thresholds.find("testcase/failure")
    assert failure.get("message").replace("\N{NO-BREAK SPACE}", " ").endswith("; the limit is 5 %.")
    assert thresholds[0].get("name").replace("\N{NO-BREAK SPACE}", " ") == (
        "success_rate of Inverting Gradients is at most 5 %"
    )
    assert all(case.get("classname").count(".") == 2 for case in root.iter("testcase"))
    assert checks.get("failures") == "0"


def test_junit_of_a_failed_check_fails():
    root = ET.fromstring(junit_xml(variant("failed check")))
    assert [case.find("failure").get("message") for case in root[0] if len(case)] == [FAILED.finding]


def test_junit_is_green_only_if_the_exit_code_is():
    for verdict in VERDICTS:
        report = variant(verdict)
        root = ET.fromstring(junit_xml(report))
        assert (root.get("failures") == root.get("errors") == "0") == (report.exit_code == 0), verdict


# SARIF

TEXT = {"type": "string", "minLength": 1}


def test_sarif_keeps_to_the_standard():
    jsonschema = pytest.importorskip("jsonschema")

    def closed(required, **optional):
        return {
            "type": "object",
            "properties": {**required, **optional},
            "required": list(required),
            "additionalProperties": False,
        }

    message, level = closed({"text": TEXT}), {"enum": ["none", "note", "warning", "error"]}
    rule = closed(
        {"id": {"pattern": "^[a-z-]+$"}, "shortDescription": message, "fullDescription": message},
        name={"pattern": "^[A-Z][A-Za-z]+$"},
        help=message,
        defaultConfiguration=closed({"level": level}),
        properties={"type": "object"},
    )
    location = closed(
        {"logicalLocations": {"type": "array", "minItems": 1}},
        physicalLocation=closed(
            {"artifactLocation": closed({"uri": TEXT})}, region=closed({"startLine": {"minimum": 1}})
        ),
    )
    result = closed(
        {"ruleId": TEXT, "ruleIndex": {"type": "integer", "minimum": 0}, "level": level, "message": message},
        locations={"type": "array", "minItems": 1, "items": location},
        partialFingerprints={"type": "object", "additionalProperties": TEXT},
    )
    driver = closed({"name": TEXT, "version": TEXT, "rules": {"type": "array", "items": rule}})
    invocation = closed({"executionSuccessful": {"type": "boolean"}}, commandLine=TEXT, exitCode={"type": "integer"})
    run = closed(
        {"tool": closed({"driver": driver}), "results": {"type": "array", "items": result}},
        automationDetails=closed({"id": TEXT}),
        invocations={"type": "array", "items": invocation},
        columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
        properties={"type": "object"},
    )
    log = closed({"version": {"const": "2.1.0"}, "runs": {"type": "array", "items": run}}, **{"$schema": TEXT})
    for verdict in VERDICTS:
        jsonschema.validate(json.loads(json.dumps(sarif_log(variant(verdict)), allow_nan=False)), log)


def test_sarif_has_a_result_for_each_finding_and_rules_that_fit():
    report = dataclasses.replace(made_up_report(), checks=[FAILED])
    run = sarif_log(report)["runs"][0]
    rules, results = run["tool"]["driver"]["rules"], run["results"]
    assert Counter(result["ruleId"] for result in results) == {
        "self-check-failed": 1,
        "threshold-exceeded": 1,
        "threshold-inconclusive": 2,
        "preflight-problem": 3,
    }
    for result in results:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert rules[result["ruleIndex"]]["defaultConfiguration"]["level"] == result["level"]
    levels = {result["ruleId"]: result["level"] for result in results}
    assert levels["threshold-exceeded"] == levels["self-check-failed"] == "error"
    assert levels["threshold-inconclusive"] == "warning"
    marks = [result["partialFingerprints"]["primaryLocationLineHash"] for result in results]
    assert len(set(marks)) == len(marks)
    exceeded = next(result for result in results if result["ruleId"] == "threshold-exceeded")
    assert exceeded["locations"][0]["logicalLocations"] == [
        {
            "name": "success_rate",
            "fullyQualifiedName": "phone/Inverting Gradients/success_rate",
            "kind": "score",
        }
    ]
    assert run["invocations"][0]["exitCode"] == 2
    assert run["invocations"][0]["executionSuccessful"] is False


def test_sarif_marks_stay_from_audit_to_audit():
    first, second = made_up_report(), made_up_report()
    second.thresholds[0] = dataclasses.replace(second.thresholds[0], figure=Figure(0.5, 0.3, 0.7, 40))
    marks = [
        [one["partialFingerprints"] for one in sarif_log(report)["runs"][0]["results"]] for report in (first, second)
    ]
    assert marks[0] == marks[1]


# The model card


def test_model_card_has_the_blocks_and_shows_hostile_names_as_text():
    card = model_card_section(made_up_report())
    assert card.startswith("## Gradient leakage\n\n**Threshold exceeded.** Attack “Inverting Gradients” reconstructed")
    parts = re.split(r"^### ", card, flags=re.M)
    assert [part.splitlines()[0] for part in parts[1:]] == ["Measured", "Declared", "Combined"]
    assert "| phone | Inverting Gradients | 40 | 92.5" in parts[1]
    assert "honest but curious" in parts[2]
    assert "exceeded |" in parts[3]
    assert "The budget of 10 min ended first." in parts[3]
    assert not re.search(r"(?<!\\)[<>`]", card)
    assert "\x1b" not in card
    for line in card.splitlines():
        if line.startswith("|"):
            table = re.findall(r"(?<!\\)\|", line)
            assert len(table) in (6, 9), line


def test_model_card_of_an_audit_that_ended_early_says_so():
    card = model_card_section(variant("failed check"))
    assert "No attack measured anything." in card
    assert "Nothing was judged." in card
    assert "The self-check failed." in card


# All of them


@pytest.mark.parametrize("verdict", VERDICTS)
def test_save_writes_every_file_and_the_same_each_time(verdict, folder, tmp_path):
    write_victims(tmp_path, [dataclasses.replace(row, truth="", reconstruction="") for row in made_up_victims()])
    names = ["audit.json", "audit.sarif", "junit.xml", "model_card.md", "report.html"]
    variant(verdict).save(tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in names}
    variant(verdict).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "victims.jsonl"])
    assert {name: (tmp_path / name).read_bytes() for name in names} == first
    for content in first.values():
        assert not re.search(r"\bsafe\b", content.decode("utf-8"))


def test_an_audit_of_nothing_is_written(tmp_path):
    report = made_up_report()
    for name in ("preflight", "checks", "plan", "measured", "bounds", "thresholds"):
        setattr(report, name, [])
    report.save(tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    for section, words in {
        "measured": "No attack measured anything.",
        "combined": "There is no bound: no mechanism that has one was declared.",
        "preflight": "Nothing hindered the attacks.",
        "checks": "No self-check ran.",
        "plan": "No attack was planned.",
    }.items():
        assert words in page.words(section)


def test_files_of_the_page_are_in_the_package():
    import leakage.audit.writers

    folder = Path(leakage.audit.writers.__file__).parent
    assert {path.name for path in folder.iterdir() if path.suffix in (".html", ".css", ".svg")} == {
        "page.html",
        "page.css",
        "curve.svg",
    }


def test_scores_that_only_the_user_knows_have_their_names(folder):
    report = made_up_report()
    figure = Figure(3.25, 3.0, 3.5, 40)
    report.measured = [Measured("phone", "own", False, 1, 40, 1.0, 1.0, {"queries": figure}, {"own_guess": figure}, [])]
    report.thresholds = [dataclasses.replace(report.thresholds[0], metric="queries", limit=2.0, figure=figure)]
    page = Page(render_page(report, [], folder))
    assert "Queries: at most 2" in page.words("combined")
    assert "own guess" in page.words("measured")
    assert "own measured queries: 3.25 on client" not in page.words("")
    assert "measured queries: 3.25 on client “phone”" in report.summary.replace("\N{NO-BREAK SPACE}", " ")
