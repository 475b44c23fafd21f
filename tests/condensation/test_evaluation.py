"""Accuracies of networks that are trained on a few images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from leakage.condensation import training
from leakage.condensation.augmentation import SiameseAugmentation
from leakage.condensation.evaluation import Evaluation, evaluate, evaluate_full
from leakage.condensation.stacking import SingleNetwork, StackedNetworks, stacking_error, works_image_by_image
from leakage.condensation.synthetic_set import SyntheticSet, random_images
from leakage.condensation.training import NetworkResult, TrainingOptions, train
from leakage.datamodules import LabelledImages, LabelledTensors
from leakage.models import MLP, ConvNet, draw_state
from leakage.seeds import derive_seed

CPU = torch.device("cpu")


class Stripes(LabelledImages):
    """Three classes, bright at the top, in the middle or at the bottom, under noise."""

    def __init__(self, per_class: int = 6, size: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__((self._draw(per_class, size, generator), self._draw(60, size, generator)))
        self.name = "stripes"

    def _draw(self, per_class: int, size: int, generator: torch.Generator) -> LabelledTensors:
        labels = torch.arange(3).repeat_interleave(per_class)[torch.randperm(3 * per_class, generator=generator)]
        rows = torch.arange(size) * 3 // size
        bright = (rows == labels[:, None])[:, None, :, None] * 90
        noise = torch.randint(0, 150, (len(labels), 1, size, size), generator=generator)
        return LabelledTensors((bright + noise).to(torch.uint8), labels, ("top", "middle", "bottom"))


@pytest.fixture
def data() -> Stripes:
    stripes = Stripes()
    stripes.setup("fit")
    return stripes


@pytest.fixture(autouse=True)
def _leaves_random_state() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def small(**options: Any) -> ConvNet:
    with torch.random.fork_rng(devices=[]):
        return ConvNet(1, 8, 3, width=8, depth=1, **options)


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return make()


OPTIONS: dict[str, Any] = {"epochs": 5, "networks": 3, "device": "cpu", "progress": False}


def train_plainly(
    model: nn.Module, images: Tensor, labels: Tensor, options: TrainingOptions, number: int
) -> dict[str, Tensor]:
    """The protocol as one reads it, for one network."""
    model.load_state_dict(draw_state(model, derive_seed(options.seed, number, "evaluation network")))
    model.train()
    order = torch.Generator().manual_seed(derive_seed(options.seed, number, "evaluation order"))
    moves = torch.Generator().manual_seed(derive_seed(options.seed, number, "evaluation augmentation"))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.learning_rate, momentum=options.momentum, weight_decay=options.weight_decay
    )
    for epoch in range(options.epochs):
        if epoch == options.epochs // 2 + 1:
            optimizer.param_groups[0]["lr"] = options.learning_rate / 10
        batches = [torch.arange(len(labels))]
        if len(labels) > options.batch_size:
            batches = list(torch.randperm(len(labels), generator=order).split(options.batch_size))
        for batch in batches:
            some = images[batch]
            if options.augmentation is not None:
                some = options.augmentation.draw(moves, num_images=len(batch))(some)
            optimizer.zero_grad()
            F.cross_entropy(model(some), labels[batch]).backward()
            optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("batch_size", [256, 20])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("augmentation", [None, SiameseAugmentation("crop_rotate")])
def test_training_is_the_protocol(batch_size: int, norm: str, augmentation: SiameseAugmentation | None) -> None:
    """One network in pieces and several stacked, against a plain loop: every weight and every buffer."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(50, 1, 8, 8, generator=generator), torch.randint(3, (50,), generator=generator)
    options = TrainingOptions(6, 0.05, batch_size=batch_size, augmentation=augmentation, seed=7)
    model = small(norm=norm)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    numbers = [4, 0, 2]
    states = [draw_state(model, derive_seed(7, r, "evaluation network")) for r in numbers]
    stack = StackedNetworks(model, states, CPU)
    ticks: list[int] = []
    train(stack, numbers, lambda index: images[index], labels, options, ticks.append)
    assert sum(ticks) == 6 * 50 * 3
    for index, r in enumerate(numbers):
        single = SingleNetwork(model, states[index], CPU, 16 if norm == "instance" else None)
        train(single, [r], lambda index: images[index], labels, options, lambda count: None)
        expected = train_plainly(small(norm=norm), images, labels, options, r)
        for group, place in ((single, 0), (stack, index)):
            found = dict(group.state())
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name][place], tensor, atol=1e-5, rtol=1e-4, msg=name)
        moved = max(float((expected[name] - states[index][name]).abs().max()) for name in states[index])
        assert moved > 0.01, "training does something"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the networks are copies"


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_stacked_is_one_after_the_other(data: Stripes, norm: str) -> None:
    synthetic = random_images(data, 2)
    options = OPTIONS | {"network": small(norm=norm), "epochs": 8}
    apart = evaluate(synthetic, data, stacked=False, **options)
    together = evaluate(synthetic, data, stacked=True, **options)
    assert torch.equal(together.accuracies, apart.accuracies)
    assert len(set(apart.accuracies.tolist())) > 1, "each network is drawn on its own"
    fewer = evaluate(synthetic, data, **(options | {"networks": 2}))
    assert torch.equal(fewer.accuracies, apart.accuracies[:2]), "whatever the number of networks"
    assert not torch.equal(evaluate(synthetic, data, **options, seed=1).accuracies, apart.accuracies)
    assert apart.training_seconds > 0
    assert apart.testing_seconds > 0


