from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.training import trained_network
from leakage.clients.victim import Victim
from leakage.datamodules import LabelledImages
from leakage.labels import infer_labels
from leakage.metrics import LabelMetrics, mean_interval, score_labels
from leakage.models import MLP, NETWORKS, ConvNet
from leakage.seeds import derive_seed

from .conftest import EXPERIMENTS, load

COLUMNS = [
    "rule", "dataset", "network", "activation", "epochs", "batch_size", "distribution", "victims", "irec", "irec_ci",
    "leacc", "lnacc", "exact", "trivial_irec", "trivial_leacc", "seconds",
]  # fmt: skip
QUICK = ["--rules", "ilrg", "--auxiliary-images", "0"]


@pytest.fixture(scope="module")
def restoration() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "labels")  # as for a script that is run
        yield load("labels/restoration.py")
        for name in ("clients", "options", "results"):
            sys.modules.pop(f"restoration_{name}", None)


def small_mlp(
    channels: int, image_size: tuple[int, int], num_classes: int, *, width: int = 8, activation: str = "relu"
) -> MLP:
    return MLP(channels, image_size, num_classes, width=width, activation=activation)


def small_convnet(channels: int, image_size: tuple[int, int], num_classes: int, *, norm: str = "instance") -> ConvNet:
    return ConvNet(channels, image_size, num_classes, width=4, norm=norm)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "mlp", small_mlp)
    monkeypatch.setitem(NETWORKS, "convnet", small_convnet)


def run(restoration: ModuleType, output: Path, *options: str) -> list[dict[str, Any]]:
    given = ["--dataset", "sample", "--network", "mlp", "--batch-sizes", "4", "--victims", "6", "--output", str(output)]
    restoration.main([*given, *options])
    rows: list[dict[str, Any]] = json.loads((output / "summary.json").read_text())
    return rows


