"""Training against a plain loop, breaks, the cache and what is kept in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.clients.training import TrainedNetwork, trained_network
from leakage.datamodules import LabelledImages, LabelledTensors, Victims
from leakage.models import MLP, ConvNet, draw_state
from leakage.seeds import derive_seed


class Brightness(LabelledImages):
    """Noise of three brightnesses."""

    def __init__(self, size: int = 42, spoilt: Tensor | None = None, **options: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(size + 21) % 3
        noise = torch.randint(100, (len(labels), 1, 4, 4), generator=generator)
        images = (noise + 60 * labels[:, None, None, None]).byte()
        if spoilt is not None:
            images[spoilt] = 255 - images[spoilt]
        train, test = (
            LabelledTensors(images[part], labels[part], ("dark", "grey", "light"))
            for part in (slice(size), slice(size, None))
        )
        super().__init__((train, test), **options)
        self.name = "brightness"


class SameScale(Brightness):
    """With the same normalisation whatever is spoilt."""

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.mean, self.std = (0.4,), (0.25,)


def perceptron() -> MLP:
    return MLP(1, 4, 3, width=8)


def with_memory() -> nn.Module:
    """With all that a break could disturb: random numbers, running statistics."""
    convolution = ConvNet(1, 4, 3, width=4, depth=1, norm="batch")
    return nn.Sequential(convolution.features, nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 3))


def train(root: Path, model: nn.Module | None = None, data: LabelledImages | None = None, **options: Any) -> Any:
    return trained_network(
        perceptron() if model is None else model,
        Brightness() if data is None else data,
        **{"epochs": 2, "batch_size": 10, "progress": False, "accelerator": "cpu", "root": root} | options,
    )


def same(one: TrainedNetwork, other: TrainedNetwork) -> bool:
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def kept(root: Path) -> list[int]:
    (folder,) = root.iterdir()
    return sorted(int(path.stem.removeprefix("epoch_")) for path in folder.glob("epoch_*.ckpt"))


def checkpoint(root: Path, epoch: int) -> Path:
    (path,) = root.glob(f"*/epoch_{epoch}.ckpt")
    return path


@pytest.fixture
def no_runs(monkeypatch):
    """From here on nothing is trained or tested."""

    def refuse(*args, **kwargs):
        raise AssertionError("trained or tested again")

    def off() -> None:
        monkeypatch.setattr(Trainer, "fit", refuse)
        monkeypatch.setattr(Trainer, "test", refuse)

    return off


def test_is_plain_sgd(tmp_path):
    data, model = Brightness(), perceptron()
    trained = train(tmp_path, model, data, epochs=3, batch_size=16, learning_rate=0.05, num_images=40, seed=4)

    network = perceptron()
    network.load_state_dict(draw_state(model, 4))
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(derive_seed(4, epoch, "training order"))
        order = trained.seen[torch.randperm(40, generator=generator)]
        correct = 0
        for batch in (order[:14], order[14:27], order[27:]):
            labels = data.train.labels[batch]
            logits = network(data.normalise(data.train.images[batch]))
            correct += int((logits.argmax(1) == labels).sum())
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
    for ours, theirs in zip(trained.model.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    tested = network(data.normalise(data.test.images)).argmax(1) == data.test.labels
    assert trained.accuracy == pytest.approx(tested.float().mean().item(), abs=1e-6)
    assert trained.train_accuracy == pytest.approx(correct / 40, abs=1e-6)
    assert trained.epochs == 3


def test_learns(tmp_path):
    trained = train(tmp_path, epochs=30)
    assert trained.accuracy > 0.8
    assert trained.train_accuracy > 0.8
    assert train(tmp_path, epochs=0).accuracy < 0.7


def test_no_epochs_are_the_first_weights(tmp_path):
    model, data = with_memory(), Brightness()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    trained = train(tmp_path, model, data, epochs=0, seed=5)
    network = trained.model[1]
    first = draw_state(model, 5)
    assert all(torch.equal(tensor, first[name]) for name, tensor in network.state_dict().items())
    assert math.isnan(trained.train_accuracy)
    assert math.isnan(train(tmp_path, model, data, epochs=0, seed=5).train_accuracy)
    tested = network(data.normalise(data.test.images)).argmax(1) == data.test.labels
    assert trained.accuracy == pytest.approx(tested.float().mean().item(), abs=1e-6)
    assert kept(tmp_path) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_break_changes_nothing(tmp_path, precision):
    options = {"model": with_memory(), "precision": precision}
    whole = train(tmp_path / "whole", epochs=4, **options)
    early = [train(tmp_path / "broken", epochs=epochs, **options) for epochs in (1, 3)]
    resumed = train(tmp_path / "broken", epochs=4, **options)
    assert same(whole, resumed)
    assert (whole.accuracy, whole.train_accuracy) == (resumed.accuracy, resumed.train_accuracy)
    # One that was not kept is trained from an earlier one.
    assert kept(tmp_path / "whole") == [4]
    assert same(train(tmp_path / "whole", epochs=3, **options), early[1])
    assert not same(early[0], early[1])


def test_precision_counts_and_weights_are_float32(tmp_path):
    single, half = (train(tmp_path, precision=precision) for precision in ("32-true", "bf16-mixed"))
    assert not same(single, half)
    for ours, theirs in zip(single.model.parameters(), half.model.parameters(), strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


def test_what_was_trained_is_read(tmp_path, no_runs):
    first = train(tmp_path, epochs=4)
    middle = train(tmp_path, epochs=2)
    no_runs()
    for known, epochs in ((first, 4), (middle, 2)):
        again = train(tmp_path, epochs=epochs)
        assert same(known, again)
        assert (known.accuracy, known.train_accuracy) == (again.accuracy, again.train_accuracy)
        assert torch.equal(known.seen, again.seen)
        assert again.epochs == epochs
    with pytest.raises(AssertionError, match="trained or tested again"):
        train(tmp_path, epochs=5)


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.02},
        {"batch_size": 11},
        {"seed": 1},
        {"num_images": 41},
        {"precision": "bf16-mixed"},
        {"model": MLP(1, 4, 3, width=9)},
        {"model": MLP(1, 4, 3, width=8, activation="silu")},
        {"data": Brightness(size=45)},
    ],
    ids=" ".join,
)
def test_all_that_decides_the_result_has_a_folder_of_its_own(tmp_path, options):
    one, other = train(tmp_path, epochs=1), train(tmp_path, epochs=1, **options)
    assert len(folders(tmp_path)) == 2
    assert not same(one, other)


def test_what_is_frozen_stays_and_counts(tmp_path):
    model = perceptron()
    model.features[0].weight.requires_grad_(False)
    trained = train(tmp_path, model)
    first = draw_state(model, 0)
    state = trained.model[1].state_dict()
    assert [name for name in first if torch.equal(state[name], first[name])] == ["features.0.weight"]
    assert not trained.model[1].features[0].weight.requires_grad
    assert not same(trained, train(tmp_path))


def test_what_does_not_decide_the_result_has_none(tmp_path, no_runs):
    whole = train(tmp_path)
    no_runs()
    model = perceptron()
    with torch.no_grad():
        model.classifier.bias.fill_(3.0)
    assert same(whole, train(tmp_path, model.double(), Brightness(seed=3, batch_size=2), num_images=42))
    name, *others = folders(tmp_path)
    assert not others
    configuration = json.loads((tmp_path / name / "configuration.json").read_text())
    assert name.startswith("mlp_")
    assert (configuration["learning_rate"], configuration["images"], configuration["momentum"]) == (0.01, 42, 0.9)


def test_seen(tmp_path):
    data = Brightness()
    trained = train(tmp_path, data=data, epochs=1, num_images=20)
    assert trained.seen.dtype == torch.int64
    assert torch.equal(trained.seen, trained.seen.unique())
    assert len(trained.seen) == 20
    assert trained.seen.max() < 42
    assert not torch.equal(trained.seen, train(tmp_path, epochs=0, num_images=20, seed=1).seen)
    assert torch.equal(train(tmp_path, epochs=0).seen, torch.arange(42))


def test_is_trained_on_what_it_has_seen_alone(tmp_path):
    known = train(tmp_path, data=SameScale(), num_images=20)
    unseen = torch.tensor([index for index in range(42) if index not in known.seen.tolist()])
    assert same(known, train(tmp_path, data=SameScale(spoilt=unseen), num_images=20))
    assert not same(known, train(tmp_path, data=SameScale(spoilt=known.seen[:1]), num_images=20))
    assert len(folders(tmp_path)) == 3


def test_takes_images_in_the_unit_range(tmp_path):
    data = Brightness()
    trained = train(tmp_path, data=data)
    images = data.test.images
    assert not any(module.training for module in trained.model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in trained.model.parameters())
    torch.testing.assert_close(trained.model(images / 255), trained.model[1](data.normalise(images)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_whoever_calls(tmp_path, mode):
    """Modes, the model's too, and random state play no part and are left as they were."""
    model = with_memory()
    expected = train(tmp_path / "plain", model)
    torch.rand(3)
    before = torch.random.get_rng_state()
    with mode():
        found = train(tmp_path / "within", model.eval())
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(expected, found)
    assert found.model[1][0][1].running_mean.abs().max() > 0.01
    assert not any(parameter.is_inference() for parameter in found.model.parameters())


