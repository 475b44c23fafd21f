"""The module as a whole, against a plain loop of the paper's algorithm."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.condensation import SiameseAugmentation
from leakage.condensation.matching import match, matched_parameters, real_gradients
from leakage.datamodules import LabelledImages
from leakage.models import ConvNet, draw_state
from leakage.seeds import derive_seed


def plain_distance(distance: str, gradients: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Layer by layer, row by row."""
    if distance == "squared":
        return sum((((a - b) ** 2).sum() for a, b in zip(gradients, targets, strict=True)), torch.zeros(()))
    total = torch.zeros(())
    for gradient, target in zip(gradients, targets, strict=True):
        if gradient.ndim < 2:
            continue
        for a, b in zip(gradient.reshape(len(gradient), -1), target.reshape(len(target), -1), strict=True):
            total = total + 1 - (a * b).sum() / (a.norm() * b.norm() + 1e-6)
    return total


def plain_condensation(
    data: LabelledImages,
    network: nn.Module,
    *,
    images_per_class: int,
    outer: int,
    inner: int,
    iterations: int,
    reuse: int = 1,
    distance: str = "row_cosine",
    strategy: str | None = None,
    network_batch_size: int = 256,
    decay: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, float]:
    """Dataset condensation as the paper has it, eager and class by class; the images and the last loss."""
    data.setup()
    network = network.to(dtype)
    classes = range(data.num_classes)
    augmentation = None if strategy is None else SiameseAugmentation(strategy)

    def stream(index: int, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(seed, index, name))

    images = torch.randn(len(classes) * images_per_class, *data.image_shape, generator=stream(0, "start")).to(dtype)
    labels = torch.tensor([label for label in classes for _ in range(images_per_class)])
    velocity = torch.zeros_like(images)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    step, loss, updates = 0, torch.zeros(()), 0
    for iteration in range(iterations):
        network.load_state_dict(draw_state(network, derive_seed(seed, iteration, "network")))
        parameters = list(network.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        for outer_step in range(outer):
            batch = data.class_batch(step)
            if norms:
                first = torch.cat([batch.images[batch.labels == label][:16] for label in classes])
                for norm in norms:
                    norm.momentum = 1.0  # the statistics are those of the next batch
                network.train()(data.normalise(first).to(dtype))
                for norm in norms:
                    norm.momentum = 0.1
            network.eval()
            drawn = stream(step, "augmentation")
            transforms: list[Any] = [augmentation.draw(drawn) if augmentation else nn.Identity() for _ in classes]
            targets = []
            for label in classes:
                real = transforms[label](data.normalise(batch.images[batch.labels == label]).to(dtype))
                real_loss = F.cross_entropy(network(real), torch.full((len(real),), label))
                targets.append([gradient.detach() for gradient in torch.autograd.grad(real_loss, parameters)])
            for _ in range(reuse):
                images.requires_grad_()
                loss = torch.zeros(())
                for label in classes:
                    own = labels == label
                    synthetic_loss = F.cross_entropy(network(transforms[label](images[own])), labels[own])
                    gradients = torch.autograd.grad(synthetic_loss, parameters, create_graph=True)
                    loss = loss + plain_distance(distance, list(gradients), targets[label])
                (derivative,) = torch.autograd.grad(loss, images)
                rate = 0.1 * (1 - updates / (iterations * outer * reuse) if decay else 1)
                velocity = 0.5 * velocity + derivative
                images = images.detach() - rate * velocity
                updates += 1
            step += 1
            if outer_step == outer - 1:
                continue
            network.train()
            drawn = stream(step, "training")
            for _ in range(inner):
                order = torch.arange(len(images))
                if len(images) > network_batch_size:
                    order = torch.randperm(len(images), generator=drawn)
                for first_of in range(0, len(images), network_batch_size):
                    chosen = order[first_of : first_of + network_batch_size]
                    seen = augmentation.draw(drawn, len(chosen))(images[chosen]) if augmentation else images[chosen]
                    optimizer.zero_grad()
                    F.cross_entropy(network(seen), labels[chosen]).backward()
                    optimizer.step()
    return images, float(loss.detach())


CASES = [
    pytest.param({"images_per_class": 1, "outer": 1, "inner": 1, "iterations": 1}, id="one step"),
    pytest.param({"images_per_class": 1, "outer": 1, "inner": 1, "iterations": 3}, id="momentum over iterations"),
    pytest.param({"images_per_class": 2, "outer": 2, "inner": 3, "iterations": 2, "seed": 7}, id="inner loop"),
    pytest.param({"images_per_class": 2, "outer": 2, "inner": 3, "iterations": 2, "reuse": 3}, id="network reuse"),
    pytest.param(
        {"images_per_class": 1, "outer": 2, "inner": 1, "iterations": 2, "reuse": 2, "decay": True}, id="decay"
    ),
    pytest.param(
        {"images_per_class": 2, "outer": 3, "inner": 2, "iterations": 1, "network_batch_size": 4}, id="shuffled batches"
    ),
    pytest.param(
        {
            "images_per_class": 2,
            "outer": 2,
            "inner": 2,
            "iterations": 2,
            "reuse": 2,
            "network_batch_size": 4,
            "strategy": "color_crop_cutout_flip_scale_rotate",
        },
        id="augmentation",
    ),
    pytest.param(
        {"images_per_class": 1, "outer": 2, "inner": 1, "iterations": 2, "distance": "squared"}, id="squared distance"
    ),
]


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """The plain loop's arguments as the module's."""
    names = {"reuse": "network_reuse", "strategy": "augmentation"}
    options = {names.get(name, name): value for name, value in case.items() if name not in ("outer", "inner")}
    return options | {"loops": (case["outer"], case["inner"])}


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_is_the_algorithm_of_the_paper(kit: Any, case: dict[str, Any], norm: str) -> None:
    found = kit.condense(**options_of(case), network=kit.network(norm=norm), trainer={"precision": "64-true"})
    images, loss = plain_condensation(kit.data(batch_size=6), kit.network(norm=norm), **case)
    torch.testing.assert_close(found.synthetic_images.detach(), images, rtol=1e-7, atol=1e-7)
    assert found.last_loss == pytest.approx(loss, rel=1e-7)
    assert found.iteration == case["iterations"]


def test_is_the_algorithm_of_the_paper_in_single_precision(kit: Any) -> None:
    case: dict[str, Any] = {"images_per_class": 2, "outer": 2, "inner": 3, "iterations": 2}
    found = kit.condense(**options_of(case))
    images, _ = plain_condensation(kit.data(batch_size=6), kit.network(), dtype=torch.float32, **case)
    torch.testing.assert_close(found.synthetic_images.detach(), images, rtol=1e-3, atol=1e-3)


def test_with_one_outer_step_the_network_is_never_trained(kit: Any) -> None:
    results = [kit.condense(iterations=2, loops=(1, inner), network_learning_rate=1.0) for inner in (1, 9)]
    assert torch.equal(kit.images(results[0]), kit.images(results[1]))
    assert results[0].seconds["network"] > 0, "drawing it takes its time"
    assert results[0].seconds["real"] > 0
    assert results[0].seconds["synthetic"] > 0
    assert results[0].images_per_second > 0


def losses_on_fixed_networks(data: LabelledImages, runs: list[Tensor]) -> list[float]:
    """Matching losses on networks that no run has seen and that are not trained, for real images of their own."""
    batch = data.class_batch(10_000)
    classes = list(torch.split(batch.images, torch.bincount(batch.labels).tolist()))
    network = ConvNet(width=8).eval()
    names = matched_parameters(network, "row_cosine")
    losses = torch.zeros(len(runs))
    for seed in range(3):
        network.load_state_dict(draw_state(network, seed))
        targets = real_gradients(network, names, classes, [data.normalise] * 10)
        for i, images in enumerate(runs):
            losses[i] += match(network, targets, images.unflatten(0, (10, -1)), distance="row_cosine")[0].sum()
    return (losses / 3).tolist()


def test_condensed_images_match_better_than_noise_on_networks_they_have_not_seen(kit: Any) -> None:
    data = LabelledImages("sample", batch_size=16)

    def run(**options: Any) -> Tensor:
        images: Tensor = kit.images(kit.condense(network=ConvNet(width=8), data=data, **options))
        return images

    runs = [run(iterations=1, learning_rate=1e-30), run(iterations=4, network_reuse=5, learning_rate=1.0)]
    noise, condensed = losses_on_fixed_networks(data, runs)
    assert condensed < 0.7 * noise


def test_starts_from_noise_or_from_real_images_of_each_class(kit: Any) -> None:
    still: dict[str, Any] = {"iterations": 1, "learning_rate": 1e-30, "loops": (1, 1)}
    noise = kit.images(kit.condense(5, **still))
    assert noise.shape == (15, 1, 8, 8)
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1
    assert not torch.equal(noise, kit.images(kit.condense(5, seed=1, **still)))
    run = kit.condense(5, initialization="real", **still)
    data = kit.data()
    data.setup()
    synthetic = run.synthetic_set()
    pixels = (synthetic.images * 255).round().byte()
    for label in range(3):
        members = data.train.images[data.train.labels == label]
        own = pixels[synthetic.labels == label]
        found = (own[:, None] == members[None]).flatten(2).all(2).any(0)
        assert found.sum() == 5, "five different images of the class"


def test_synthetic_images_come_in_the_scale_of_the_data_with_their_labels(kit: Any) -> None:
    run = kit.condense(2, loops=(1, 1), iterations=1, data=kit.data(channels=3), network=kit.network(channels=3))
    data = kit.data(channels=3)
    data.setup()
    synthetic = run.synthetic_set()
    assert synthetic.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert synthetic.images.shape == (6, 3, 8, 8)
    assert (synthetic.mean, synthetic.std) == (data.mean, data.std)
    assert (synthetic.class_names, synthetic.dataset) == (("narrow", "middle", "wide"), "stripes")
    torch.testing.assert_close(data.normalise(synthetic.images), kit.images(run))
    image, label = run.synthetic_dataset()[5]
    assert torch.equal(image, synthetic.images[5])
    assert label == 2
    synthetic.images.zero_()
    assert kit.images(run).any(), "a copy"


def test_saves_tensors_and_pictures(kit: Any, tmp_path: Any) -> None:
    run = kit.condense(iterations=1)
    run.save(tmp_path / "out")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"synthetic.safetensors", "synthetic.png"} <= files
    assert sum(name.startswith("images/") for name in files) == 3
    loaded = type(run.synthetic_set()).load(tmp_path / "out" / "synthetic.safetensors")
    assert torch.equal(loaded.images, run.synthetic_set().images)


