from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.clients.victim import Victim
from leakage.closed_form import SeparatedFeatures
from leakage.metrics import wilson_interval
from leakage.models import LeNet

from .conftest import EXPERIMENTS, load


@pytest.fixture(scope="module")
def features() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "second_order")  # as for a script that is run
        yield load("second_order/features.py")
        for name in ("reach_options", "reach_victims", "restoration_clients", "restoration_options"):
            sys.modules.pop(name, None)


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    return rows


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "seconds" not in name}


def refused(features: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        features.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def run(features: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    output = tmp_path_factory.mktemp("features") / "features.json"
    arguments = ["--dataset", "sample", "--images", "1", "2", "--victims", "2", "--correct", "--output", str(output)]
    before = torch.get_rng_state()
    features.main(arguments)
    assert torch.equal(torch.get_rng_state(), before)
    return output, arguments


def test_rows(run: tuple[Path, list[str]]) -> None:
    rows = rows_of(run[0])
    assert [(row["images"], row["victims"], row["labels"]) for row in rows] == [(1, 2, "random"), (2, 2, "random")]
    for row in rows:
        assert (row["network"], row["activation"], row["epochs"], row["own_weights"]) == ("lenet", "sigmoid", 0, True)
        assert row["below_1e4"] == row["below_1e2"] == row["wrong_detected"] == row["corrected"] == 1
        assert row["below_1e3"] == row["images_below_1e3"] == 1
        assert row["corrected_ci"] == pytest.approx(wilson_interval(1.0, 2))
        assert row["below_1e4_ci"] == pytest.approx(wilson_interval(1.0, 2))
        assert row["error_median"] < 1e-5
        assert row["residual_median"] < 1e-5
        assert 1e3 < row["wrong_ratio_min"] <= row["wrong_ratio_median"] < 1e10
        assert row["seconds_per_victim"] > 0


def test_keeps_a_file_that_is_there(
    features: ModuleType,
    run: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, arguments = run
    before = rows_of(output)
    said = refused(features, capsys, *arguments)
    assert f"Expected `--output` to be a new file, but got '{output}', which exists. Add --force" in said
    assert rows_of(output) == before
    features.main([*arguments, "--force"])
    told = capsys.readouterr().out
    assert "2 of 2: 2 victims, 2 images of sample, LeNet, sigmoid" in told
    assert "100 % [34, 100]" in told
    again = rows_of(output)
    assert [untimed(row) for row in again] == [untimed(row) for row in before]
    assert again != before, "measured again"


def test_figures_come_from_all_cohorts(features: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One victim that is found to 2e-3, one that is lost, one that is exact; the cohorts hold two and one."""
    residuals = {(0, True): 1e-6, (1, True): 1e-5, (2, True): 1e-6, (0, False): 1e-3, (1, False): 5e-4, (2, False): 1.0}
    right: dict[int, list[int]] = {}

    def separate(shared: Any, victim: Victim, labels: Tensor, *, seed: int) -> SeparatedFeatures:
        ids = shared.ids.tolist()
        asked_first = [right.setdefault(number, own) == own for number, own in zip(ids, labels.tolist(), strict=True)]
        residual = torch.tensor([residuals[key] for key in zip(ids, asked_first, strict=True)], dtype=torch.float64)
        wrong_by = torch.tensor([{0: 2e-3, 1: 0.5, 2: 0.0}[number] for number in ids], dtype=torch.float64)
        found = torch.ones(len(ids), 2, 3, dtype=torch.float64)
        found[:, 1] *= 1 + wrong_by[:, None]  # only the second image is wrong
        return SeparatedFeatures(found, torch.zeros(0), residual)

    monkeypatch.setattr(features, "separate_features", separate)
    monkeypatch.setattr(features, "true_features", lambda shared, *_: torch.ones(len(shared), 2, 3).double())
    monkeypatch.setitem(features._FIXED, "cohort", 2)
    features.main(["--dataset", "sample", "--victims", "3", "--output", str(tmp_path / "out.json")])
    (row,) = rows_of(tmp_path / "out.json")
    assert row["victims"] == 3
    assert (row["below_1e4"], row["below_1e2"], row["wrong_detected"]) == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert (row["below_1e3"], row["images_below_1e3"], row["corrected"]) == (
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        None,
    )
    assert row["below_1e2_ci"] == pytest.approx(wilson_interval(2 / 3, 3))
    assert row["wrong_detected_ci"] == pytest.approx(wilson_interval(2 / 3, 3))
    assert (row["error_median"], row["residual_median"]) == pytest.approx((2e-3, 1e-6))
    assert (row["wrong_ratio_min"], row["wrong_ratio_median"]) == pytest.approx((50, 1000))


def test_trained_network_on_images_it_has_not_seen(features: ModuleType, tmp_path: Path) -> None:
    networks, output = tmp_path / "networks", tmp_path / "out" / "features.json"
    trained = ["--epochs", "1", "--activations", "relu", "--init", "torch", "--networks", str(networks)]
    features.main(["--dataset", "sample", "--victims", "1", "--labels", "equal", *trained, "--output", str(output)])
    (row,) = rows_of(output)
    assert (row["epochs"], row["labels"], row["own_weights"]) == (1, "equal", False)
    assert 0 < row["test_accuracy"] <= 1
    assert len([*networks.iterdir()]) == 1


def test_errors_are_paired_one_to_one(features: ModuleType) -> None:
    truth = torch.tensor([[[3.0, 4.0], [0.0, 10.0]], [[300.0, 400.0], [0.0, 1e-3]]]).double()
    found = truth.flip(1).clone()
    found[0, 1, 0] += 0.05  # of the image of length 5
    found[1, 1] += torch.tensor([30.0, 40.0])  # a tenth of its length
    expected = torch.tensor([[0.01, 0.0], [0.1, 0.0]]).double()
    torch.testing.assert_close(features.feature_errors(found, truth), expected)
    # Two that are both nearest to the first image: one of them is left for the second.
    near = torch.tensor([[[3.0, 4.0], [3.0, 4.5]]]).double()
    errors = features.feature_errors(near, truth[:1])
    torch.testing.assert_close(errors, torch.tensor([[0.0, (3**2 + 5.5**2) ** 0.5 / 10]]).double())
    assert features.feature_errors(truth[:, :1], truth[:, :1]).eq(0).all()
    # Features of any size, zero among them.
    for size in (1e-9, 1e6):
        errors = features.feature_errors(1.01 * size * truth.flip(1), size * truth)
        torch.testing.assert_close(errors, torch.full((2, 2), 0.01).double())
    assert features.feature_errors(torch.zeros(1, 2, 3).double(), torch.zeros(1, 2, 3).double()).eq(0).all()


@pytest.mark.parametrize("own", [True, False])
def test_true_features_are_the_inputs_of_the_last_layer(features: ModuleType, own: bool) -> None:
    model = LeNet(1, 8, 4, width=2)
    victim = Victim(model, image_shape=(1, 8, 8), num_images=2)
    images = torch.rand(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    states = victim.fresh_states([5, 6, 7]) if own else None
    shared = victim.share(images, torch.tensor([[0, 1], [2, 2], [3, 0]]), states=states)
    found = features.true_features(shared, victim, images)
    assert found.dtype == torch.float64
    for row in range(3):
        network = LeNet(1, 8, 4, width=2)
        network.load_state_dict({name: tensor[row] if own else tensor for name, tensor in shared.state.items()})
        network.double().classifier = nn.Identity()
        torch.testing.assert_close(found[row], network(images[row].double()).detach())


def test_one_label_is_wrong_whatever_the_cohort(features: ModuleType) -> None:
    labels = torch.arange(600).view(200, 3) % 4
    wrong = features.with_a_wrong_label(labels, torch.arange(200), 4, 1)
    differs = wrong != labels
    assert (differs.sum(1) == 1).all()
    assert differs.any(0).all()
    assert {*((wrong - labels)[differs] % 4).tolist()} == {1, 2, 3}
    assert torch.equal(features.with_a_wrong_label(labels[50:60], torch.arange(50, 60), 4, 1), wrong[50:60])
    assert not torch.equal(features.with_a_wrong_label(labels, torch.arange(200), 4, 2), wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (["--images", "2", "0"], "Expected `images` to be a whole number of at least 1, but got 0"),
        (["--images", "2", "10"], "Expected at most 9 images, as the last layer's gradient (10 classes"),
        (["--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        (["--victims", "401"], "401 * 2 = 802"),
        (["--victims", "201", "--epochs", "1"], "at most the 400 images of the data set, but got 201 * 2 = 402"),
        (["--seed", "-1"], "Expected `seed` to be a whole number of at least 0, but got -1"),
        (["--networks", "x"], "Expected `--epochs` above 0 with `--networks`, but got [0]"),
        (["--network", "convnet", "--init", "torch"], "Expected `--init papers` without a LeNet in `--network`"),
        (["--output", "."], "Expected `--output` to be a file, but got the folder '.'"),
        (["--output", "file/x.json"], "Expected `output` to be a folder that can be written, but got 'file'"),
    ],
)
def test_refuses_at_once(
    features: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(features, "measure", None)
    dataset = [] if "--dataset" in arguments else ["--dataset", "sample"]
    output = [] if "--output" in arguments else ["--output", "out.json"]
    assert message in refused(features, capsys, *dataset, *output, *arguments)
