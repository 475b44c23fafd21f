"""Distribution matching as a whole, against a plain loop of the paper's algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.condensation import (
    CondensationProtocol,
    DistributionMatchingCondensation,
    SiameseAugmentation,
    SyntheticSet,
    random_images,
)
from leakage.condensation.kmeans import _centres
from leakage.datamodules import LabelledImages
from leakage.models import ConvNet, draw_state
from leakage.seeds import derive_seed

DM = DistributionMatchingCondensation
ALL = "color_crop_cutout_flip_scale_rotate"


def stream(index: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(0, index, name))


def embedding(network: ConvNet, images: Tensor) -> Tensor:
    return network.features(images).flatten(1)


def nearest_to_centres(network: ConvNet, data: LabelledImages, size: int, generator: torch.Generator) -> list[Tensor]:
    """Of each class so many of four times as many, nearest to the centres of clusters; one after another."""
    chosen = []
    for label in range(data.num_classes):
        images = data.train.images[data.train.labels == label]
        images = images[torch.randperm(len(images), generator=generator)[: 4 * size]]
        points = embedding(network, data.normalise(images).double()).detach()
        left = list(range(len(points)))
        for centre in _centres(points, size, generator):
            left.sort(key=lambda i: float((points[i] - centre).norm()))
            chosen.append(images[left.pop(0)])
    return list(torch.stack(chosen).split(size))


def plain_condensation(
    data: LabelledImages,
    network: ConvNet,
    *,
    iterations: int,
    images_per_class: int = 1,
    augmentation: str | None = None,
    network_reuse: int = 1,
    decay: bool = False,
    real_images: str = "random",
) -> tuple[Tensor, float]:
    """Class by class, in double precision; the images and the last loss."""
    data.setup()
    network = network.double()
    classes = range(data.num_classes)
    images = random_images(data, images_per_class, derive_seed(0, 0, "start")).normalised().double()
    velocity, loss, updates = torch.zeros_like(images), torch.zeros(()), 0
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for step in range(iterations):
        network.load_state_dict(draw_state(network, derive_seed(0, step, "network")))
        batch = data.class_batch(step)
        real = [batch.images[batch.labels == label] for label in classes]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            network.train()(data.normalise(torch.cat([own[:16] for own in real])).double())
        network.eval()
        if real_images == "kmeans":
            assert data.batch_size is not None
            real = nearest_to_centres(network, data, data.batch_size, stream(step, "clusters"))
        drawn = stream(step, "augmentation")
        transforms: list[Any] = [
            SiameseAugmentation(augmentation).draw(drawn) if augmentation else nn.Identity() for _ in classes
        ]
        for _ in range(network_reuse):
            images.requires_grad_()
            loss = torch.zeros(())
            for transform, some, own in zip(transforms, real, images.split(images_per_class), strict=True):
                target = embedding(network, transform(data.normalise(some).double())).mean(0).detach()
                loss = loss + (target - embedding(network, transform(own)).mean(0)).pow(2).sum()
            (derivative,) = torch.autograd.grad(loss, images)
            velocity = 0.5 * velocity + derivative
            rate = 1 - updates / (iterations * network_reuse) if decay else 1.0
            images = images.detach() - rate * velocity
            updates += 1
    return images, float(loss.detach())


CASES = [
    pytest.param({"iterations": 1}, id="one step"),
    pytest.param({"iterations": 4, "images_per_class": 3}, id="momentum over networks"),
    pytest.param({"iterations": 3, "images_per_class": 2, "augmentation": ALL}, id="augmentation"),
    pytest.param({"iterations": 2, "network_reuse": 3, "decay": True}, id="reuse and decay"),
    pytest.param({"iterations": 3, "real_images": "kmeans"}, id="real images from clusters"),
]


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_is_the_algorithm_of_the_paper(kit: Any, case: dict[str, Any], norm: str) -> None:
    # From two images in a cluster its centre is as far: which one is taken is a matter of rounding.
    size = 1 if "real_images" in case else 6
    options = {"augmentation": None} | case
    network = kit.network(norm=norm)
    run = kit.condense(kind=DM, network=network, data_batch_size=size, trainer={"precision": "64-true"}, **options)
    images, loss = plain_condensation(kit.data(batch_size=size), kit.network(norm=norm), **case)
    # Real images are normalised in single precision there.
    torch.testing.assert_close(run.synthetic_images.detach(), images, rtol=1e-6, atol=1e-6)
    assert run.last_loss == pytest.approx(loss, rel=1e-6)
    assert run.iteration == run.step == case["iterations"]
    assert run.real_images_seen == (3 if size == 1 else 6 + 5 + 6) * case["iterations"]


def test_as_published() -> None:
    protocol = CondensationProtocol(
        iterations=20_000, batch_size=256, learning_rate=1.0, momentum=0.5, initialization="real"
    )
    for count in (1, 10, 50, 7):
        condensation = DM(count)
        assert condensation.protocol == protocol
        assert (condensation.outer, condensation.hparams["augmentation"]) == (1, ALL)
    assert DM(iterations=3, momentum=0).protocol.iterations == 3


def states(steps: int) -> Iterator[tuple[int, int]]:
    """Which network and which of its four states each step visits, of a pool of two with one image of a class."""
    for step in range(steps):
        passed, place = divmod(step, 8)
        order = torch.randperm(8, generator=stream(passed, "pool")).tolist() if passed else list(range(8))
        yield divmod(order[place], 4)


def test_on_a_pool_the_means_are_worked_out_once(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    exact = DM.configure_matching

    def noted(self: DM, data: LabelledImages) -> Any:
        matching = exact(self, data)
        match = type(matching).match

        def watched(own: Any, network: nn.Module, targets: dict[str, Tensor], *rest: Any) -> Any:
            seen.append(targets["classifier"])
            return match(own, network, targets, *rest)

        monkeypatch.setattr(type(matching), "match", watched)
        return matching

    monkeypatch.setattr(DM, "configure_matching", noted)
    run = kit.condense(kind=DM, pool=2, iterations=20, augmentation=None)
    assert run.real_images_seen == 2 * 4 * (6 + 5 + 6)
    visits = list(states(20))
    for target, visit in zip(seen, visits, strict=True):
        assert torch.equal(target, seen[visits.index(visit)])
    # The first state is as drawn.
    data, network = kit.data(batch_size=6), kit.network()
    data.setup()
    network.load_state_dict(draw_state(network, derive_seed(0, 0, "network")))
    batch = data.class_batch(0)
    means = [embedding(network, data.normalise(batch.images[batch.labels == label])).mean(0) for label in range(3)]
    torch.testing.assert_close(seen[0], torch.stack(means).detach(), rtol=1e-2, atol=1e-3)


def test_the_mean_embedding_comes_nearer_on_networks_not_seen(kit: Any) -> None:
    data = LabelledImages("sample", batch_size=16)

    def distance(**options: Any) -> float:
        """To the mean of all images of each class, on three networks of its own."""
        condensation = DM(2, network=ConvNet(width=8), augmentation=None, **options)
        kit.trainer().fit(condensation, datamodule=data)
        total = 0.0
        for seed in range(3):
            network = ConvNet(width=8).eval()
            network.load_state_dict(draw_state(network, seed))
            with torch.no_grad():
                for label, own in enumerate(condensation.synthetic_images.detach().split(2)):
                    real = data.normalise(data.train.images[data.train.labels == label])
                    total += float((embedding(network, real).mean(0) - embedding(network, own).mean(0)).norm() ** 2)
        return total

    assert distance(iterations=15) < 0.6 * distance(iterations=1, learning_rate=1e-30)


def test_what_it_says_of_itself(kit: Any, tmp_path: Any) -> None:
    run = kit.condense(2, kind=DM, iterations=2, factor=2, initialization="noise")
    run.save(tmp_path)
    recipe = SyntheticSet.load(tmp_path / "synthetic.safetensors").recipe
    assert recipe is not None
    assert (recipe.method, recipe.options["iterations"], recipe.options["learning_rate"]) == ("dm", 2, 1.0)
    assert recipe.options["augmentation"] == ALL
    assert not {"distance", "protocol"} & recipe.options.keys()


def test_batchnorm_in_bfloat16(kit: Any) -> None:
    """Which gradient matching refuses."""
    single, mixed = (
        kit.images(
            kit.condense(kind=DM, network=kit.network(norm="batch"), iterations=2, trainer={"precision": precision})
        )
        for precision in ("32-true", "bf16-mixed")
    )
    assert not torch.equal(single, mixed)
    torch.testing.assert_close(mixed, single, atol=0.2, rtol=0)


def test_names_what_it_does_not_take(kit: Any) -> None:
    last = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1))
    with pytest.raises(
        ValueError, match=r"logits are the output of an nn\.Linear.*but got Sequential with logits from"
    ):
        kit.condense(kind=DM, network=last, iterations=1)
    with pytest.raises(ValueError, match="with trainable weights, but got ConvNet without"):
        kit.condense(kind=DM, network=kit.network().requires_grad_(False), iterations=1)
    with pytest.raises(ValueError, match="Expected `images_per_class` to be a whole number of at least 1, but got 0"):
        DM(0)
    with pytest.raises(ValueError, match=r"Expected `images_per_class` of at most .*but got 6"):
        kit.condense(6, kind=DM, iterations=1)
    with pytest.raises(TypeError, match="loops"):
        DM(loops=(1, 1))