def refused(restoration: ModuleType, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        run(restoration, Path("out"), *options)
    if isinstance(end.value.code, str):
        return end.value.code
    assert end.value.code == 2
    return capsys.readouterr().err


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture
def shares(restoration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What clients are given, and what is left of it for the rules."""
    seen: list[dict[str, Any]] = []
    real = Victim.share

    def share(self: Victim, images: Any, labels: Any, **options: Any) -> SharedGradient:
        shared = real(self, images, labels, **options)
        seen.append({"victim": self, "images": images, "labels": labels, "shared": shared, **options})
        return shared

    monkeypatch.setattr(Victim, "share", share)
    return seen


def test_rows_table_and_picture(restoration: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(restoration, tmp_path / "out", "--batch-sizes", "1", "4", "12", "--auxiliary-images", "100")
    assert all(list(row)[: len(COLUMNS)] == COLUMNS for row in rows)
    found = {(row["batch_size"], row["rule"]): row for row in rows}
    assert {rule for size, rule in found if size == 1} == {*restoration.RULES, "auto"} - {"rlu", "posterior"}
    assert {rule for size, rule in found if size == 12} == {
        *("llg", "llg_star", "ilrg", "geng", "mean_feature", "llg_plus", "auto")
    }
    assert found[1, "auto"]["chosen"] == "idlg"
    assert found[4, "auto"]["chosen"] == "mean_feature"
    assert found[4, "llg"]["chosen"] is None
    for (size, rule), row in found.items():
        if rule != "auto":
            assert row["best_other"] is row["behind_best"] is row["behind_best_ci"] is None
            continue
        others = [other for (at, name), other in found.items() if at == size and name != "auto"]
        best = max(others, key=lambda other: other["irec"])
        assert row["best_other"] == best["rule"]
        assert row["behind_best"] == pytest.approx(best["irec"] - row["irec"], abs=1e-6)
        assert row["behind_best_ci"][0] <= row["behind_best"] <= row["behind_best_ci"][1]
    assert found[1, "idlg"]["irec"] == 1.0
    assert found[1, "idlg"]["trivial_irec"] == pytest.approx(0.1)
    assert found[4, "auto"]["irec"] > found[4, "auto"]["trivial_irec"]
    for row in rows:
        assert (row["dataset"], row["network"], row["activation"]) == ("sample", "mlp", "relu")
        assert (row["epochs"], row["victims"], row["distribution"]) == (0, 6, "uniform")
        assert (row["auxiliary_images"], row["auxiliary_labels"], row["seen"]) == (100, True, None)
        assert row["irec_ci"][0] <= row["irec"] <= row["irec_ci"][1]
    lines = capsys.readouterr().out.splitlines()
    told = [line[line.index("No ") :] for line in lines if "No " in line]
    assert [line.split()[1] for line in told] == ["rlu", "posterior", "idlg", "row_minimum", "rlg"], "each once"
    assert told[2] == "No idlg for batch size 4: Expected one image per gradient, but got 4."
    assert any(line.startswith("12          auto (mean_feature)") for line in lines)
    assert any(line.startswith("12          trivial guess") for line in lines)
    for name in ("summary.json", "restoration.png"):
        assert str(tmp_path / "out" / name) in lines
        assert (tmp_path / "out" / name).is_file()


def test_victims_one_by_one(restoration: ModuleType, tmp_path: Path, shares: list[dict[str, Any]]) -> None:
    """Each untrained victim has a network of its own; what is found is that of the library's parts."""
    (ilrg, _) = run(restoration, tmp_path / "out", *QUICK, "--seed", "3")
    assert sum(len(call["images"]) for call in shares) == 6
    metrics = LabelMetrics()
    for call in shares:
        victim = call["victim"]
        assert victim.trainable == ["1.classifier.weight", "1.classifier.bias"]
        weights = victim.fresh_states([derive_seed(3, index, "network") for index in range(6)])
        assert all(torch.equal(call["states"][name], weights[name]) for name in weights)
        found = infer_labels(call["shared"], victim, rule="ilrg", seed=3)
        metrics.update(score_labels(found.counts, call["labels"], present=found.present))
    assert ilrg["irec"] == pytest.approx(metrics.compute()["irec"].value)
    assert ilrg["exact_ci"] == pytest.approx(metrics.compute()["exact"][1:3])


def test_groups_change_nothing(
    restoration: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: list[dict[str, Any]]
) -> None:
    options = ["--rules", "ilrg", "mean_feature", "--auxiliary-images", "0", "--batch-sizes", "4", "8"]
    whole = run(restoration, tmp_path / "whole", *options)
    calls = len(shares)
    monkeypatch.setattr(restoration, "_NETWORKS_AT_ONCE", 4)
    monkeypatch.setattr("restoration_clients._IMAGES_AT_ONCE", 8)
    apart = run(restoration, tmp_path / "apart", *options)
    assert (calls, len(shares) - calls) == (2, 2 + 1 + 6)
    for one, other in zip(timeless(apart), timeless(whole), strict=True):
        assert one == {name: pytest.approx(value) for name, value in other.items()}


def test_resume_ends_as_without_a_break(
    restoration: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shares: list[dict[str, Any]],
) -> None:
    whole = run(restoration, tmp_path / "whole", *QUICK, "--batch-sizes", "2", "4", "6")
    inferred = restoration.infer_labels

    def stopped(shared: SharedGradient, victim: Victim, **options: Any) -> Any:
        if victim.protocol.num_images == 4:
            raise KeyboardInterrupt
        return inferred(shared, victim, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(restoration, "infer_labels", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(restoration, tmp_path / "out", *QUICK, "--batch-sizes", "2", "4")
    first = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {row["batch_size"] for row in first} == {2}, "written before the next cell"
    monkeypatch.setattr(restoration, "infer_labels", inferred)
    shares.clear()
    said = refused(restoration, capsys, *QUICK, "--batch-sizes", "2", "4")
    assert "Expected `--output` to be a folder without results" in said
    assert "Add --resume" in said
    resumed = run(restoration, tmp_path / "out", *QUICK, "--batch-sizes", "2", "4", "6", "--resume")
    assert [call["victim"].protocol.num_images for call in shares] == [4, 6]
    assert resumed[:2] == first
    assert timeless(resumed) == timeless(whole)

    same = [*QUICK, "--batch-sizes", "2", "--resume"]
    for options, differing in (
        (["--victims", "7"], "`victims`: 6 there, 7 here"),
        (["--seed", "1"], "`seed`: 0 there, 1 here"),
        (["--rules", "llg"], "`rules`: ['ilrg', 'auto'] there"),
        (["--activation", "silu"], "`network`: "),
        (["--classes", "5"], "`classes`: None there, 5 here"),
        (["--auxiliary-images", "50"], "`auxiliary`: "),
        (["--weights", "shared"], "`weights`: 'own' there, 'shared' here"),
    ):
        assert differing in refused(restoration, capsys, *same, *options)
    record = tmp_path / "out" / "epochs_0_uniform_steps_1_batch_2" / "run.json"
    saved = json.loads(record.read_text())
    del saved["row"]["rows"][0]["irec"]
    record.write_text(json.dumps(saved))
    assert "to be the complete record of a cell, but got other rows" in refused(restoration, capsys, *same)
    assert len(shares) == 2, "nothing more was run"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained networks, for all tests that ask for the same."""
    return tmp_path_factory.mktemp("networks")


@pytest.mark.parametrize("seen", [False, True])
def test_trained_networks(
    restoration: ModuleType,
    tmp_path: Path,
    cache: Path,
    shares: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    seen: bool,
) -> None:
    for name in ("_FEWEST", "_MOST"):  # clients that `auto` learns the posterior from
        monkeypatch.setattr(f"leakage.labels.posterior.{name}", 256)
    options = ["--epochs", "1", "0", "2", "--train-images", "300", "--networks", str(cache), "--rules", "ilrg", "rlu"]
    rows = run(restoration, tmp_path / "out", *options, "--batch-sizes", "20", *(["--seen"] if seen else []))
    assert [(row["epochs"], row["rule"]) for row in rows] == [
        (1, "ilrg"), (1, "rlu"), (1, "auto"), (0, "ilrg"), (0, "auto"), (2, "ilrg"), (2, "rlu"), (2, "auto")
    ]  # fmt: skip
    assert [row["seen"] for row in rows] == [seen] * 3 + [None] * 2 + [seen] * 3
    assert [row["weights"] for row in rows] == ["shared"] * 3 + ["own"] * 2 + ["shared"] * 3
    assert rows[3]["test_accuracy"] is None
    for name in ("restoration.png", "restoration_epochs.png"):
        assert (tmp_path / "out" / name).is_file()

    data = LabelledImages("sample")
    data.setup("fit")
    network = small_mlp(1, (28, 28), 10)
    trained = trained_network(network, data, epochs=1, num_images=300, root=cache, progress=False)
    assert rows[0]["test_accuracy"] == trained.accuracy
    used = data.train.images[trained.seen].float() / 255
    held = shares[0]["images"].flatten(0, 1)
    among = (held[:, None] == used[None]).flatten(2).all(2).any(1)
    assert bool(among.all() if seen else not among.any())
    state = shares[0]["shared"].state
    assert torch.equal(state["1.classifier.weight"], trained.model[1].classifier.weight)


def test_auxiliary_images_are_test_images(
    restoration: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: list[dict[str, Any]]
) -> None:
    seen: list[Any] = []
    inferred = restoration.infer_labels

    def watched(shared: SharedGradient, victim: Victim, **options: Any) -> Any:
        seen.append(options)
        return inferred(shared, victim, **options)

    monkeypatch.setattr(restoration, "infer_labels", watched)
    (_, row) = run(restoration, tmp_path / "out", "--rules", "llg_plus", "--auxiliary-images", "30")
    auxiliary = seen[0]["auxiliary"]
    data = LabelledImages("sample")
    data.setup("fit")
    equal = (auxiliary.images[:, None] == data.test.images[None] / 255).flatten(2).all(2)
    assert bool(equal.any(1).all())
    assert torch.equal(data.test.labels[equal.int().argmax(1)], auxiliary.labels)
    assert auxiliary.labels.bincount().tolist() == [3] * 10, "as many of each class"
    assert row["auxiliary_images"] == 30
    held = shares[0]["images"].flatten(0, 1)
    assert not (held[:, None] == auxiliary.images[None]).flatten(2).all(2).any(), "never the victims' own"

    (row,) = run(restoration, tmp_path / "none", "--rules", "auto", "--auxiliary-images", "30", "--unlabelled")
    assert seen[-1]["auxiliary"].labels is None
    assert row["auxiliary_labels"] is False


def test_classes_at_random(restoration: ModuleType, tmp_path: Path, shares: list[dict[str, Any]]) -> None:
    options = ["--classes", "40", "--rules", "ilrg", "llg_plus", "--batch-sizes", "20"]
    rows = run(restoration, tmp_path / "out", *options)
    assert {row["classes"] for row in rows} == {40}
    (call,) = shares
    assert call["victim"].protocol.num_classes == 40
    assert len(call["labels"].unique()) > 30
    assert rows[0]["leacc"] > 0.9


def test_distributions_and_weights(restoration: ModuleType, tmp_path: Path, shares: list[dict[str, Any]]) -> None:
    options = ["--distribution", "single-class", "dirichlet:0.1", "--weights", "shared"]
    rows = run(restoration, tmp_path / "out", *QUICK, *options)
    assert [row["distribution"] for row in rows] == ["single-class"] * 2 + ["dirichlet:0.1"] * 2
    assert {row["weights"] for row in rows} == {"shared"}
    assert all(call["states"] is None for call in shares)
    single, dirichlet = (call["labels"] for call in shares)
    assert all(len(labels.unique()) == 1 for labels in single)
    assert len({tuple(labels.tolist()) for labels in dirichlet}) > 1


def test_local_steps(restoration: ModuleType, tmp_path: Path, shares: list[dict[str, Any]]) -> None:
    options = ["--local-steps", "1", "4", "--local-learning-rate", "0.1", "--local-batch-size", "2"]
    rows = run(restoration, tmp_path / "out", *QUICK, *options)
    assert [(row["local_steps"], row["rule"]) for row in rows] == [(1, "ilrg"), (1, "auto"), (4, "ilrg"), (4, "auto")]
    one, four = (call["victim"] for call in shares)
    assert len(one.trainable) == 2
    assert len(four.trainable) == 6, "the whole network trains"
    protocol = four.protocol
    assert (protocol.local_steps, protocol.learning_rate, protocol.local_batch_size) == (4, 0.1, 2)
    found = infer_labels(shares[1]["shared"], four, rule="ilrg")
    scores = score_labels(found.counts, shares[1]["labels"])
    assert rows[2]["irec"] == pytest.approx(sum(score.irec for score in scores) / 6)
    assert (tmp_path / "out" / "restoration_steps.png").is_file()


@pytest.fixture
def given_to_rules(restoration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[SharedGradient]:
    seen: list[SharedGradient] = []
    inferred = restoration.infer_labels

    def watched(shared: SharedGradient, victim: Victim, **options: Any) -> Any:
        seen.append(shared)
        return inferred(shared, victim, **options)

    monkeypatch.setattr(restoration, "infer_labels", watched)
    return seen


@pytest.mark.parametrize("local", [{}, {"local_steps": 4, "learning_rate": 0.1, "local_batch_size": 2}])
def test_rules_get_what_the_whole_network_shares(
    restoration: ModuleType,
    tmp_path: Path,
    shares: list[dict[str, Any]],
    given_to_rules: list[SharedGradient],
    local: dict[str, Any],
) -> None:
    options = {"local_steps": "--local-steps", "learning_rate": "--local-learning-rate"}
    flags = [part for name, value in local.items() for part in (options.get(name, "--local-batch-size"), str(value))]
    run(restoration, tmp_path / "out", "--rules", "auto", "--auxiliary-images", "0", *flags)
    (call,) = [*shares]
    model = copy.deepcopy(call["victim"].model).requires_grad_(True)
    whole = Victim(model, image_shape=(1, 28, 28), num_images=4, **local)
    expected = whole.share(call["images"], call["labels"], states=call["states"])
    (shared,) = given_to_rules
    assert [*shared.gradients] == ["1.classifier.weight", "1.classifier.bias"]
    for name, gradient in shared.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name])


def test_lenet_as_torch_draws_it(restoration: ModuleType, tmp_path: Path, shares: list[dict[str, Any]]) -> None:
    options = ["--network", "lenet", "--activation", "silu", "--batch-sizes", "2"]
    rows = run(restoration, tmp_path / "torch", *QUICK, *options, "--init", "torch")
    run(restoration, tmp_path / "papers", *QUICK, *options)
    torchs, papers = (call["states"]["1.classifier.weight"] for call in shares)
    bound = 1 / torchs.shape[-1] ** 0.5
    assert 0.95 * bound < torchs.abs().max() <= bound
    assert 0.49 < papers.abs().max() <= 0.5
    assert len({weight.sum().item() for weight in torchs}) == 6, "each victim's own"
    assert {(row["init"], row["activation"]) for row in rows} == {("torch", "silu")}


def test_batch_norm_in_both_modes(restoration: ModuleType, tmp_path: Path, shares: list[dict[str, Any]]) -> None:
    options = ["--network", "convnet", "--norm", "batch", "--batch-sizes", "2", "--victims", "2"]
    (row, _) = run(restoration, tmp_path / "eval", *QUICK, *options)
    assert (row["norm"], row["mode"]) == ("batch", "eval")
    (row, _) = run(restoration, tmp_path / "train", *QUICK, *options, "--mode", "train")
    assert row["mode"] == "train"
    assert [call["victim"].model.training for call in shares] == [False, True]
    found = []
    for call in shares:  # one victim by hand, its images together
        model = copy.deepcopy(call["victim"].model)
        model.load_state_dict({name: tensor[0] for name, tensor in call["states"].items()}, strict=False)
        last = model[1].classifier.weight.requires_grad_(True)
        F.cross_entropy(model(call["images"][0]), call["labels"][0]).backward()
        torch.testing.assert_close(call["shared"].gradients["1.classifier.weight"][0], last.grad)
        found.append(last.grad)
    assert not torch.allclose(*found), "the modes differ"


def test_how_far_auto_is_behind(restoration: ModuleType) -> None:
    auto, best, poor = [0.5, 1.0, 0.75], [0.75, 1.0, 1.0], [1.0, 0.0, 0.0]
    differences = torch.tensor([0.25, 0.0, 0.25], dtype=torch.float64)
    found = restoration.behind_best({"ilrg": poor, "llg": best, "auto": auto})
    assert found == ("llg", pytest.approx(0.5 / 3), pytest.approx([*mean_interval(differences)]))
    assert restoration.behind_best({"llg": poor, "auto": best})[1] == pytest.approx(-1.75 / 3), "auto is ahead"
    assert restoration.behind_best({"llg": [0.5], "auto": [0.25]}) == ("llg", 0.25, None)
    assert restoration.behind_best({"auto": auto}) == (None, None, None)


@pytest.mark.parametrize("auxiliary", ["0", "30"])
def test_goes_on_with_results_of_before(restoration: ModuleType, tmp_path: Path, auxiliary: str) -> None:
    options = ["--rules", "ilrg", "--auxiliary-images", auxiliary]
    rows = run(restoration, tmp_path / "out", *options)
    record = tmp_path / "out" / "epochs_0_uniform_steps_1_batch_4" / "run.json"
    saved = json.loads(record.read_text())
    assert (saved["configuration"]["auxiliary"] is None) == (auxiliary == "0")
    later = ("auxiliary_labels", "best_other", "behind_best", "behind_best_ci")
    for row in saved["row"]["rows"]:
        for name in later:
            del row[name]
    record.write_text(json.dumps(saved))
    resumed = run(restoration, tmp_path / "out", *options, "--resume")
    assert resumed == [{**row, **dict.fromkeys(later)} for row in rows]


def row_of(results: ModuleType, **options: Any) -> Any:
    given = {
        "rule": "ilrg", "dataset": "sample", "network": "mlp", "activation": "relu", "epochs": 0, "batch_size": 4,
        "distribution": "uniform", "victims": 6, "irec": 0.9, "leacc": 0.8, "lnacc": 0.7, "exact": 0.6,
        "trivial_irec": 0.5, "trivial_leacc": 0.6, "seconds": 0.1, "trivial_lnacc": 0.6, "trivial_exact": 0.0,
        "chosen": None, "local_steps": 1, "weights": "own", "seen": None, "norm": "none", "mode": None,
        "classes": None, "init": "papers", "auxiliary_images": 0, "auxiliary_labels": False, "test_accuracy": None,
        **{f"{name}_ci": [0.5, 1.0] for name in ("irec", "leacc", "lnacc", "exact")},
    }  # fmt: skip
    return results.RestorationRow(**{**given, **options})


def test_pictures_have_a_panel_for_all_else(
    restoration: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = sys.modules["restoration_results"]
    drawn: list[dict[str, Any]] = []
    real = results.plot_recall

    def plot(panels: Any, **options: Any) -> Any:
        drawn.append({"panels": panels, **options})
        return real(panels, **options)

    monkeypatch.setattr(results, "plot_recall", plot)
    rows = [
        row_of(results, rule=rule, epochs=epochs, batch_size=size, irec=size / 100, trivial_irec=size / 200)
        for epochs in (0, 1, 20)
        for size in (1, 8, 24, 32, 64)
        for rule in ("ilrg", "auto")
    ]
    assert [path.name for path in results.draw_pictures(rows, tmp_path)] == [
        "restoration.png", "restoration_epochs.png"
    ]  # fmt: skip
    over_size, over_epochs = drawn
    assert list(over_size["panels"]) == ["untrained", "1 epoch", "20 epochs"]
    assert over_size["title"] == "bundled sample, MLP, ReLU"
    curve = over_size["panels"]["1 epoch"]["auto"]
    assert curve[:, 0].tolist() == [1, 8, 24, 32, 64]
    assert curve[1].tolist() == pytest.approx([8, 0.08, 0.5, 1.0])
    assert over_size["trivial"]["1 epoch"][1].tolist() == pytest.approx([8, 0.04])
    assert list(over_epochs["panels"]) == [f"batch size {size}" for size in (1, 8, 32, 64)], "at most four"
    assert over_epochs["panels"]["batch size 8"]["ilrg"][:, 0].tolist() == [0, 1, 20]

    drawn.clear()
    results.draw_pictures([row_of(results, norm="batch", mode="train", classes=7, network="resnet18")], tmp_path)
    assert drawn[0]["title"] == "bundled sample over 7 classes, ResNet-18, ReLU, batch norm (train)"
    assert list(drawn[0]["panels"]) == ["untrained"]


TRAINED = ["--epochs", "1", "--train-images", "300"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "nothing"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (["--image-size", "8"], "Expected no `image_size` with 'sample', but got 8"),
        (["--network", "swin"], "invalid choice: 'swin' (choose from"),
        (["--network", "alexnet", "--activation", "silu"], "Expected no `--activation` with 'alexnet', which has only"),
        (["--norm", "batch"], "Expected no `--norm` with 'mlp', which has only one, but got 'batch'"),
        (["--mode", "train"], "Expected no `--mode` with a network without BatchNorm, but got 'train'"),
        (["--init", "torch"], "Expected `--init papers` with 'mlp', which is torch's, but got 'torch'"),
        (["--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        (["--seed", "-1"], "Expected `seed` to be a whole number of at least 0, but got -1"),
        (["--epochs", "-1"], "Expected `epochs` to be a whole number of at least 0, but got -1"),
        (["--batch-sizes", "0"], "Expected `batch_sizes` to be a whole number of at least 1, but got 0"),
        (["--batch-sizes", "801"], "Expected `--batch-sizes` of at most 800"),
        ([*TRAINED, "--batch-sizes", "501"], "Expected `--batch-sizes` of at most 500, the images that victims may"),
        ([*TRAINED, "--seen", "--batch-sizes", "301"], "Expected `--batch-sizes` of at most 300"),
        (["--epochs", "1", "--train-images", "801"], "Expected `--train-images` of at most 800"),
        ([*TRAINED, "--learning-rate", "0"], "Expected `learning_rate` to be positive and finite, but got 0.0"),
        (["--distribution", "normal"], "Expected `distribution` to be one of"),
        (["--distribution", "dirichlet:x"], "Expected `distribution` as 'dirichlet:A'"),
        (["--distribution", "single-class", "--batch-sizes", "81"], "at most 80 images for each victim"),
        (["--classes", "1"], "Expected `classes` to be a whole number of at least 2, but got 1"),
        (["--classes", "20", *TRAINED], "Expected `--classes` with `--epochs 0`, as random labels can't be learnt"),
        (["--seen"], "Expected `--epochs` above 0 with `--seen`, but got [0]"),
        (["--train-images", "300"], "Expected `--epochs` above 0 with `--train-images`, but got [0]"),
        (["--precision", "bf16-mixed"], "Expected `--epochs` above 0 with `--precision`, but got [0]"),
        ([*TRAINED, "--weights", "own"], "Expected `--epochs 0` with `--weights own`, but got [1]"),
        (["--auxiliary-images", "201"], "Expected `--auxiliary-images` of at most 200, the test images of 'sample'"),
        (["--auxiliary-images", "10"], "Expected at least two `auxiliary` images of every class"),
        (["--auxiliary-images", "0", "--unlabelled"], "Expected `--auxiliary-images` above 0 with `--unlabelled`"),
        (["--rules", "best"], "invalid choice: 'best' (choose from"),
        (["--rules", "idlg"], "Expected `--rules` that can be used in some cell, but got 'idlg'. Expected one image"),
        (["--rules", "ilrg", "posterior"], "in some cell, but got 'posterior'. Expected victims that share"),
        (["--rules", "rlu", "--weights", "shared", "--auxiliary-images", "0"], "but got 'rlu'. Expected `auxiliary`"),
        (["--local-learning-rate", "0.1"], "Expected `--local-steps` above 1 with `--local-learning-rate`"),
        (["--local-steps", "2"], "Expected `--local-learning-rate` for 2 local steps, but got none"),
        (["--local-steps", "3", "--local-learning-rate", "0.1", "--local-batch-size", "3"], "to divide `num_images`"),
        (["--output", "file/x"], "Expected `output` to be a folder that can be written"),
    ],
)  # fmt: skip
def test_refuses_at_once(
    restoration: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("restoration_clients.trained_network", None)
    assert message in refused(restoration, capsys, *options)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_one_line_for_what_comes_later(
    restoration: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks").touch()
    said = refused(restoration, capsys, *QUICK, *TRAINED, "--networks", str(tmp_path / "networks"))
    assert said.startswith("restoration.py: error: ")
    assert "\n" not in said