def test_no_batch_is_a_single_image(tmp_path):
    """Which BatchNorm could not be trained on: 9 images are three times 3, not 4, 4 and 1."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    assert len(train(tmp_path, model, num_images=9, batch_size=4).seen) == 9


def test_kept_epochs(tmp_path):
    train(tmp_path / "quick", epochs=2)
    train(tmp_path / "quick", epochs=4)
    assert kept(tmp_path / "quick") == [2, 4]


@pytest.mark.parametrize("epochs", [2, 4])
@pytest.mark.parametrize("length", [0, -50])
def test_truncated_checkpoint(tmp_path, epochs, length):
    train(tmp_path)
    path = checkpoint(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:length])
    message = r"^Expected a whole checkpoint of leakage at '.*epoch_2\.ckpt', but got"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, epochs=epochs)
    path.unlink()
    train(tmp_path, epochs=epochs)


def test_nothing_else_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    train(None, epochs=1)
    (file,) = tmp_path.glob("**/configuration.json")
    assert folders(tmp_path) == [".cache"]
    assert folders(file.parent) == ["configuration.json", "epoch_1.ckpt"]
    assert folders(tmp_path / ".cache" / "leakage" / "networks") == [file.parent.name]


def test_root_that_is_a_file(tmp_path, no_runs):
    no_runs()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^Expected to write '.*file.*configuration\.json.*', but got: "):
        train(tmp_path / "file")


def test_progress(tmp_path, capsys):
    train(tmp_path, epochs=2, progress=True)
    told = capsys.readouterr().out
    assert "5/5" in told
    assert "train/accuracy=0." in told
    train(tmp_path, epochs=5, progress=False)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [10, 42])
def test_weights_that_diverge(tmp_path, batch_size):
    """Long before the end of the epoch, and in its last step."""
    model = nn.Sequential(nn.Flatten(), Louder(), nn.Linear(16, 3))
    message = r"^Expected finite weights in training, but got NaN or inf in '1\.[a-z0-9.]*' in epoch 1 with learning_"
    with pytest.raises(FloatingPointError, match=message + r"rate=1e\+38\. Lower `learning_rate`\.$"):
        train(tmp_path, model, batch_size=batch_size, learning_rate=1e38)
    assert kept(tmp_path) == []


class Louder(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 1e3 * images


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "`epochs` to be a whole number of at least 0, but got -1"),
        ({"epochs": 1.0}, "`epochs` to be a whole number of at least 0, but got 1.0"),
        ({"seed": -1}, "`seed` to be a whole number of at least 0, but got -1"),
        ({"batch_size": 0}, "`batch_size` to be a whole number of at least 1, but got 0"),
        ({"num_images": 0}, "`num_images` to be a whole number of at least 1, but got 0"),
        ({"num_images": 43}, "`num_images` of at most 42, the training images of 'brightness', but got 43"),
        ({"learning_rate": 0.0}, "`learning_rate` to be positive and finite, but got 0.0"),
        ({"precision": "16"}, r"`precision` to be one of \['32-true', 'bf16-mixed'\], but got '16'"),
        ({"data": Victims("sample")}, "`data` to be a LabelledImages, but got Victims"),
        ({"model": MLP(1, 4, 4)}, "a `model` with a logit for each of the 3 classes of 'brightness', but got 4"),
        ({"model": MLP(3, 4, 3)}, r"`model` to take images of shape \(N, 1, 4, 4\), but got: "),
        (
            {"model": nn.Sequential(perceptron(), Scale())},
            r"`model` to take images of shape|every module with weights to have `reset_parameters",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        train(tmp_path, **options)
    assert folders(tmp_path) == []
