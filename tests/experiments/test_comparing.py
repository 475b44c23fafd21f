from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import _read_row, compare  # in experiments/comparison, which conftest.py has put on the path
from lightning import Trainer
from records import holds_results

from leakage import LeNet, Victim
from leakage.attacks import DLGAttack, IDLGAttack
from leakage.comparison import FILES, Row, format_table
from leakage.datamodules import SharedGradients, Victims
from leakage.defenses import Defense
from leakage.files.text import write_json

COLUMNS = [
    "method",
    "dataset",
    "protocol",
    "victims",
    "uninformative",
    "label_accuracy",
    "label_accuracy_ci",
    "success_rate",
    "success_rate_ci",
    "success_threshold",
    "mse_median",
    "psnr_mean",
    "ssim_mean",
    "evaluations_per_victim",
    "seconds",
    "published_label_accuracy",
]
ROW = Row("idlg", "mnist", "robust", 4, 0, 1.0, (0.5, 1.0), 0.75, (0.3, 0.95), 1e-3, 1e-6, 50.0, 0.99, 180.0, 3.0, 1.0)


def attacks(**options: Any) -> dict[str, Any]:
    options = {"max_evaluations": 30, "restarts": 0} | options
    return {"dlg": DLGAttack(**options), "idlg": IDLGAttack(**options)}


def run(output: Path, *, methods: Any = None, victims: Any = None, **options: Any) -> list[Row]:
    return compare(
        attacks() if methods is None else methods,
        Victims("sample", victims=4, lanes=3) if victims is None else victims,
        output,
        dataset="sample",
        accelerator="cpu",
        enable_progress_bar=False,
        **options,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_writes_a_row_per_method_and_a_line_per_victim(done: Path) -> None:
    assert all((done / name).stat().st_size > 0 for name in FILES)
    summary = json.loads((done / "summary.json").read_text())
    assert [list(row) for row in summary] == [COLUMNS, COLUMNS]
    assert [row["method"] for row in summary] == ["dlg", "idlg"]
    victims = rows_of(done / "victims.csv")
    assert [(row["method"], row["victim"]) for row in victims] == [
        (method, str(victim)) for method in ("dlg", "idlg") for victim in range(4)
    ]
    for row in summary:
        of_method = [line for line in victims if line["method"] == row["method"]]
        assert row["victims"] == 4
        for share, column in (("label_accuracy", "label_accuracy"), ("success_rate", "success")):
            assert row[share] == pytest.approx(sum(float(line[column]) for line in of_method) / 4)
            low, high = row[f"{share}_ci"]
            assert 0 <= low <= row[share] <= high <= 1
            assert low < high
        assert row["psnr_mean"] == pytest.approx(sum(float(line["psnr"]) for line in of_method) / 4, rel=1e-6)
        mses = sorted(float(line["mse"]) for line in of_method)
        assert row["mse_median"] == pytest.approx((mses[1] + mses[2]) / 2, rel=1e-6)
        assert row["evaluations_per_victim"] == sum(int(line["evaluations"]) for line in of_method) / 4
        assert row["seconds"] > 0
    assert summary[1]["label_accuracy"] == 1.0
    assert not list(done.glob("*/last.ckpt"))


def break_off(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """As a kill does: nothing is written after it."""
    step = IDLGAttack.training_step

    def stop(self: IDLGAttack, batch: Any, batch_idx: int) -> None:
        if self.iteration == at:
            raise SystemError("killed")
        step(self, batch, batch_idx)

    monkeypatch.setattr(IDLGAttack, "training_step", stop)


@pytest.mark.parametrize("at", [10, 47])
def test_resumed_is_as_never_stopped(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    with monkeypatch.context() as patch:
        break_off(patch, at)
        with pytest.raises(SystemError, match="killed"):
            run(tmp_path, checkpoint_seconds=1e-9 if at > 20 else 60.0)
    assert holds_results(tmp_path)
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "idlg" / "last.ckpt").exists() == (at > 20)
    ran: list[str] = []
    fit = Trainer.fit

    def count(self: Any, attack: Any, **options: Any) -> None:
        ran.append(type(attack).__name__ + (" resumed" if options["ckpt_path"] else ""))
        fit(self, attack, **options)

    monkeypatch.setattr(Trainer, "fit", count)
    run(tmp_path, resume=True)
    assert ran == ["IDLGAttack resumed" if at > 20 else "IDLGAttack"], "DLG was done"
    whole, resumed = (json.loads((folder / "summary.json").read_text()) for folder in (done, tmp_path))
    for row in (*whole, *resumed):
        assert row.pop("seconds") > 0
    assert resumed == whole
    assert (tmp_path / "victims.csv").read_bytes() == (done / "victims.csv").read_bytes()
    assert (tmp_path / "gallery.png").read_bytes() == (done / "gallery.png").read_bytes()


def test_resuming_what_is_finished_runs_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (done / name).read_bytes() for name in FILES}
    monkeypatch.setattr(Trainer, "fit", None)
    run(done, resume=True)
    assert {name: (done / name).read_bytes() for name in FILES} == before


def test_resume_begins_where_there_is_nothing(tmp_path: Path) -> None:
    (row,) = run(tmp_path, methods={"idlg": attacks()["idlg"]}, resume=True)
    assert row.label_accuracy == 1.0


def test_resume_refuses_another_configuration(done: Path) -> None:
    with pytest.raises(ValueError, match=r"one that differs in `attack.max_evaluations`: 30 there, 31 here"):
        run(done, methods=attacks(max_evaluations=31), resume=True)
    with pytest.raises(ValueError, match=r"`data.victims`: 4 there, 5 here"):
        run(done, victims=Victims("sample", victims=5, lanes=3), resume=True)
    with pytest.raises(ValueError, match=r"`attack.class`: 'IDLGAttack' there, 'DLGAttack' here"):
        run(done, methods={"idlg": attacks()["dlg"]}, resume=True)
    with pytest.raises(ValueError, match=r"`precision`: None there, '64-true' here"):
        run(done, precision="64-true", resume=True)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "idlg/run.json",
            '{"configuration": {',
            r"Expected '.*run.json' to be the whole record of a run, but got invalid JSON",
        ),
        ("idlg/run.json", "[]", r"Expected '.*run.json' to be the whole record of a run, but got another file"),
        (
            "idlg/victims.csv",
            "victim,mse\n0,0.5\n",
            r"Expected '.*victims.csv' to be the whole table of 4 victims, but",
        ),
        ("idlg/victims.csv", None, r"Expected '.*victims.csv' to be the whole table .* but got no such file"),
        ("idlg/reconstructions/part_0000.safetensors", None, "to hold the reconstructions of all victims, but got 0"),
    ],
)
def test_resume_refuses_damaged_results(
    done: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    shutil.copytree(done, tmp_path / "copy")
    damaged = tmp_path / "copy" / file
    damaged.unlink() if content is None else damaged.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "copy", resume=True)


