"""Networks that are trained on real images, kept in several states, and met again and again."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.condensation import GradientMatchingCondensation, SiameseAugmentation, matching
from leakage.condensation.matching import Gradients, matched_parameters
from leakage.condensation.pool import NetworkPool
from leakage.datamodules import LabelledImages
from leakage.models import draw_state
from leakage.seeds import derive_seed

Entry = tuple[dict[str, Tensor], list[list[Tensor]], list[Any]]


def stream(index: int, name: str, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, index, name))


def moments_for(count: int) -> list[int]:
    """Of so many synthetic images a class."""
    return [0, 2, 5, 10, 20, 40, 80][: {1: 4, 2: 5, 4: 6}.get(count, 7)]


def plain_pool(data: LabelledImages, network: nn.Module, count: int, size: int, strategy: str | None) -> list[Entry]:
    """States, gradients by class, and transforms: trained whole batch by whole batch, in double precision."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    entries: list[Entry] = []
    for number in range(size):
        network.load_state_dict(draw_state(network, derive_seed(0, number, "network")))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        generator = stream(number, "pool training")
        for step in range(moments_for(count)[-1] + 1):
            if step in moments_for(count):
                batch = data.class_batch(len(entries))
                classes = [batch.images[batch.labels == label] for label in range(data.num_classes)]
                if norms:
                    for norm in norms:
                        norm.momentum = 1.0
                    network.train()(data.normalise(torch.cat([images[:16] for images in classes])).double())
                network.eval()
                drawn = stream(len(entries), "augmentation")
                transforms: list[Any] = [
                    SiameseAugmentation(strategy).draw(drawn) if strategy else nn.Identity() for _ in classes
                ]
                gradients = []
                for label, (images, transform) in enumerate(zip(classes, transforms, strict=True)):
                    logits = network(transform(data.normalise(images).double()))
                    loss = F.cross_entropy(logits, torch.full((len(images),), label))
                    found = torch.autograd.grad(loss, list(network.parameters()))
                    gradients.append([gradient.bfloat16().double() for gradient in found])
                state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
                entries.append((state, gradients, transforms))
            chosen = torch.randint(len(data.train), (64,), generator=generator)
            network.train()
            optimizer.zero_grad()
            logits = network(data.normalise(data.train.images[chosen]).double())
            F.cross_entropy(logits, data.train.labels[chosen]).backward()
            optimizer.step()
    return entries


