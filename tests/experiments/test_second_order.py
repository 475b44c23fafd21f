from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from leakage.clients.victim import Victim
from leakage.datamodules import GroundTruth, LabelledImages, LabelledTensors, Victims
from leakage.metrics import wilson_interval
from leakage.models import LeNet

from .conftest import EXPERIMENTS, load

pytestmark = pytest.mark.filterwarnings("ignore:The clients defend")

METHODS = ["gauss_newton", "idlg"]
TINY = ["--victims", "2", "--accelerator", "cpu"]
QUICK = [*TINY, "--max-steps", "6", "--restarts", "0", "--solver", "cholesky"]


@pytest.fixture(scope="module")
def reach() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS / "second_order")  # as for a script that is run
        yield load("second_order/reach.py")
        for name in ("reach_options", "reach_results", "reach_victims", "why", "restoration_clients"):
            sys.modules.pop(name, None)
        for name in ("restoration_options", "restoration_results"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def victims(reach: ModuleType) -> ModuleType:
    return sys.modules["reach_victims"]


@pytest.fixture(scope="module")
def why(reach: ModuleType) -> ModuleType:
    return sys.modules["why"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight tiny images each."""
    root = tmp_path_factory.mktemp("images") / "tiny"
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for index in range(8):
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{index}.png")
    return root


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((output / "summary.json").read_text())
    return rows


def refused(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        script.main(arguments)
    if isinstance(end.value.code, str):
        return end.value.code
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def sweep(reach: ModuleType, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    output = tmp_path_factory.mktemp("reach") / "out"
    arguments = [
        "--dataset",
        str(folder),
        *QUICK,
        "--labels",
        "equal",
        "--noise",
        "0",
        "0.1",
        "--max-evaluations",
        "20",
    ]
    arguments += ["--half", "--methods", *METHODS, "--output", str(output)]
    before = torch.get_rng_state()
    reach.main(arguments)
    assert torch.equal(torch.get_rng_state(), before)
    return output, arguments


def test_rows(sweep: tuple[Path, list[str]]) -> None:
    rows = rows_of(sweep[0])
    cells = [(noise, half, 1) for noise, half in ((0, False), (0.1, False), (0, True))]
    assert [(row["noise"], row["half"], row["images"], row["method"]) for row in rows] == [
        (*cell, method) for cell in cells for method in METHODS
    ]
    for row in rows:
        assert row["unknowns"] == row["images"] * 3 * 8 * 8
        assert row["equations"] == sum(parameter.numel() for parameter in LeNet(3, 8, 2).parameters())
        assert row["below_1e6"] <= row["below_1e4"] <= row["below_1e3"]
        assert row["all_below_1e4"] <= row["below_1e4"]
        assert row["below_1e4_ci"] == pytest.approx(wilson_interval(row["below_1e4"], 2))
        assert row["mse_quartiles"][0] <= row["mse_median"] <= row["mse_quartiles"][1]
        assert row["seconds_per_victim"] > 0
    found = {(row["method"], row["noise"], row["half"]): row["mse_median"] for row in rows}
    assert found["gauss_newton", 0, False] < 1e-6
    assert found["gauss_newton", 0, False] < found["gauss_newton", 0, True] < found["gauss_newton", 0.1, False]


def test_why_is_told_of_noise(sweep: tuple[Path, list[str]]) -> None:
    output = sweep[0]
    by_cell = {(row["noise"], row["images"]): row for row in rows_of(output) if row["method"] == "gauss_newton"}
    assert by_cell[0.1, 1]["verdict"].startswith("noise: condition number")
    assert all(row["verdict"] is None for row in rows_of(output) if row["method"] != "gauss_newton")
    record = json.loads(
        (output / "tiny_lenet_none_sigmoid_epochs_0_equal_1_noise_0.1" / "why" / "run.json").read_text()
    )
    one = record["row"]["diagnoses"][0]
    assert one["rank"] == one["unknowns"] == 192
    assert len(one["singular_values"]) == 11
    assert not one["solved"]
    # The linearised floor is what the attack reaches, within the scatter of two victims.
    assert one["mse_floor"] / 20 < one["mse"][0] < 20 * one["mse_floor"]
    assert one["loss_found"] < one["loss_true"], "noise is fitted too"


def test_pictures(reach: ModuleType, sweep: tuple[Path, list[str]]) -> None:
    assert all((sweep[0] / name).stat().st_size > 10_000 for name in ("reach.png", "noise.png"))


def test_goes_on_and_refuses_to_overwrite(
    reach: ModuleType,
    sweep: tuple[Path, list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, arguments = sweep
    said = refused(reach, capsys, *arguments)
    assert f"Expected `--output` to be a folder without results, but got '{output}'. Add --resume" in said
    said = refused(reach, capsys, *arguments, "--resume", "--seed", "1")
    assert "Expected" in said
    assert "configuration" in said
    before = rows_of(output)
    monkeypatch.setattr("comparing.run_attack", None)
    monkeypatch.setattr(reach, "diagnose", None)
    reach.main([*arguments, "--resume"])
    assert rows_of(output) == before, "taken from disk"


def test_a_cell_that_is_broken_off_is_resumed(reach: ModuleType, folder: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(folder), *TINY, "--methods", "rgap", "--why", "0", "--output"]
    reach.main([*arguments, str(tmp_path / "whole"), "--images", "1", "2"])
    reach.main([*arguments, str(tmp_path / "parts")])
    reach.main([*arguments, str(tmp_path / "parts"), "--images", "1", "2", "--resume"])
    whole, parts = (rows_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row | {"seconds_per_victim": 0} for row in whole] == [row | {"seconds_per_victim": 0} for row in parts]


def test_trained_and_other_networks(
    reach: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", str(folder), *QUICK, "--methods", "rgap", "gauss_newton", "--output"]
    networks = ["--network", "lenet", "convnet", "--norm", "instance", "--epochs", "1", "--networks"]
    cut = ["--max-steps", "1", "--why", "0"]
    reach.main([*arguments, str(tmp_path / "out"), *networks, str(tmp_path / "cache"), *cut])
    rows = rows_of(tmp_path / "out")
    kinds = [(row["network"], row["norm"]) for row in rows if row["method"] == "gauss_newton"]
    assert kinds == [("lenet", "none"), ("convnet", "instance")]
    assert all(0 <= row["test_accuracy"] <= 1 and not row["own_weights"] for row in rows)
    assert ("convnet", "rgap") not in {(row["network"], row["method"]) for row in rows}
    assert "rgap is skipped: Expected" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 2


# What happens to the gradients.


def victims_of(module: ModuleType, allowed: torch.Tensor | None = None, **options: Any) -> Victims:
    """The victims of a cell of noise: each with a network of its own."""
    labelled = LabelledTensors(
        torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.arange(60) % 3,
    )
    data = LabelledImages((labelled, labelled))
    data.setup("fit")
    chosen = {"labels": "random", "images": 1, "noise": 0.0, "half": False} | options
    cell = module.Cell(dataset="noise", network="lenet", norm="none", activation="sigmoid", epochs=0, **chosen)
    given = argparse.Namespace(victims=4, seed=0, lanes=3, infer_labels=True, test_images=False)
    allowed = torch.arange(60) if allowed is None else allowed
    network = module.Network(LeNet(1, 8, 3), allowed, own=True, accuracy=None)
    victims: Victims = module.make_victims(cell, given, data, network)
    victims.setup("fit")
    return victims


def test_noise_is_relative_to_each_victims_root_mean_square(victims: ModuleType) -> None:
    data = victims_of(victims, noise=0.1)
    assert (data.weights, data.reveal_labels, data.lanes) == ("own", False, 3)
    true, noisy = victims_of(victims).share(range(4)), data.share(range(4))
    assert noisy.protocol.defenses == ({"name": "GaussianNoise", "std": 0.1, "relative": True},)
    for row in range(4):
        before = torch.cat([tensor[row].flatten() for tensor in true.gradients.values()])
        change = torch.cat([tensor[row].flatten() for tensor in noisy.gradients.values()]) - before
        assert change.std().item() == pytest.approx(0.1 * before.square().mean().sqrt().item(), rel=0.05)
    assert all(noisy.gradients[name].dtype == true.gradients[name].dtype for name in true.gradients)


def test_half_rounds_after_the_noise_and_refuses_what_it_cannot_hold(victims: ModuleType) -> None:
    noisy, rounded = (victims_of(victims, noise=0.1, half=half).share(range(2)) for half in (False, True))
    for name, tensor in noisy.gradients.items():
        assert torch.equal(rounded.gradients[name], tensor.to(torch.float16).float())
    with pytest.raises(ValueError, match=r"Expected gradients that float16 can hold, up to 65,504, .* got 7e\+04"):
        victims.Float16()({"bias": torch.tensor([1.0, 7e4])}, torch.Generator())


def test_configurations_differ(victims: ModuleType) -> None:
    cells = [{}, {"noise": 0.1}, {"noise": 0.2}, {"half": True}, {"images": 2}, {"images": 2, "labels": "equal"}]
    configurations = [victims_of(victims, **cell).configuration for cell in cells]
    assert len({json.dumps(configuration) for configuration in configurations}) == len(cells)


def test_equal_labels_and_images_that_may_be_held(victims: ModuleType) -> None:
    allowed = torch.arange(20, 60)
    for labels in ("random", "equal"):
        data = victims_of(victims, allowed, labels=labels, images=4)
        truth = GroundTruth.cat(list(data.val_dataloader()))
        assert (truth.labels == truth.labels[:, :1]).all() == (labels == "equal")
        images = torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        for image, label in zip(truth.images.flatten(0, 1), truth.labels.flatten(), strict=True):
            (same,) = (images == (image * 255).round().to(torch.uint8)).flatten(1).all(1).nonzero()[:, 0]
            assert same >= 20
            assert same % 3 == label


# Why it fails.


def test_rank_and_condition_of_jacobians_made_by_hand(why: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, 6, generator=generator, dtype=torch.float64)).Q for size in (6, 40)
    )
    true = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    values = why.singular_values(left * true @ right.mT)
    torch.testing.assert_close(values, true)
    rank, condition, floor = why.conditioning(values, equations=40, level=1e-3)
    assert (rank, condition) == (6, pytest.approx(10))
    # The same by simulation: least squares with noise of that size in each equation.
    jacobian = (left * true @ right.mT).mT
    noise = 1e-3 / math.sqrt(40) * torch.randn(20000, 40, generator=generator, dtype=torch.float64)
    error = torch.linalg.lstsq(jacobian, noise.mT).solution
    assert floor == pytest.approx(error.square().mean().item(), rel=0.03)
    true[-1] = 0
    assert why.conditioning(why.singular_values(left * true @ right.mT), equations=40, level=1e-3)[0] == 5
    wide = why.singular_values(torch.eye(6, dtype=torch.float64)[:, :4])
    assert why.conditioning(wide, equations=4, level=1e-3) == (4, math.inf, math.inf), "fewer equations than unknowns"


def test_promised_is_the_share_in_the_range(why: ModuleType) -> None:
    jacobian = torch.eye(5, dtype=torch.float64)[:2] * torch.tensor([[3.0], [0.1]])
    assert why.promised(jacobian, torch.tensor([3.0, 0, 4, 0, 0]).double()) == pytest.approx(9 / 25)
    assert why.promised(jacobian, torch.tensor([0.0, 0, 4, 1, 0]).double()) == pytest.approx(0)


def test_wrong_pattern_counts_units(why: ModuleType) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False), nn.ReLU())
    state = {"1.weight": torch.eye(4)}
    images, found = torch.tensor([1.0, -1, 1, -1]), torch.tensor([2.0, -3, -1, -2])
    shape = (1, 1, 2, 2)
    assert why.wrong_pattern(model, state, images.view(shape), found.view(shape)) == 0.25
    assert not model[2]._forward_pre_hooks, "no hook stays"
    assert (
        why.wrong_pattern(nn.Sequential(nn.Flatten(), nn.Sigmoid()), {}, images.view(shape), found.view(shape)) is None
    )


def diagnosis(why: ModuleType, **changes: Any) -> Any:
    measured = {
        "victim": 0, "mse": [0.1], "solved": False, "equations": 100, "unknowns": 10, "level": 2.0**-24,
        "loss_found": 1e-2, "loss_true": 1e-14, "gradient_norm": 1e-6, "rank": 10, "condition": 50.0,
        "singular_values": [1.0] * 11, "mse_floor": 1e-14, "promised": 1e-6, "lowest_eigenvalues": [1e-3, 1e-2, 1e-1],
    }  # fmt: skip
    return why.Diagnosis(**measured | changes)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"solved": True}, "solved"),
        ({"mse": [0.1, math.inf]}, "diverged"),
        ({"unknowns": 101}, "not determined: 100 equations for 101 unknowns"),
        ({"rank": 9}, "not determined: rank 9 of 10"),
        (
            {"condition": 1e9, "mse_floor": 1e-2},
            "ill-conditioned: condition number 1e+09, noise of 6e-08 leaves an MSE of 1e-02",
        ),
        (
            {"mse_floor": 1e-2, "level": 1e-2},
            "noise: condition number 5e+01, noise of 1e-02 leaves an MSE of 1e-02",
        ),
        ({"loss_found": 5e-14}, "not unique: other images have the same gradient (loss 5e-14, MSE 1e-01)"),
        ({"wrong_pattern": 0.123}, "wrong activation pattern: 12.3 % of the ReLUs"),
        ({"promised": 0.5}, "not converged: the linear equations promise 50 % of the loss"),
        ({"lowest_eigenvalues": [-1e-2, 1.0, 1.0]}, "saddle: loss 1e-02, lowest eigenvalue -1e-02 of the largest"),
        ({}, "local minimum: loss 1e-02, lowest eigenvalue 1e-03 of the largest"),
        (
            dict.fromkeys(("rank", "condition", "mse_floor", "promised", "lowest_eigenvalues")),
            "not known: 10 unknowns are too many for the Jacobian (loss 1e-02)",
        ),
    ],
)
def test_verdicts(why: ModuleType, changes: dict[str, Any], verdict: str) -> None:
    assert why.verdict(diagnosis(why, **changes)) == verdict


def test_the_commonest_verdict_is_the_cells(why: ModuleType) -> None:
    saddle, local = "saddle: loss 1", "local minimum: loss 2"
    made = [diagnosis(why, verdict=text) for text in (local, saddle, "saddle: loss 3")]
    assert why.summarise([diagnosis(why, solved=True, verdict="solved")]) is None
    assert why.summarise(made[:1]) == local
    assert why.summarise(made) == f"{saddle} (2 of 3 alike)"


def test_measurements_on_a_victim(why: ModuleType) -> None:
    victim = Victim(LeNet(1, 8, 3, width=4, activation="relu"), image_shape=(1, 8, 8))
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(1, 1, 1, 8, 8, generator=generator), torch.tensor([[1]])
    shared = victim.share(images, labels)
    found = images[0] + 0.3 * torch.randn(images[0].shape, generator=generator)
    one = why.diagnose(shared, victim, labels[0], images[0], found, noise=0.0, half=False)
    assert one.loss_true < 1e-12 < one.loss_found
    assert 0 < one.wrong_pattern < 1
    residuals = why._residuals(shared.to(dtype=torch.float64), victim, labels[0])
    truth, end = images.double().flatten(), found.double().flatten()
    jacobian = torch.autograd.functional.jacobian(residuals, truth)
    torch.testing.assert_close(why._jacobian(residuals, truth), jacobian.mT)
    assert one.rank == torch.linalg.matrix_rank(jacobian)
    hessian = torch.autograd.functional.hessian(lambda point: residuals(point).square().sum(), end)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert one.lowest_eigenvalues == pytest.approx((eigenvalues[:3] / eigenvalues[-1]).tolist(), abs=1e-9)
    exact = why.diagnose(shared, victim, labels[0], images[0], images[0], noise=0.0, half=False)
    assert (exact.verdict, exact.wrong_pattern, exact.promised) == ("solved", 0.0, None)


def test_a_sketch_keeps_the_singular_values_roughly(why: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = Victim(LeNet(1, 8, 3, width=4), image_shape=(1, 8, 8))
    images, labels = torch.rand(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[1]])
    given = (victim.share(images, labels), victim, labels[0], images[0], images[0])
    whole = why.diagnose(*given, noise=0.0, half=False)
    equations = sum(parameter.numel() for parameter in victim.model.parameters())
    monkeypatch.setattr(why, "_MEMORY", equations * 256 * 8)
    monkeypatch.setattr(why, "_KEPT", 8)
    monkeypatch.setattr(why, "MOST_UNKNOWNS", 64)
    sketched = why.diagnose(*given, noise=0.0, half=False)
    assert not whole.sketched
    assert whole.rank == sketched.rank == 64
    ratios = [mine / true for mine, true in zip(sketched.singular_values, whole.singular_values, strict=True)]
    assert 0.5 < min(ratios) <= max(ratios) < 2
    monkeypatch.setattr(why, "MOST_UNKNOWNS", 63)
    assert why.diagnose(*given, noise=0.0, half=False).rank is None, "too large"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (["--images", "2", "0"], "Expected `images` to be a whole number of at least 1, but got 0"),
        (["--victims", "801"], "801 * 1 = 801"),
        (["--noise", "-1"], "Expected `--noise` to be at least 0 and finite, but got -1.0"),
        (["--noise", "inf"], "Expected `--noise` to be at least 0 and finite, but got inf"),
        (["--train-images", "5"], "Expected `--epochs` above 0 with `--train-images`, but got [0]"),
        (["--epochs", "1", "--train-images", "1000"], "Expected `--train-images` below 800, the training images of"),
        (["--norm", "none"], "Expected no `--norm` with LeNets, which have none, but got ['none']"),
        (["--network", "convnet", "--init", "torch"], "Expected `--init papers` without a LeNet in `--network`"),
        (["--methods", "rgap", "--restarts", "1"], "Expected `--restarts` with one of ['gauss_newton', 'idlg'], but"),
        (["--max-steps", "0"], "Expected `max_evaluations` to be a whole number of at least 1, but got 0"),
        (["--labels", "equal", "--images", "81"], "images for each victim, the size of the largest class"),
        (["--output", "file/x"], "Expected `output` to be a folder that can be written"),
    ],
)
def test_refuses_at_once(
    reach: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(reach, "compare", None)
    dataset = [] if "--dataset" in arguments else ["--dataset", "sample", "--victims", "5"]
    output = [] if "--output" in arguments else ["--output", "out"]
    assert message in refused(reach, capsys, *dataset, *output, *arguments)
