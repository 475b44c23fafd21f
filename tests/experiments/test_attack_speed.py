from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
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
    assert "MNIST is not found" in said
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


@pytest.mark.parametrize("method", ["idlg", "dlg"])
def test_the_plain_search_is_the_published_one(speed: ModuleType, method: str) -> None:
    """Against the loops as the papers' code has them, step by step."""
    victims = Victims("sample", victims=1)
    victims.setup("fit")
    shared = victims.share(range(1))
    model = victims.victim.model.requires_grad_()
    weights = {name: tensor[0].clone().requires_grad_() for name, tensor in shared.state.items()}
    model.load_state_dict(weights)
    gradients = {name: tensor[0] for name, tensor in shared.gradients.items()}
    generator = torch.Generator().manual_seed(1)  # one from which both find the image
    start, logits = torch.randn(1, 1, 28, 28, generator=generator), torch.randn(1, 10, generator=generator)
    image, label, evaluations = speed.attack_plainly(model, gradients, start, logits if method == "dlg" else None)

    expected, dummy_label = start.clone().requires_grad_(), logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([expected, dummy_label] if method == "dlg" else [expected], lr=1, history_size=100)
    target = gradients["classifier.weight"].sum(1).argmin().reshape(1)
    used = 0

    def closure() -> torch.Tensor:
        nonlocal used
        used += 1
        optimizer.zero_grad()
        logits = functional_call(model, weights, expected)
        if method == "dlg":
            loss = -(F.softmax(dummy_label, dim=-1) * F.log_softmax(logits, dim=-1)).sum(1).mean()
        else:
            loss = F.cross_entropy(logits, target)
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        distance = sum(((a - gradients[name]) ** 2).sum() for name, a in zip(weights, found, strict=True))
        distance.backward()
        return distance

    for call in range(300):
        optimizer.step(closure)
        if call % 10 == 0 and closure().item() < 1e-6:
            break
    assert label == int(dummy_label.argmax() if method == "dlg" else target) == int(target)
    assert evaluations == used
    truth = next(iter(victims.val_dataloader())).images[0]
    assert float((image - truth).square().mean()) < 1e-3
    torch.testing.assert_close(image, expected.detach(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--victims", "0"], "Expected `victims` to be a whole number of at least 1, but got 0"),
        (["--plain-victims", "0"], "Expected `plain_victims` to be a whole number of at least 1, but got 0"),
        (["--victims", "5"], "Expected `--plain-victims` to be at most the 5 victims of our side, but got 20"),
        (["--dataset", "nothing"], "Expected `dataset` to be one of ['mnist', 'fashion_mnist'"),
        (["--dataset", "sample", "--image-size", "9"], "Expected no `image_size` with 'sample', but got 9"),
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