def test_the_network_fits_the_data_by_default(kit: Any) -> None:
    run = type(kit.condense(iterations=1))(iterations=1)
    kit.trainer().fit(run, datamodule=kit.data(batch_size=2, channels=3, side=16))
    assert isinstance(run.network, ConvNet)
    assert sum(parameter.numel() for parameter in run.network.classifier.parameters()) == 128 * 2 * 2 * 3 + 3
    assert run.synthetic_images.shape == (3, 3, 16, 16)


def test_fits_anew_when_it_is_fitted_again(kit: Any) -> None:
    run = kit.condense(iterations=2)
    first = kit.images(run)
    kit.trainer().fit(run, datamodule=kit.data(batch_size=6))
    assert torch.equal(kit.images(run), first)
    assert run.iteration == 2


def test_every_seed_is_a_run_of_its_own_and_repeats_itself(kit: Any) -> None:
    options: dict[str, Any] = {"iterations": 1, "loops": (2, 1), "augmentation": "color_crop"}
    runs = [kit.images(kit.condense(seed=seed, **options)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    other_data = kit.images(kit.condense(data=kit.data(batch_size=6, seed=1), **options))
    assert not torch.equal(runs[0], other_data)


def test_the_global_random_state_is_neither_read_nor_changed(kit: Any) -> None:
    options: dict[str, Any] = {
        "iterations": 2,
        "loops": (2, 2),
        "augmentation": "crop_flip",
        "network_batch_size": 4,
        "initialization": "real",
    }
    network = kit.network(norm="batch")
    results = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
            results.append(kit.images(kit.condense(2, network=network, **options)))
            assert torch.equal(torch.get_rng_state(), before[0])
            assert random.getstate() == before[1]
            assert str(np.random.get_state()) == before[2]  # noqa: NPY002
    assert torch.equal(results[0], results[1])
