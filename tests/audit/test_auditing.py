from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leakage.audit import AuditReport, Client, audit
from leakage.audit.auditing import seconds_of
from leakage.audit.report import read_victims
from leakage.defenses import DPSGD
from tests.audit.modules import LOSSES, Data, Manual, Small, dropping

# Of sigmoid networks with 144 pixels and one image, which closed forms read.
QUICK: dict[str, Any] = {"victims": 6, "budget": "60s", "attacks": ["labels", "rgap"]}


@pytest.fixture(scope="module")
def leaking(tmp_path_factory: pytest.TempPathFactory) -> tuple[AuditReport, Path, Small]:
    folder, module = tmp_path_factory.mktemp("audit"), Small()
    report = audit(module, Data(), Client(), fail_above={"success_rate": 0.3}, output=folder, **QUICK)
    return report, folder, module


def test_what_leaks_exceeds_the_limit(leaking: tuple[AuditReport, Path, Small]) -> None:
    report, folder, _ = leaking
    assert (report.verdict, report.exit_code) == ("exceeded", 1)
    assert all(check.passed for check in report.checks)
    labels, rgap = report.measured
    assert labels.metrics["label_accuracy"].value == 1
    assert rgap.metrics["success_rate"].value == 1
    assert rgap.metrics["identified"].value == 1
    assert rgap.metrics["psnr"].value > 60 > max(figure.value for figure in rgap.baselines.values())
    rows = read_victims(folder)
    assert [row.victim for row in rows] == [*range(6)]
    for path in (rows[0].truth, rows[0].reconstruction, rows[0].guess):
        assert (folder / path).read_bytes().startswith(b"\x89PNG")
    assert AuditReport.load(folder) == report


def test_the_same_call_finds_it_done_and_another_is_refused(leaking: tuple[AuditReport, Path, Small]) -> None:
    report, folder, module = leaking
    lines: list[str] = []
    again = audit(module, Data(), Client(), output=folder, log=lines.append, **QUICK)
    assert [one.seconds for one in again.measured] == [one.seconds for one in report.measured]
    assert "Timing a few iterations of each attack" not in lines
    assert again.verdict == "no thresholds"
    before = (folder / "audit.json").read_bytes()
    with pytest.raises(ValueError, match="Expected `output` without another audit, but got"):
        audit(module, Data(), Client(images=2), output=folder, **QUICK)
    trained = Small()
    with torch.no_grad():
        trained.net[1].weight.add_(0.1)
    with pytest.raises(ValueError, match="Expected `output` without another audit, but got"):
        audit(trained, Data(), Client(), output=folder, **QUICK)
    assert (folder / "audit.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "attack"),
    [(LOSSES[0], "rgap"), (LOSSES[1], "rgap"), (dropping(), "gauss_newton")],
    ids=["label smoothing", "class weights", "dropout"],
)
def test_other_losses_and_dropout_leak_too(module: Small, attack: str, tmp_path: Path) -> None:
    client = Client(dropout=attack == "gauss_newton")
    options = {**QUICK, "victims": 1, "attacks": ["labels", attack]}
    report = audit(module, Data(), client, **options, output=tmp_path)
    assert all(check.passed for check in report.checks)
    labels, found = report.measured
    assert labels.metrics["label_accuracy"].value == 1
    assert found.metrics["success_rate"].value == 1


class Killed(BaseException):
    pass