def plain_condensation(
    data: LabelledImages,
    network: nn.Module,
    count: int,
    size: int,
    iterations: int,
    reuse: int,
    strategy: str | None,
    passes: int | None,
) -> Tensor:
    data.setup()
    network = network.double()
    # With ``passes`` as many networks as are ever met.
    per_network = len(moments_for(count))
    pools = 1 if passes is None else -(-iterations // (size * per_network * passes))
    entries = plain_pool(data, network, count, size * pools, strategy)
    at_a_time = size * per_network
    images = torch.randn(data.num_classes * count, *data.image_shape, generator=stream(0, "start")).double()
    velocity = torch.zeros_like(images)
    for step in range(iterations):
        passed, place = divmod(step, at_a_time)
        first, order = 0, torch.randperm(at_a_time, generator=stream(passed, "pool"))
        if passes is not None:
            first = passed // passes * at_a_time
        if passed % (passes or iterations) == 0:
            order = torch.arange(at_a_time)
        state, targets, transforms = entries[first + int(order[place])]
        network.load_state_dict(state)
        network.eval()
        for _ in range(reuse):
            images.requires_grad_()
            loss = torch.zeros(())
            for label, (own, transform) in enumerate(zip(images.split(count), transforms, strict=True)):
                mean = F.cross_entropy(network(transform(own)), torch.full((count,), label))
                gradients = torch.autograd.grad(mean, list(network.parameters()), create_graph=True)
                for gradient, target in zip(gradients, targets[label], strict=True):
                    if gradient.ndim > 1:
                        for a, b in zip(gradient.flatten(1), target.flatten(1), strict=True):
                            loss = loss + 1 - (a * b).sum() / (a.norm() * b.norm() + 1e-6)
            (derivative,) = torch.autograd.grad(loss, images)
            velocity = 0.5 * velocity + derivative
            images = images.detach() - 0.1 * velocity
    return images


@pytest.mark.parametrize(
    ("count", "iterations", "reuse", "strategy", "passes", "norm"),
    [
        (1, 3, 1, None, None, "batch"),
        (4, 30, 1, None, None, "instance"),
        (2, 12, 2, "color_crop_cutout_flip_scale_rotate", None, "batch"),
        (1, 21, 1, None, 1, "instance"),
        (1, 21, 1, None, 2, "batch"),
    ],
    ids=["first states", "two passes and a half", "augmentation and reuse", "new networks", "new networks, two passes"],
)
def test_is_the_algorithm(
    kit: Any, count: int, iterations: int, reuse: int, strategy: str | None, passes: int | None, norm: str
) -> None:
    run = kit.condense(
        count,
        pool=2,
        pool_passes=passes,
        iterations=iterations,
        network_reuse=reuse,
        augmentation=strategy,
        network=kit.network(norm=norm),
        trainer={"precision": "64-true"},
    )
    plain = kit.data(batch_size=6), kit.network(norm=norm), count, 2, iterations, reuse, strategy, passes
    images = plain_condensation(*plain)
    torch.testing.assert_close(run.synthetic_images.detach(), images, rtol=1e-5, atol=1e-5)
    assert run.iteration == run.step == iterations


def test_takes_the_gradients_of_real_images_once(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, seen = matching.real_gradients, []

    def count(*arguments: Any) -> dict[str, Tensor]:
        seen.append(1)
        return exact(*arguments)

    monkeypatch.setattr(matching, "real_gradients", count)
    run = kit.condense(pool=2, iterations=20)
    assert len(seen) == 2 * 4
    assert run.real_images_seen == 2 * 4 * (6 + 5 + 6)
    assert all(run.seconds[part] > 0 for part in ("real", "synthetic", "network"))


def made(kit: Any, size: int, images_per_class: int) -> NetworkPool:
    data = kit.data(batch_size=6)
    data.setup()
    options = {"seed": 0, "images_per_class": images_per_class}
    network = kit.network().eval()
    gradients = Gradients(matched_parameters(network, "row_cosine"), "row_cosine")
    return NetworkPool(network, data, gradients, None, None, options, (1, 0), lambda part: nullcontext(), size)


def test_a_network_is_trained_as_far_as_it_is_wanted(kit: Any) -> None:
    networks = made(kit, 3, images_per_class=8)
    seen = [networks.goal(networks.data.class_batch(step)).real_images for step in range(9)]
    assert seen == [17] * 9
    assert {number: len(kept) for number, kept in networks._kept.items()} == {0: 7, 1: 2}


def test_a_state_is_the_same_whenever_it_is_wanted(kit: Any) -> None:
    """As in a resumed run, which comes to the states in another order and has other networks between them."""
    first, resumed = made(kit, 2, images_per_class=1), made(kit, 2, images_per_class=1)
    batches = [first.data.class_batch(step) for step in range(16)]
    expected = [(first.goal(batch).targets, copy.deepcopy(first.network.state_dict())) for batch in batches]
    for step in range(13, 16):
        targets, state = expected[step]
        found = resumed.goal(batches[step]).targets
        assert all(torch.equal(found[name], target) for name, target in targets.items())
        assert all(torch.equal(resumed.network.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_pass_visits_every_state_once(kit: Any) -> None:
    networks = made(kit, 3, images_per_class=1)
    passes = [[networks.visited(12 * number + place) for place in range(12)] for number in range(3)]
    assert passes[0] == sorted(passes[1]) == sorted(passes[2]) == list(range(12))
    assert passes[1] != passes[2]


def test_networks_that_were_replaced_are_not_kept(kit: Any) -> None:
    networks = made(kit, 2, images_per_class=1)
    networks.passes = 2
    for step in range(2 * 8 * 2 + 5):
        networks.goal(networks.data.class_batch(step))
        generation = step // 16
        assert {number // 2 for number in networks._kept} == {generation}
    assert networks._training.keys() == networks._kept.keys()
    visits = [networks.visited(step) for step in range(16, 32)]
    assert visits[:8] == list(range(8, 16)) == sorted(visits[8:])
    assert visits[8:] != visits[:8]


def test_a_run_that_is_over_keeps_no_networks(kit: Any) -> None:
    run = kit.condense(pool=1, iterations=2)
    assert not hasattr(run, "_networks")
    assert torch.equal(kit.images(copy.deepcopy(run)), kit.images(run))


def test_any_number_of_images_needs_no_loops(kit: Any) -> None:
    assert len(kit.condense(5, pool=1, iterations=1).synthetic_dataset()) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loops": (1, 1)}, r"Expected no `loops` with a pool of networks.*but got \(1, 1\)"),
        ({"pool": -1}, "Expected `pool` to be a whole number of at least 0, but got -1"),
        ({"pool_passes": 0}, "Expected `pool_passes` to be a whole number of at least 1, but got 0"),
        ({"pool": 1.5}, r"Expected `pool` to be a whole number of at least 0, but got 1\.5"),
    ],
)
def test_names_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientMatchingCondensation(**{"pool": 2} | options)