def test_accuracy_is_that_of_the_plain_loop(data: Stripes) -> None:
    synthetic = random_images(data, 2)
    found = evaluate(synthetic, data, network=small(norm="batch"), **OPTIONS)
    for r in range(3):
        model = small(norm="batch")
        train_plainly(model, synthetic.normalised(), synthetic.labels, TrainingOptions(5), r)
        right = model.eval()(data.normalise(data.test.images)).argmax(1) == data.test.labels
        assert float(found.accuracies[r]) == pytest.approx(float(right.double().mean()))


def test_good_images_are_better_than_bad_ones(data: Stripes) -> None:
    good = random_images(data, 6)
    bad = SyntheticSet(
        good.images, good.labels[torch.randperm(18, generator=torch.Generator().manual_seed(0))].sort().values,
        good.mean, good.std, good.class_names,
    )  # fmt: skip
    bad.images = bad.images.roll(6, 0)  # every class has the images of another
    options = OPTIONS | {"network": small(), "epochs": 60}
    assert evaluate(good, data, **options).mean > 0.9
    assert evaluate(bad, data, **options).mean < 0.2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is to be trained and tested, which is not done."""
    seen: list[tuple[Any, ...]] = []

    def note(*arguments: Any) -> list[NetworkResult]:
        seen.append(arguments)
        return [NetworkResult(0.5, 1.0, 2.0)] * arguments[4]

    monkeypatch.setattr("leakage.condensation.evaluation.train_and_test", note)
    return seen


def test_protocol_of_the_paper_is_the_default(data: Stripes, asked: list[tuple[Any, ...]]) -> None:
    synthetic = random_images(data, 1)
    evaluation = evaluate(synthetic, data)
    evaluate(synthetic, data, augmentation=SiameseAugmentation.mnist_evaluation())
    assert asked[0][5] == TrainingOptions(300, 0.01, 0.9, 5e-4, 256, None, 0, "32-true")
    assert asked[1][5].epochs == 1000
    assert evaluation.networks == 10
    network = asked[0][3]
    assert isinstance(network, ConvNet)
    assert network.features[0].weight.shape == (128, 1, 3, 3)


@pytest.mark.parametrize(
    ("dataset", "name", "epochs", "augmentation"),
    [
        ("mnist", "dc", 1000, SiameseAugmentation.mnist_evaluation()),
        ("fashion_mnist", "dc", 300, None),
        ("cifar10", "dc", 300, None),
        ("fashion_mnist", "dsa", 1000, SiameseAugmentation("color_crop_cutout_flip_scale_rotate", same=True)),
        ("cifar10", "dsa", 1000, SiameseAugmentation("color_crop_cutout_flip_scale_rotate", same=True)),
        ("mnist", "dsa", 1000, SiameseAugmentation("color_crop_cutout_scale_rotate", same=True)),
        ("svhn", "dsa", 1000, SiameseAugmentation("color_crop_cutout_scale_rotate", same=True)),
        ("mnist", None, 300, None),
    ],
)
def test_evaluations_of_the_papers(
    data: Stripes,
    asked: list[tuple[Any, ...]],
    dataset: str,
    name: str | None,
    epochs: int,
    augmentation: SiameseAugmentation | None,
) -> None:
    data.name = dataset
    evaluate(random_images(data, 1), data, augmentation=name)
    assert asked[0][5] == TrainingOptions(epochs, augmentation=augmentation)
    evaluate(random_images(data, 1), data, augmentation=name, epochs=7)
    assert asked[1][5].epochs == 7


def test_network_is_left_as_it_was(data: Stripes) -> None:
    model = small(norm="batch").double().requires_grad_(False)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for stacked in (False, True):
        evaluation = evaluate(random_images(data, 2), data, network=model, stacked=stacked, **OPTIONS)
    assert not model.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    trained = evaluate(random_images(data, 2), data, network=small(norm="batch"), **OPTIONS)
    assert torch.equal(trained.accuracies, evaluation.accuracies), "in single precision, and all of it trained"


def test_works_in_a_validation_loop(data: Stripes) -> None:
    """Under inference mode and autocast, as Lightning calls callbacks."""
    synthetic = random_images(data, 2)
    expected = evaluate(synthetic, data, network=small(), **OPTIONS)
    model = small()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = SyntheticSet(synthetic.images.clone(), synthetic.labels.clone(), data.mean, data.std, data.class_names)
        for stacked in (False, True):
            found = evaluate(inside, data, network=model, stacked=stacked, **OPTIONS)
            assert torch.equal(found.accuracies, expected.accuracies)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(evaluate(synthetic, data, network=model, **OPTIONS).accuracies, expected.accuracies)
    finally:
        torch.set_default_dtype(torch.float32)


def test_network_of_torchvision() -> None:
    """With BatchNorm, in-place ReLUs and adaptive pooling."""
    data = Stripes(size=16)
    model = drawn(lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, width_per_group=64))
    model.conv1 = drawn(lambda: nn.Conv2d(1, 64, 3, 2, 1, bias=False))
    options = OPTIONS | {"networks": 2, "epochs": 2, "network": model}
    synthetic = random_images(data, 2)
    apart, together = (evaluate(synthetic, data, stacked=stacked, **options) for stacked in (False, True))
    assert torch.equal(apart.accuracies, together.accuracies)


def test_dropout_is_drawn_from_the_seed(data: Stripes) -> None:
    model = drawn(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 3)))
    synthetic = random_images(data, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = evaluate(synthetic, data, network=model, **OPTIONS)
        torch.manual_seed(2)
        second = evaluate(synthetic, data, network=model, **OPTIONS)
    assert torch.equal(first.accuracies, second.accuracies)
    without = nn.Sequential(*(layer for layer in model if not isinstance(layer, nn.Dropout)))
    assert not torch.equal(evaluate(synthetic, data, network=without, **OPTIONS).accuracies, first.accuracies)
    with pytest.raises(ValueError, match=r"that torch.func can stack for stacked=True, but got Sequential.*random"):
        evaluate(synthetic, data, network=model, stacked=True, **OPTIONS)


def test_what_can_be_stacked_and_taken_apart() -> None:
    assert stacking_error(small(), (1, 8, 8), CPU) is None
    assert stacking_error(small(norm="batch"), (1, 8, 8), CPU) is None
    assert "random" in (
        stacking_error(drawn(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout())), (1, 8, 8), CPU) or ""
    )
    assert stacking_error(nn.Flatten(), (1, 8, 8), CPU) is not None, "there is nothing to stack"
    assert works_image_by_image(small(), (1, 8, 8))
    assert not works_image_by_image(small(norm="batch"), (1, 8, 8))


def test_too_little_memory_makes_smaller_groups(data: Stripes, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic = random_images(data, 2)
    options = OPTIONS | {"networks": 5, "network": small(), "stacked": True}
    expected = evaluate(synthetic, data, **options)
    sizes: list[int] = []

    def train_a_few(networks: Any, *rest: Any) -> None:
        sizes.append(len(networks))
        if len(networks) > most:
            raise torch.OutOfMemoryError("too many")
        train(networks, *rest)

    monkeypatch.setattr(training, "train", train_a_few)
    most = 2
    assert torch.equal(evaluate(synthetic, data, **options).accuracies, expected.accuracies)
    assert sizes == [5, 3, 2, 2, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError, match="too many"):
        evaluate(synthetic, data, **options)


def test_training_that_diverges(data: Stripes, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic = random_images(data, 2)
    options = OPTIONS | {"network": small(norm="none"), "learning_rate": 1e30, "epochs": 30}
    message = (
        r"Expected finite losses in training, but got (nan|inf) for network 0 in epoch [2-9] of 30. Lower `learning"
    )
    for stacked in (False, True):
        with pytest.raises(FloatingPointError, match=message):
            evaluate(synthetic, data, stacked=stacked, **options)
    with pytest.raises(
        FloatingPointError, match=r"finite weights after training.*'features.0.weight' of network 0 after"
    ):
        evaluate(synthetic, data, **(options | {"learning_rate": 1e38, "weight_decay": 1e10, "epochs": 1}))


def test_names_the_network_that_diverges() -> None:
    losses = torch.zeros(20, 3)
    losses[7, 1] = math.inf
    losses[9, 0] = math.nan
    with pytest.raises(FloatingPointError, match="but got inf for network 15 in epoch 28 of 300"):
        training._check_losses(losses, [12, 15, 18], 20, 300)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNet(3, 8, 3, width=8), r"and 3 classes of 'stripes', but got ConvNet, which fails"),
        (lambda: MLP(1, 9, 3), r"for images \(1, 8, 8\) and .* but got MLP, which fails on them"),
        (lambda: ConvNet(1, 8, 10, width=8), r"but got ConvNet, which returns \(2, 10\) for two images"),
        (lambda: nn.Conv2d(1, 3, 1), r"but got Conv2d, which returns \(2, 3, 8, 8\)"),
        (lambda: nn.LSTM(8, 3), "but got LSTM, which"),
    ],
)  # fmt: skip
def test_networks_that_do_not_fit(data: Stripes, make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(random_images(data, 1), data, network=drawn(make), **OPTIONS)


def test_network_without_reset_parameters(data: Stripes) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 3))

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ self.weight

    with pytest.raises(ValueError, match=r"to have `reset_parameters.*but got Scale"):
        evaluate(random_images(data, 1), data, network=Scale(), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": 0}, "Expected `networks` to be a whole number of at least 1, but got 0"),
        ({"epochs": 0}, "Expected `epochs` to be a whole number of at least 1, but got 0"),
        ({"batch_size": 0}, "Expected `batch_size` to be a whole number of at least 1"),
        ({"seed": -1}, "Expected `seed` to be a whole number of at least 0, but got -1"),
        ({"learning_rate": 0}, "Expected `learning_rate` to be positive and finite, but got 0"),
        ({"momentum": 1.0}, "Expected `momentum` from 0 to below 1, but got 1.0"),
        ({"weight_decay": -1e-4}, "Expected `weight_decay` of at least 0, but got -0.0001"),
        ({"augmentation": "crop"}, r"Expected `augmentation` to be one of \['dc', 'dsa'\], but got 'crop'"),
        ({"augmentation": 1}, "Expected `augmentation` to be a SiameseAugmentation or None, but got 1"),
        (
            {"precision": "16-mixed"},
            r"Expected `precision` to be one of \['32-true', 'bf16-mixed'\], but got '16-mixed'",
        ),
        ({"stacked": "yes"}, "Expected `stacked` to be True, False or None, but got 'yes'"),
    ],
)
def test_options_out_of_range(data: Stripes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(random_images(data, 1), data, network=small(), **(OPTIONS | options))


def test_a_set_that_does_not_fit(data: Stripes) -> None:
    other = SyntheticSet(torch.zeros(2, 1, 9, 9), torch.tensor([0, 1]), (0.5,), (0.5,), ("a", "b"), "others")
    with pytest.raises(ValueError, match=r"image_shape \(1, 8, 8\) of 'stripes', but got \(1, 9, 9\) \(of 'others'\)"):
        evaluate(other, data, **OPTIONS)
    with pytest.raises(ValueError, match="Expected `synthetic` to be a SyntheticSet, but got Tensor"):
        evaluate(torch.zeros(1), data, **OPTIONS)  # type: ignore[arg-type]


def test_random_images(data: Stripes) -> None:
    chosen = random_images(data, 4)
    assert chosen.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (chosen.class_names, chosen.dataset, chosen.mean, chosen.std) == (
        data.class_names, "stripes", data.mean, data.std,
    )  # fmt: skip
    real = {
        (image.numpy().tobytes(), int(label)) for image, label in zip(data.train.images, data.train.labels, strict=True)
    }
    found = [
        ((image * 255).round().to(torch.uint8).numpy().tobytes(), int(label))
        for image, label in zip(chosen.images, chosen.labels, strict=True)
    ]
    assert len(set(found)) == 12, "none twice"
    assert set(found) <= real
    torch.testing.assert_close(
        chosen.normalised(), data.normalise((chosen.images * 255).round().to(torch.uint8)), atol=1e-6, rtol=1e-6
    )
    assert torch.equal(random_images(data, 4).images, chosen.images)
    assert not torch.equal(random_images(data, 4, seed=1).images, chosen.images)
    with pytest.raises(ValueError, match=r"at most 6, the number of .* class 0 \(top\) of 'stripes', but got 7"):
        random_images(data, 7)
    with pytest.raises(ValueError, match="Expected `images_per_class` to be a whole number of at least 1, but got 0"):
        random_images(data, 0)


def test_data_is_made_ready() -> None:
    assert len(random_images(Stripes(), 1)) == 3
    assert evaluate_full(Stripes(), network=small(), epochs=1, device="cpu", progress=False).networks == 1


def test_full_is_training_on_all_images(data: Stripes) -> None:
    everything = random_images(data, 6)
    found = evaluate_full(data, network=small(), networks=2, epochs=40, device="cpu", progress=False)
    same = evaluate(everything, data, network=small(), networks=2, epochs=40, device="cpu", progress=False)
    assert torch.equal(found.accuracies, same.accuracies)
    assert found.mean > 0.8


def test_each_network_is_kept(data: Stripes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped loses one network at most, and ends as if it had not been stopped."""
    synthetic = random_images(data, 2)
    options = OPTIONS | {"network": small(), "networks": 4}
    whole = evaluate(synthetic, data, **options)
    trained: list[int] = []

    def stopping(networks: Any, numbers: Any, *rest: Any) -> None:
        if len(trained) == stop_after:
            raise KeyboardInterrupt
        trained.extend(numbers)
        train(networks, numbers, *rest)

    monkeypatch.setattr(training, "train", stopping)
    stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(synthetic, data, cache=tmp_path, **options)
    (path,) = tmp_path.iterdir()
    assert [one["accuracy"] for one in json.loads(path.read_text())] == whole.accuracies[:2].tolist()
    stop_after = 100
    again = evaluate(synthetic, data, cache=tmp_path, **options)
    assert trained == [0, 1, 2, 3]
    assert torch.equal(again.accuracies, whole.accuracies)
    assert again.training_seconds > 0
    fewer = evaluate(synthetic, data, cache=tmp_path, **(options | {"networks": 3}))
    assert torch.equal(fewer.accuracies, whole.accuracies[:3])
    assert fewer.training_seconds < again.training_seconds
    assert trained == [0, 1, 2, 3], "nothing more"
    evaluate(random_images(data, 2, seed=1), data, cache=tmp_path, **options)
    evaluate(synthetic, data, cache=tmp_path, augmentation="dsa", **options)
    assert trained == [0, 1, 2, 3] * 3, "another set, another evaluation"