def test_an_audit_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import leakage.audit.run

    options = {**QUICK, "victims": 9}
    fit, calls = leakage.audit.run.fit, 0

    def killed(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # the trial, the first group of victims, and in the second
            raise Killed
        return fit(*given, **named)

    monkeypatch.setattr(leakage.audit.run, "fit", killed)
    with pytest.raises(Killed):
        audit(Small(), Data(), Client(), output=tmp_path, **options)
    assert not (tmp_path / "audit.json").exists()
    report = audit(Small(), Data(), Client(), output=tmp_path, **options)
    # The second and the third group alone: neither the trial nor the first is run again.
    assert calls == 4
    assert report.measured[1].victims == 9
    monkeypatch.undo()
    audit(Small(), Data(), Client(), output=tmp_path / "whole", **options)
    assert read_victims(tmp_path) == read_victims(tmp_path / "whole")


@pytest.mark.slow
def test_privacy_that_is_declared_is_bounded_and_kept(tmp_path: Path) -> None:
    private = DPSGD(noise_multiplier=4.0, norm=0.1)
    assert private.epsilon(1, 1.0, 1e-5) == pytest.approx(1.0, abs=0.1)
    report = audit(
        Small(),
        Data(),
        Client(defenses=[private]),
        fail_above={"success_rate": 0.5},
        victims=4,
        budget="300s",
        attacks=["labels", "gauss_newton"],
        output=tmp_path,
    )
    assert (report.verdict, report.exit_code) == ("within", 0), report.plan
    assert report.measured[1].adaptive
    assert report.measured[1].metrics["success_rate"].value == 0
    assert {bound.metric for bound in report.bounds} == {"identified", "success_rate"}
    assert report.measured[1].metrics["identified"].low <= next(iter(report.bounds)).value


def test_too_few_victims_are_told_beforehand(tmp_path: Path) -> None:
    for limit, said in ((0.1, "at least 35 victims"), (0.0, "Set limits above 0")):
        limits = {"success_rate": limit, "psnr": 20.0}
        options = {**QUICK, "attacks": ["labels"], "output": tmp_path / str(limit)}
        report = audit(Small(), Data(), Client(), fail_above=limits, **options)
        (problem,) = report.preflight
        assert problem.problem == "6 victims can't show that a limit is kept"
        assert said in problem.fix
    assert audit(Small(), Data(), Client(), fail_above={"psnr": 20.0}, **options).preflight == []


def test_what_the_budget_did_not_reach_is_inconclusive(tmp_path: Path) -> None:
    options = {**QUICK, "budget": 1e-3, "attacks": ["labels", "gauss_newton"]}
    report = audit(Small(), Data(), Client(), fail_above={"success_rate": 0.5}, output=tmp_path, **options)
    assert (report.verdict, report.exit_code) == ("inconclusive", 3)
    assert not any(one.done for one in report.plan)
    reasons = ["The budget ran out after one victim.", "The budget ran out before this attack."]
    assert [one.reason for one in report.plan] == reasons
    assert report.measured[0].victims == 1  # labels are read within the budget, too


def test_a_failed_check_ends_the_audit_with_what_was_found(tmp_path: Path) -> None:
    report = audit(Manual(), Data(), Client(), fail_above={"success_rate": 0.5}, output=tmp_path, **QUICK)
    assert (report.verdict, report.exit_code) == ("failed check", 2)
    assert report.measured == report.thresholds == []
    assert "manual optimization" in report.checks[0].finding
    wrong = Client(images=2, local_steps=2, learning_rate=0.5)
    report = audit(Small(), Data(), wrong, output=tmp_path / "rate", **QUICK)
    assert report.verdict == "failed check"
    assert not report.measured
    assert [(one.done, one.reason) for one in report.plan] == [(False, "A check failed, so nothing was attacked.")]


def test_clients_are_rows_and_training_goes_before(tmp_path: Path) -> None:
    module = Small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    clients = [Client(), Client(epochs=1), Client(images=2, reveal_labels=True)]
    report = audit(module, Data(), clients, output=tmp_path, **QUICK)
    assert [one["name"] for one in report.declared.clients] == [client.name for client in clients]
    assert {planned.client for planned in report.plan} == {client.name for client in clients[:2]}
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    rows = {row.client: row for row in read_victims(tmp_path) if row.victim == 0}
    assert rows["1 image"].mse != rows["1 image, after 1 epoch"].mse


def update_of(module: Small, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    trained = copy.deepcopy(module)
    optimizer = trained.configure_optimizers()
    trained.training_step(batch, 0).backward()
    optimizer.step()
    return dict(trained.state_dict())


def test_a_captured_update_is_attacked_where_it_fits(tmp_path: Path) -> None:
    module, other = Small(), Small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    image, label = Data().images[150]
    update = update_of(module, (image[None], torch.tensor([label])))
    client = Client(learning_rate=0.1)
    report = audit(module, Data(), client, update=update, output=tmp_path / "own", **QUICK)
    assert report.verdict == "no thresholds", report.checks
    (row,) = read_victims(tmp_path / "own")
    assert row.label_found == label
    assert (tmp_path / "own" / row.reconstruction).is_file()
    assert report.measured[1].metrics == {}

    foreign = update_of(other, (image[None], torch.tensor([label])))
    # As Flower sends them, without names.
    arrays, before = ([tensor.numpy() for tensor in state.values()] for state in (update, module.state_dict()))
    wrong: dict[str, tuple[dict[str, Any], Client, str]] = {
        "another model": ({"update": foreign}, client, "the arrays are in another order"),
        "another rate": (
            {"update": update},
            Client(learning_rate=0.01),
            "a learning rate that is 10 times the declared",
        ),
        "another order": (
            {"update": arrays[::-1], "before": before},
            client,
            "in another order: that of `state_dict()`",
        ),
    }
    for name, (given, declared, said) in wrong.items():
        report = audit(module, Data(), declared, output=tmp_path / name, **given, **QUICK)
        assert (report.verdict, report.exit_code) == ("failed check", 2), name
        assert any(said in check.finding for check in report.checks if not check.passed), report.checks
        assert report.measured == []
    with pytest.raises(ValueError, match="Expected one client with `update`, but got 2"):
        audit(module, Data(), [client, Client(images=2)], update=update, output=tmp_path / "two", **QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "0s"}, "Expected `budget` as seconds above 0, or as '90s', '10m' or '2h', but got '0s'"),
        ({"budget": "soon"}, "Expected `budget` as seconds above 0"),
        ({"victims": 0}, "Expected `victims` to be a whole number of at least 1"),
        ({"attacks": ["magic"]}, "Expected `attacks` to be one of"),
        ({"attacks": []}, "Expected `attacks` to name at least one attack"),
        ({"threat_model": "I"}, "Expected `threat_model` to be one of"),
        ({"seed": -1}, "Expected `seed` to be a whole number of at least 0"),
        ({"success_threshold": 0.0}, "Expected `success_threshold` to be positive"),
        ({"fail_above": {"leak": 0.5}}, "Expected `fail_above` to be one of"),
    ],
)
def test_refuses_bad_options_and_writes_nothing(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        audit(Small(), Data(), output=tmp_path / "audit", **options)
    assert not (tmp_path / "audit").exists()


def test_a_damaged_folder_is_refused(leaking: tuple[AuditReport, Path, Small], tmp_path: Path) -> None:
    plan = tmp_path / "runs" / "plan.json"
    plan.parent.mkdir()
    plan.write_text("{")
    with pytest.raises(ValueError, match="Expected `output` without another audit"):
        audit(Small(), Data(), Client(), output=tmp_path, **QUICK)
    assert json.loads((leaking[1] / "runs" / "plan.json").read_text())["plan"]


def test_budgets_are_times() -> None:
    assert [seconds_of(one) for one in ("90", "1.5m", "2h", 3)] == [90, 90, 7200, 3]