def test_resume_refuses_a_row_of_other_columns(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "copy")
    record = tmp_path / "copy" / "idlg" / "run.json"
    content = json.loads(record.read_text())
    del content["row"]["victims"]
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"Expected '.*run.json' .* but got a row with other columns. Remove"):
        run(tmp_path / "copy", resume=True)


def test_refuses_options_of_the_trainer_before_it_touches_results(done: Path) -> None:
    before = {name: (done / name).read_bytes() for name in FILES}
    with pytest.raises(ValueError, match=r"Expected options that the Trainer accepts, but got .*max_steps=-5"):
        run(done, max_steps=-5)
    assert {name: (done / name).read_bytes() for name in FILES} == before


def test_the_victims_of_all_methods_are_written_whole_or_not_at_all(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done, tmp_path / "copy")
    before = (tmp_path / "copy" / "victims.csv").read_bytes()

    def full(self: Path, text: str, **options: Any) -> None:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"Expected to write '.*victims.csv', but got: .*No space left"):
        run(tmp_path / "copy", resume=True)
    assert (tmp_path / "copy" / "victims.csv").read_bytes() == before


def test_without_resume_replaces_an_earlier_comparison(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    method = {"idlg": attacks()["idlg"]}
    run(tmp_path, methods=method, victims=Victims("sample", victims=3, lanes=1))
    run(tmp_path, methods=method, victims=Victims("sample", victims=2))
    assert len(rows_of(tmp_path / "victims.csv")) == 2
    assert len(list((tmp_path / "idlg" / "reconstructions").iterdir())) == 1
    assert not [warning for warning in recwarn if "earlier run" in str(warning.message)]


def test_several_images_per_victim(tmp_path: Path) -> None:
    (row,) = run(
        tmp_path, methods={"dlg": attacks(max_evaluations=5)["dlg"]}, victims=Victims("sample", victims=2, images=2)
    )
    assert row.victims == 2
    assert (tmp_path / "gallery.png").stat().st_size > 0


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    row = replace(ROW, mse_median=float("inf"), psnr_mean=float("nan"), published_label_accuracy=None)
    write_json(path, {"configuration": {}, "row": vars(row)})
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert json.loads(path.read_text())["row"]["psnr_mean"] is None
    again = _read_row(tmp_path, {})
    assert again is not None
    assert again.label_accuracy_ci == row.label_accuracy_ci
    assert again.published_label_accuracy is None
    line = format_table([again]).splitlines()[1]
    assert "nan" not in line
    assert line.split()[-5:] == ["-", "-", "180", "3", "s"]


def test_table_has_the_papers_figure_beside_ours() -> None:
    header, line = format_table([ROW]).splitlines()
    assert "published" in header
    assert line.startswith("iDLG")
    assert "100.0 % [50.0, 100.0]  100.0 %" in line
    assert "75.0 % [30.0, 95.0]" in line
    assert "published" not in format_table([replace(ROW, published_label_accuracy=None)])


class SilentForSome(Defense):
    def __call__(self, gradients: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        speaks = torch.rand((), generator=generator) < 0.5
        return {name: speaks * tensor for name, tensor in gradients.items()}


@pytest.mark.filterwarnings("ignore:The clients defend")
def test_victims_whose_gradient_says_nothing_are_counted(tmp_path: Path) -> None:
    victims = Victims("sample", victims=6, model=LeNet(), defenses=[SilentForSome()])
    methods = {
        "idlg": IDLGAttack(max_evaluations=5, restarts=0),
        "own": IDLGAttack(max_evaluations=5, distance="cosine"),
    }
    rows = run(tmp_path, methods=methods, victims=victims)
    silent = [line for line in rows_of(tmp_path / "idlg" / "victims.csv") if line["status"] == "uninformative"]
    assert 0 < len(silent) < 6
    assert [row.uninformative for row in rows] == [len(silent)] * 2
    assert [row["uninformative"] for row in json.loads((tmp_path / "summary.json").read_text())] == [len(silent)] * 2
    assert run(tmp_path, methods=methods, victims=victims, resume=True) == rows
    told = f"Victims with an uninformative gradient, which were not searched for: iDLG {len(silent)}, own {len(silent)}"
    assert format_table(rows).splitlines()[-1] == told


def test_refuses_no_attacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected `attacks` to name at least one attack, but got none"):
        run(tmp_path, methods={})


def test_refuses_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Expected `output` to be a folder that can be written, but got '.*file'"):
        run(tmp_path / "file")


def test_refuses_victims_without_ground_truth(tmp_path: Path) -> None:
    victim = Victim(LeNet(), image_shape=(1, 28, 28))
    victim.share(torch.rand(2, 1, 1, 28, 28), torch.tensor([[1], [2]])).save(tmp_path / "a.safetensors")
    victims = SharedGradients(tmp_path / "a.safetensors", LeNet())
    with pytest.raises(ValueError, match=r"Expected `victims` with a ground truth .* got SharedGradients"):
        run(tmp_path / "out", victims=victims)


def test_victims_for_each_attack(tmp_path: Path) -> None:
    """The same victims, who tell one of the attacks their labels."""
    both = {
        "told": Victims("sample", victims=3, images=2, reveal_labels=True),
        "read": Victims("sample", victims=3, images=2),
    }
    attacks = {name: IDLGAttack(max_evaluations=5, restarts=0, rule="row_minimum") for name in both}
    run(tmp_path, methods=attacks, victims=both)
    labels = {
        name: [row["labels_recovered"] for row in rows_of(tmp_path / name / "victims.csv")] for name in ("told", "read")
    }
    truth = [row["labels_true"] for row in rows_of(tmp_path / "told" / "victims.csv")]
    assert labels["told"] == truth
    for name, revealed in (("told", True), ("read", False)):
        configuration = json.loads((tmp_path / name / "run.json").read_text())["configuration"]
        assert configuration["data"]["reveal_labels"] is revealed
    with pytest.raises(ValueError, match=r"Expected `victims` for the attacks \['told', 'read'\], but got \['told'\]"):
        run(tmp_path, methods=attacks, victims={"told": both["told"]})
    with pytest.raises(ValueError, match="Expected the same `victims` for every attack, but got 3 for 'told', 2 for"):
        run(tmp_path, methods=attacks, victims=both | {"read": Victims("sample", victims=2)})
    for others in (Victims("sample", victims=3, images=2, seed=1), Victims("sample", victims=3)):
        with pytest.raises(ValueError, match="Expected the same `victims` for every attack, but got others"):
            run(tmp_path, methods=attacks, victims=both | {"read": others})
