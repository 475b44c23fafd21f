from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakage.datamodules import Victims


def test_writes_both_sides(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "CALLS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    output = tmp_path / "speed.json"
    torch.set_num_threads(2)
    try:
        speed.main(
            ["--output", str(output), "--victims", "3", "--plain-victims", "1", "--root", str(tmp_path / "none")]
        )
        assert torch.get_num_threads() == 2, "as it was before"
    finally:
        torch.set_num_threads(1)
    assert output.with_suffix(".png").stat().st_size > 0
    said = capsys.readouterr().out
    assert "MNIST was not found" in said
    result = json.loads(output.read_text())
    assert result["dataset"] == "sample"
    assert result["victims"] == {"leakage": 3, "plain": 1}
    assert result["threads"] == {"leakage": 1, "plain": 1}
    seconds = result["seconds_per_victim"]
    assert result["ratio"] == pytest.approx(seconds["plain"] / seconds["leakage"])
    assert f"{result['ratio']:.1f} times fewer" in said
    assert result["success_rate"]["leakage"] == 1.0
    assert result["success_rate"]["plain"] == 0.0, "two calls are too few"
    assert result["label_accuracy"] == {"leakage": 1.0, "plain": 1.0}
    low, high = result["success_rate_ci"]["leakage"]
    assert 0 < low < high == 1.0
    assert 20 < result["evaluations_per_victim"]["plain"] <= 60


def test_another_data_set_and_precision(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CALLS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    output = tmp_path / "speed.json"
    counts = ["--victims", "2", "--plain-victims", "1", "--lanes", "1"]
    speed.main([*counts, "--dataset", "sample", "--precision", "64-true", "--output", str(output)])
    result = json.loads(output.read_text())
    assert (result["dataset"], result["precision"]["leakage"]) == ("sample", "64-true")
    assert result["success_rate"]["leakage"] == 1.0


def test_another_method_and_threshold(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CALLS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    output = tmp_path / "speed.json"
    counts = ["--victims", "2", "--plain-victims", "1", "--dataset", "sample"]
    speed.main([*counts, "--method", "gauss_newton", "--threshold", "1e-6", "--output", str(output)])
    result = json.loads(output.read_text())
    assert (result["method"], result["threshold"]) == ("gauss_newton", 1e-6)
    assert result["success_rate"]["leakage"] == 1.0
    assert result["mse_median"]["leakage"] < 1e-6


def test_a_network_of_more_classes(speed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CALLS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    output = tmp_path / "speed.json"
    counts = ["--victims", "2", "--plain-victims", "1", "--dataset", "sample"]
    speed.main([*counts, "--method", "rgap", "--num-classes", "30", "--output", str(output)])
    result = json.loads(output.read_text())
    assert (result["dataset"], result["victims"]["leakage"]) == ("sample, 30 classes", 2)
    assert result["label_accuracy"]["leakage"] == 1.0


@dataclass
class Near:
    """The gradient of a victim in 64 bit, and a start so near the truth that no rounding leads the search away."""

    model: nn.Module
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    truth: Tensor
    label: Tensor
    start: Tensor
    logits: Tensor


@pytest.fixture(scope="module")
def near() -> Near:
    victims = Victims("sample", victims=1)
    victims.setup("fit")
    state = victims.share(range(1)).state
    truth = next(iter(victims.val_dataloader()))
    image, label = truth.images[0].double(), truth.labels[0]
    model = victims.victim.model.double().requires_grad_()
    model.load_state_dict({name: tensor[0] for name, tensor in state.items()})
    weights = dict(model.named_parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(image), label), list(weights.values()))
    generator = torch.Generator().manual_seed(0)
    start = image + 0.1 * torch.randn(image.shape, generator=generator).double()
    logits = 5.0 * F.one_hot(label, 10).double()
    return Near(model, weights, dict(zip(weights, gradients, strict=True)), image, label, start, logits)


def published_loop(near: Near, method: str, calls: int, tolerance: float) -> tuple[Tensor, int, int]:
    """The loops as the papers' code has them."""
    image, dummy_label = near.start.clone().requires_grad_(), near.logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([image, dummy_label] if method == "dlg" else [image], lr=1, history_size=100)
    target = near.gradients["classifier.weight"].sum(1).argmin().reshape(1)
    used = 0

    def closure() -> Tensor:
        nonlocal used
        used += 1
        optimizer.zero_grad()
        logits = functional_call(near.model, near.weights, image)
        if method == "dlg":
            loss = -(F.softmax(dummy_label, dim=-1) * F.log_softmax(logits, dim=-1)).sum(1).mean()
        else:
            loss = F.cross_entropy(logits, target)
        found = torch.autograd.grad(loss, list(near.weights.values()), create_graph=True)
        distance = sum(((a - near.gradients[name]) ** 2).sum() for name, a in zip(near.weights, found, strict=True))
        assert isinstance(distance, Tensor)
        distance.backward()
        return distance

    for call in range(calls):
        optimizer.step(closure)
        if call % 10 == 0 and closure().item() < tolerance:
            break
    return image.detach(), int(dummy_label.argmax() if method == "dlg" else target), used


@pytest.mark.parametrize("method", ["idlg", "dlg"])
@pytest.mark.parametrize(
    ("calls", "tolerance", "evaluations"),
    [
        pytest.param(2, 0.0, 41, id="all calls"),
        pytest.param(2, 1e6, 21, id="stopped after the first"),
    ],
)
def test_the_plain_search_is_the_published_one(
    speed: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    near: Near,
    method: str,
    calls: int,
    tolerance: float,
    evaluations: int,
) -> None:
    # Its first steps: without a line search, differences of rounding grow from step to step.
    monkeypatch.setattr(speed, "CALLS", calls)
    monkeypatch.setattr(speed, "TOLERANCE", tolerance)
    logits = near.logits if method == "dlg" else None
    image, label, used = speed.attack_plainly(near.model, near.gradients, near.start, logits)
    expected, expected_label, expected_used = published_loop(near, method, calls, tolerance)
    assert used == expected_used == evaluations
    assert label == expected_label == int(near.label)
    assert (expected - near.start).abs().max() > 1e-3, "it has moved"
    torch.testing.assert_close(image, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("method", ["idlg", "dlg"])
def test_the_plain_search_finds_what_is_near(speed: ModuleType, near: Near, method: str) -> None:
    logits = near.logits if method == "dlg" else None
    image, label, _ = speed.attack_plainly(near.model, near.gradients, near.start, logits)
    assert label == int(near.label)
    assert float((near.start - near.truth).square().mean()) > 9e-3
    assert float((image - near.truth).square().mean()) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        (["--plain-victims", "0"], "Expected `plain_victims` to be a whole number of at least 1, but got 0"),
        (["--victims", "5"], "Expected `--plain-victims` to be at most 5, the number of victims, but got 20"),
        (["--dataset", "nothing"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (["--dataset", "sample", "--image-size", "9"], "Expected no `image_size` with 'sample', but got 9"),
        (["--dataset", "sample", "--num-classes", "9"], "Expected `model` to have a logit for each of the 10 classes"),
        (["--output", "."], "Expected `--output` to be a file, but got the folder"),
        (["--output", "file/a.json"], "Expected `output` to be a folder that can be written, but got 'file'"),
    ],
)
def test_refuses_at_once(
    speed: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(speed, "_measure", None)
    output = [] if "--output" in arguments else ["--output", "a.json"]
    with pytest.raises(SystemExit) as end:
        speed.main([*arguments, *output])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
