"""`tradeoff.py` of defenses: its rows, pictures, resuming and refusals, and training under a defense."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from leakage import Victim
from leakage.datamodules import LabelledImages
from leakage.defenses import Clip, Sign, TopK, size_sent
from leakage.models import ConvNet, LeNet, draw_state

FEW = ["--dataset", "sample", "--victims", "2", "--others", "40", "--attacks", "idlg", "--accelerator", "cpu"]
COLUMNS = {
    "defense", "strength", "attack", "adaptive", "network", "epochs", "images", "victims", "psnr_mean", "psnr_ci",
    "mse_median", "success_rate", "success_ci", "success_threshold", "identified", "identified_ci", "others",
    "baseline", "label_accuracy", "test_accuracy", "test_accuracy_ci", "learning_rate", "bytes", "epsilon", "delta",
    "bound", "seconds_per_victim", "psnr_encoded",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tradeoff: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("tradeoff")
    asked = ["--defenses", "none", "clip", "--iterations", "60", "--rounds", "2", "--seeds", "2"]
    tradeoff.main([*FEW, *asked, "--output", str(output)])
    return output, json.loads((output / "summary.json").read_text())


@pytest.mark.slow
def test_a_row_for_each_strength_and_attacker(done: tuple[Path, list[dict[str, Any]]]) -> None:
    _, rows = done
    told = [(row["defense"], row["strength"], row["adaptive"]) for row in rows]
    strengths = [("clip", strength, adaptive) for strength in (0.1, 1.0, 10.0) for adaptive in (False, True)]
    assert told == [("none", 0.0, False), *strengths]
    size = 4 * sum(parameter.numel() for parameter in LeNet().parameters())
    for row in rows:
        assert row.keys() == COLUMNS
        assert (row["victims"], row["label_accuracy"], row["bytes"], row["bound"]) == (2, 1.0, size, None)
        assert 0 <= row["test_accuracy"] <= 1
        low, high = row["psnr_ci"]
        assert low < row["psnr_mean"] < high
    # Whether the defense is known decides, not how strong it is.
    for row in rows:
        assert (row["psnr_mean"] > 30) == (row["adaptive"] or row["defense"] == "none")
        assert row["success_rate"] == (1.0 if row["psnr_mean"] > 30 else 0.0)
    baselines = {row["baseline"] for row in rows}
    assert len(baselines) == 1
    assert 8 < baselines.pop() < 25


@pytest.mark.slow
def test_pictures_and_table(
    done: tuple[Path, list[dict[str, Any]]], tradeoff: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    output, rows = done
    assert all((output / name).stat().st_size > 10_000 for name in ("attackers.png", "tradeoff.png"))
    table = tradeoff.format_table([tradeoff.TradeoffRow(**row) for row in rows])
    assert len(table.splitlines()) == 1 + len(rows) + 2
    starred = [" *" in line for line in table.splitlines()[1 : 1 + len(rows)]]
    assert starred == [row["psnr_mean"] <= row["baseline"] for row in rows]
    _, _, plain, *clipped = (output / "table.md").read_text().splitlines()
    assert plain.startswith(f"| nothing | {rows[0]['psnr_mean']:.1f} dB | 100 % [34, 100] |  | [")
    assert len(clipped) == 3
    assert all(line.count("** | [") == 1 and "100 % [34, 100]" in line for line in clipped), "only the adaptive one"
    assert all(f"| {100 * row['test_accuracy']:.1f} % [" in line for row, line in zip(rows[1::2], clipped, strict=True))


@pytest.mark.slow
def test_it_goes_on_with_more_defenses_and_keeps_what_is_known(
    done: tuple[Path, list[dict[str, Any]]], tradeoff: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    output, rows = done
    asked = ["--defenses", "none", "clip", "dp_sgd", "--iterations", "60", "--output", str(output)]
    with pytest.raises(SystemExit):
        tradeoff.main([*FEW, *asked])
    assert "a folder without results, but got" in capsys.readouterr().err
    more = [
        *FEW,
        "--defenses",
        "dp_sgd",
        "--strengths",
        "2.0",
        "--iterations",
        "5",
        "--output",
        str(output),
        "--resume",
    ]
    tradeoff.main(more)
    found = json.loads((output / "summary.json").read_text())
    assert [(row["defense"], row["adaptive"]) for row in found] == [("dp_sgd", False), ("dp_sgd", True)]
    for row in found:
        assert row["test_accuracy"] is None
        assert 0 < row["epsilon"] < 5
        assert 1 / 41 < row["bound"] < 0.2
        assert row["identified_ci"][0] < row["bound"], "an attack that beats a bound is a fault"
    tradeoff.main([*FEW, "--defenses", "none", "--iterations", "60", "--output", str(output), "--resume"])
    (again,) = json.loads((output / "summary.json").read_text())
    assert again["psnr_mean"] == rows[0]["psnr_mean"]
    with pytest.raises(SystemExit):
        tradeoff.main([*FEW, "--network", "convnet", "--defenses", "none", "--output", str(output), "--resume"])
    assert "network=convnet instead of lenet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--defenses", "clip", "sign", "--strengths", "1"], "`--strengths` with a single defense"),
        (["--defenses", "clip", "--strengths", "-1"], "`norm` to be positive and finite"),
        (["--defenses", "soteria", "--strengths", "1.5"], "`share` to be above 0 and below 1, but got 1.5"),
        (["--others", "100000"], "`--others` of at most"),
        (["--delta", "2"], "`delta` to be above 0 and below 1"),
        (["--seeds", "0"], "`seeds` to be a whole number of at least 1"),
        (["--network", "resnet18", "--dataset", "nothing"], "nothing"),
    ],
)
def test_refusals(
    tradeoff: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        tradeoff.main([*FEW, *asked, "--output", str(tmp_path / "new")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new" / "summary.json").exists()


# Training under a defense.


def network() -> ConvNet:
    model = ConvNet(width=16)
    model.load_state_dict(draw_state(model, 3))
    return model


def data() -> LabelledImages:
    found = LabelledImages("sample")
    found.prepare_data()
    found.setup("fit")
    return found


def test_every_attack_is_made_with_its_evaluations(tradeoff: ModuleType, tmp_path: Path) -> None:
    asked = ["--dataset", "sample", "--victims", "1", "--others", "9", "--defenses", "none", "--iterations", "7"]
    given = tradeoff._parser().parse_args([*asked, "--attacks", *tradeoff.ATTACKS, "--output", str(tmp_path)])
    run = tradeoff.Tradeoff(given)
    for name, kind in tradeoff.ATTACKS.items():
        attack = run._attack(name, adaptive=False)
        assert isinstance(attack, kind)
        assert "7" in repr(attack.solver)


def test_a_round_moves_the_network_by_the_mean_of_what_clients_share(tradeoff: ModuleType) -> None:
    training, images = tradeoff.sys.modules["defended_training"], data()
    federation = training.Federation(rounds=1, clients=3, images=2, learning_rate=0.1, momentum=0.0)
    for defenses in ([], [Clip(0.1), TopK(0.5)], [Sign()]):
        module = training.FederatedSGD(network(), defenses, images, federation, seed=5)
        trainer = training.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        rounds = training.Rounds(images, federation, 7)
        trainer.fit(module, training.DataLoader(rounds, batch_size=None))
        ((batch, labels),) = list(rounds)
        assert batch.shape == (3, 2, 1, 28, 28)
        victim = Victim(network(), image_shape=(1, 28, 28), num_images=2, defenses=defenses)
        shared = victim.share(batch, labels).gradients
        for name, start in network().named_parameters():
            # The rate is a tenth in the last quarter, which the only round is not in.
            expected = start - 0.1 * shared[name].mean(0)
            torch.testing.assert_close(dict(module.model.named_parameters())[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_accuracy_comes_with_rounds_and_is_decided_by_the_seed(tradeoff: ModuleType) -> None:
    training, images, model = tradeoff.sys.modules["defended_training"], data(), network()
    long, again, short = (
        training.accuracy_under(model, [], images, training.Federation(rounds), seed=1) for rounds in (40, 40, 1)
    )
    assert long == again
    assert long > short + 0.2
    silent = training.accuracy_under(model, [Clip(1e-9)], images, training.Federation(40), seed=1)
    assert silent < short + 0.1, "steps of nothing"


def test_sizes_of_the_strengths(tradeoff: ModuleType) -> None:
    gradients = dict(LeNet().named_parameters())
    for name, kind in tradeoff.DEFENSES.items():
        sizes = [size_sent(kind.make(strength), gradients).bytes for strength in kind.strengths]
        assert sizes == sorted(sizes, reverse=True), name
        assert math.isfinite(sum(kind.strengths))


@pytest.mark.slow
def test_networks_that_draw_meet_both_attackers_and_are_trained(tradeoff: ModuleType, tmp_path: Path) -> None:
    asked = ["--defenses", "precode", "--strengths", "0.25", "--iterations", "2", "--rounds", "1", "--seeds", "1"]
    tradeoff.main([*FEW, *asked, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["adaptive"] for row in rows] == [False, True]
    assert rows[0]["psnr_mean"] != rows[1]["psnr_mean"]
    assert rows[0]["bytes"] > 4 * sum(parameter.numel() for parameter in LeNet().parameters())
    assert all(row["test_accuracy"] is not None for row in rows)


def test_networks_that_draw_are_the_same_at_every_call(tradeoff: ModuleType) -> None:
    model = network()
    for name, strength in (("precode", 0.25), ("dropout", 0.5)):
        cell = tradeoff.Cell(name, strength, [])
        before = torch.get_rng_state()
        first, second = (cell.network(model).state_dict() for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(first[key], second[key]) for key in second)
        assert Victim(cell.network(LeNet()), image_shape=(1, 28, 28)).draws


@pytest.mark.slow
def test_clients_that_aggregate_are_one_of_more_images(tradeoff: ModuleType, tmp_path: Path) -> None:
    asked = ["--defenses", "none", "aggregation", "--iterations", "2", "--rounds", "1", "--seeds", "1"]
    tradeoff.main([*FEW, *asked, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "summary.json").read_text())
    told = [(row["defense"], row["strength"], row["images"], row["test_accuracy"] is None) for row in rows]
    more = [("aggregation", clients, clients, True) for clients in (2, 4, 8)]
    assert told == [("none", 0.0, 1, False), *more]
    assert len({row["bytes"] for row in rows}) == 1
    assert len({row["baseline"] for row in rows}) == 4  # each of the images that it is about


@pytest.mark.slow
def test_images_that_clients_change_are_found_as_they_were_changed(tradeoff: ModuleType, tmp_path: Path) -> None:
    asked = ["--defenses", "ats", "--strengths", "1", "--attackers", "adaptive", "--iterations", "60"]
    tradeoff.main([*FEW, *asked, "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert row["psnr_mean"] < 15 < 25 < row["psnr_encoded"]


@pytest.mark.slow
def test_one_run_counts_for_both_attackers_where_knowledge_changes_nothing(
    tradeoff: ModuleType, tmp_path: Path
) -> None:
    def rows(folder: str, *asked: str) -> Any:
        given = [*FEW, "--strengths", "0.1", "--iterations", "5", "--output", str(tmp_path / folder), *asked]
        tradeoff.main(given)
        return json.loads((tmp_path / folder / "summary.json").read_text())

    naive, adaptive = rows("both", "--defenses", "gaussian_noise")
    assert naive | {"adaptive": True} == adaptive
    (alone,) = rows("alone", "--defenses", "gaussian_noise", "--attackers", "adaptive")
    assert alone["psnr_mean"] == naive["psnr_mean"]
    naive, adaptive = rows("clipped", "--defenses", "dp_sgd")
    assert naive["psnr_mean"] != adaptive["psnr_mean"]


def test_what_has_not_been_run_is_said_in_the_page(tradeoff: ModuleType) -> None:
    rows = [row_of(tradeoff, "clip", 10.0, known, 20.0 - 30 * (not known)) for known in (0, 1)]
    rows += [row_of(tradeoff, "soteria", 0.8, True, 12.0, accuracy=None)]
    clip, soteria = tradeoff.format_page(rows).splitlines()[2:]
    assert clip.startswith("| clipping, norm 0.1 | below 0 dB * | 0 % [0, 0] | 20.0 dB | [0.0, 0.0] |")
    assert soteria.startswith("| Soteria, 80 % of the features |  |  | 12.0 dB * |")
    assert soteria.endswith("| 1 | not run |")
    rows[1].success_rate = 0.95
    assert "| **20.0 dB** |" in tradeoff.format_page(rows)


def test_a_panel_for_each_defense_and_the_names_of_its_ends(tradeoff: ModuleType) -> None:
    rows = [row_of(tradeoff, "none", 0.0, False, 50.0)]
    rows += [row_of(tradeoff, "clip", strength, known, 50.0 * known) for strength in (0.1, 1, 10) for known in (0, 1)]
    rows += [row_of(tradeoff, "top_k", 0.9, known, 20.0 * known, baseline=9.0) for known in (0, 1)]
    rows += [row_of(tradeoff, "soteria", 0.8, True, 20.0, accuracy=None)]
    panels = [axes for axes in tradeoff.plot_tradeoff(rows, "title").axes if axes.axison]
    assert [axes.get_title() for axes in panels] == ["clipping", "top-k"]
    assert [sorted(text.get_text() for text in axes.texts) for axes in panels] == [
        ["norm 0.1", "norm 10"],
        ["90 % left out"],
    ]
    shaded = [axes.patches[0].get_y() + axes.patches[0].get_height() for axes in panels]
    assert shaded == [pytest.approx(16.0), pytest.approx(9.0)]
    naive, adaptive, _ = panels[0].lines
    assert (naive.get_linestyle(), adaptive.get_linestyle()) == ("--", "-")
    assert (max(naive.get_ydata()), min(adaptive.get_ydata())) == (0.0, 50.0)
    assert "9.0 to 16.0 dB" in tradeoff.format_table(rows)


def row_of(
    tradeoff: ModuleType, name: str, strength: float, known: bool, psnr: float, baseline: float = 16.0,
    accuracy: float | None = 0.7,
) -> Any:  # fmt: skip
    fields = dict.fromkeys(COLUMNS, 0.0)
    pairs: dict[str, Any] = dict.fromkeys(("psnr_ci", "success_ci", "identified_ci", "test_accuracy_ci"), (0.0, 0.0))
    given = {
        "defense": name,
        "attack": "idlg",
        "strength": strength,
        "adaptive": bool(known),
        "psnr_mean": psnr,
        "baseline": baseline,
    }
    return tradeoff.TradeoffRow(**{**fields, **pairs, **given, "bytes": 1, "test_accuracy": accuracy})


def test_soteria_prunes_the_last_layer_whatever_its_name(tradeoff: ModuleType) -> None:
    cell = tradeoff.Cell("soteria", 0.8, tradeoff.DEFENSES["soteria"].make(0.8))
    model = torch.nn.Sequential(torch.nn.Identity(), LeNet())
    (soteria,) = cell.on(model)
    assert (soteria.share, soteria.layer) == (0.8, "1.classifier")
    victim = Victim(model, image_shape=(1, 28, 28), defenses=[soteria])
    images = torch.rand(1, 1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    pruned = (victim.share(images, torch.tensor([[3]])).gradients["1.classifier.weight"][0] == 0).all(0)
    assert pruned.double().mean() == pytest.approx(0.8, abs=0.01)


def test_refuses_half_a_client(tradeoff: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for strength in ("1.5", "0"):
        asked = ["--defenses", "aggregation", "--strengths", strength, "--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit):
            tradeoff.main([*FEW, *asked])
        assert f"to be numbers of clients, but got {strength}" in capsys.readouterr().err