def test_full_is_cached_by_configuration(
    data: Stripes, tmp_path: Path, asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    options: dict[str, Any] = {"networks": 2, "epochs": 2, "device": "cpu", "progress": False, "cache": cache}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leakage.condensation.evaluation.train_and_test", training.train_and_test)
        first = evaluate_full(data, network=small(), **options)
    (path,) = cache.iterdir()
    again = evaluate_full(data, network=small(), **options)
    assert not asked
    assert torch.equal(again.accuracies, first.accuracies)
    assert again.training_seconds == first.training_seconds
    other_data = Stripes(per_class=7)
    other_data.setup("fit")
    for count, (whose, changes) in enumerate(
        [
            (data, {"epochs": 3}),
            (data, {"networks": 3}),
            (data, {"seed": 1}),
            (data, {"precision": "bf16-mixed"}),
            (data, {"augmentation": SiameseAugmentation("crop")}),
            (data, {"augmentation": SiameseAugmentation("crop", crop=0.25)}),
            (data, {"network": small(norm="batch")}),
            (data, {"network": small(activation="silu")}),
            (other_data, {}),
        ],
        start=1,
    ):
        evaluate_full(whose, **({"network": small()} | options | changes))
        assert len(asked) == count, changes
    for broken in ("{", "3", '["accuracy"]', '[{"accuracy": 0.5}]', '[{"accuracy": 0.5', path.read_text()[:-9]):
        path.write_text(broken)
        with pytest.raises(
            ValueError, match=r"Expected a complete JSON file in the cache, but got '.*json'. Delete it"
        ):
            evaluate_full(data, network=small(), **options)
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()
    monkeypatch.undo()
    with pytest.raises(OSError, match="Expected to write"):
        evaluate_full(data, network=small(), **options)


@pytest.mark.parametrize("stacked", [False, True])
def test_bfloat16_trains_nearly_the_same(data: Stripes, stacked: bool) -> None:
    """In training only, and seen in the figures: weights differ a little, accuracies hardly."""
    synthetic = random_images(data, 6)
    options = OPTIONS | {"network": small(), "epochs": 60, "stacked": stacked}
    single = evaluate(synthetic, data, **options)
    mixed = evaluate(synthetic, data, precision="bf16-mixed", **options)
    assert mixed.mean > 0.9
    assert mixed.mean == pytest.approx(single.mean, abs=0.05)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(9, 1, 8, 8, generator=generator), torch.randint(3, (9,), generator=generator)
    state = draw_state(small(), 0)

    def moved(precision: str, epochs: int) -> Tensor:
        network = SingleNetwork(small(), state, CPU, 4)
        options = TrainingOptions(epochs, precision=precision)
        train(network, [0], lambda index: images[index], labels, options, lambda _: None)
        weight = dict(network.state())["features.0.weight"]
        assert weight.dtype == torch.float32
        return weight - state["features.0.weight"]

    for epochs in (1, 40):
        expected, found = moved("32-true", epochs), moved("bf16-mixed", epochs)
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.abs().max()))
    with torch.autocast("cpu", enabled=False):  # whose cache of weights is not to be taken
        assert torch.equal(moved("bf16-mixed", 40), found)


def test_evaluation_is_summed_up() -> None:
    evaluation = Evaluation(torch.tensor([0.7, 0.72, 0.68]))
    assert evaluation.networks == 3
    assert evaluation.mean == pytest.approx(0.7)
    assert evaluation.std == pytest.approx(0.02)
    # t_0.975 of two degrees of freedom is 4.303
    assert evaluation.interval == pytest.approx((0.7 - 4.303 * 0.02 / 3**0.5, 0.7 + 4.303 * 0.02 / 3**0.5), abs=1e-5)
    assert str(evaluation) == "70.0 % ± 2.0 (3 networks, 95 % interval of the mean 65.0 to 75.0)"
    one = Evaluation(torch.tensor([0.5]))
    assert math.isnan(one.std)
    assert all(math.isnan(end) for end in one.interval)
    assert str(one) == "50.0 % (1 network)"


def test_bar_goes_to_the_end(data: Stripes, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(random_images(data, 1), data, network=small(), **(OPTIONS | {"progress": True}))
    told = capsys.readouterr().err
    assert "Testing network 3 of 3: 100 %" in told
    assert told.count("\r") < 12, "into a file go the changes of what it does, and no more"
    evaluate(random_images(data, 1), data, network=small(), **OPTIONS)
    assert capsys.readouterr().err == ""
