"""Networks of the user's: with BatchNorm, frozen or unused weights, in other precisions; they are left as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.condensation import GradientMatchingCondensation
from leakage.condensation.matching import match, real_gradients
from leakage.models import draw_state
from leakage.seeds import derive_seed

INNER: dict[str, Any] = {"loops": (2, 2), "iterations": 2, "network_reuse": 2}


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_given_network_is_left_as_it_was(kit: Any, norm: str) -> None:
    network = kit.network(norm=norm)
    network.features[0].requires_grad_(False)
    network.features.train()
    network.classifier.eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    wanted = [parameter.requires_grad for parameter in network.parameters()]
    run = kit.condense(network=network, **INNER)
    assert run.network is not network
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == wanted
    assert all(parameter.grad is None for parameter in network.parameters())
    # Frozen weights are drawn with the others, but neither matched nor trained.
    assert "features.0.weight" not in [name for name, p in run.network.named_parameters() if p.requires_grad]


def test_what_the_weights_of_the_given_network_are_does_not_matter(kit: Any) -> None:
    networks = [kit.network(), kit.network()]
    assert not torch.equal(networks[0].classifier.weight, networks[1].classifier.weight)
    first, second = (kit.images(kit.condense(network=network, **INNER)) for network in networks)
    assert torch.equal(first, second)


def observed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Weights, buffers and modes of the network whenever real gradients are taken or images are matched."""
    seen: list[dict[str, Tensor]] = []

    def note(network: nn.Module) -> None:
        state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        seen.append(state | {"training": torch.tensor([module.training for module in network.modules()])})

    def watched_real(network: nn.Module, *arguments: Any) -> Any:
        note(network)
        return real_gradients(network, *arguments)

    def watched_match(network: nn.Module, *arguments: Any, **options: Any) -> Any:
        note(network)
        return match(network, *arguments, **options)

    monkeypatch.setattr("leakage.condensation.matching.real_gradients", watched_real)
    monkeypatch.setattr("leakage.condensation.matching.match", watched_match)
    return seen


def test_batchnorm_takes_its_statistics_from_real_images_in_every_step(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = observed(monkeypatch)
    data = kit.data(batch_size=6)
    kit.condense(network=kit.network(norm="batch"), data=data, iterations=2, loops=(2, 3), network_learning_rate=0.5)
    assert len(seen) == 8
    assert not any(state["training"].any() for state in seen)
    for step in range(4):
        # Those of the first convolution, whose inputs are the images themselves.
        state = seen[2 * step]
        images = data.normalise(data.class_batch(step).images)
        maps = nn.functional.conv2d(images, state["features.0.weight"], state["features.0.bias"], padding=1)
        torch.testing.assert_close(state["features.1.running_mean"], maps.mean((0, 2, 3)))
        torch.testing.assert_close(state["features.1.running_var"], maps.var((0, 2, 3)))
        assert all(torch.equal(state[name], tensor) for name, tensor in seen[2 * step + 1].items())


def test_each_iteration_draws_a_network_and_training_changes_it(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observed(monkeypatch)
    kit.condense(iterations=2, loops=(2, 3), seed=4)
    for iteration in range(2):
        drawn = draw_state(kit.network(), derive_seed(4, iteration, "network"))
        first, second = seen[4 * iteration], seen[4 * iteration + 2]
        assert all(torch.equal(first[name], tensor) for name, tensor in drawn.items())
        assert not any(torch.equal(second[name], tensor) for name, tensor in drawn.items() if "weight" in name)


def test_dropout_is_off(kit: Any) -> None:
    def network(share: float) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(share), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 3))

    with_dropout, without = (kit.images(kit.condense(network=network(share), **INNER)) for share in (0.9, 0.0))
    assert torch.equal(with_dropout, without)


class TwoHeads(nn.Module):
    """A network with weights that its logits do not depend on."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main
        self.auxiliary = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.main(images)
        return logits


def test_unused_weights_do_not_matter(kit: Any) -> None:
    found = kit.condense(network=TwoHeads(kit.network()), **INNER)
    expected = kit.condense(network=kit.network(), **INNER)
    torch.testing.assert_close(kit.images(found), kit.images(expected))


def test_precisions(kit: Any) -> None:
    runs = {name: kit.condense(trainer={"precision": name}, **INNER) for name in ("32-true", "64-true", "bf16-mixed")}
    dtypes = {name: run.synthetic_images.dtype for name, run in runs.items()}
    assert dtypes == {"32-true": torch.float32, "64-true": torch.float64, "bf16-mixed": torch.float32}
    assert all(run.synthetic_set().images.dtype == torch.float32 for run in runs.values())
    # The same run up to rounding. Weights are drawn in the precision of the network, so not in double precision.
    single, mixed = kit.images(runs["32-true"]), kit.images(runs["bf16-mixed"])
    assert not torch.equal(single, mixed)
    torch.testing.assert_close(mixed, single, atol=0.2, rtol=0)
    start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(derive_seed(0, 0, "start")))
    moved = [float((run.synthetic_images.detach() - start).norm()) for run in runs.values()]
    assert min(moved) > 0.5 * max(moved)


def test_the_trainer_decides_about_the_precision_of_a_given_network(kit: Any) -> None:
    run = kit.condense(network=kit.network().double(), **INNER)
    assert torch.equal(kit.images(run), kit.images(kit.condense(**INNER)))


@pytest.mark.parametrize("distance", ["row_cosine", "cosine", "squared"])
def test_every_distance_is_lowered(kit: Any, distance: str) -> None:
    # One network, the same real images (all of each class): the loss falls from update to update.
    rate = {"row_cosine": 0.1, "cosine": 1.0, "squared": 1e-2}[distance]
    first, last = (
        kit.condense(
            data=kit.data(batch_size=9), distance=distance, iterations=1, network_reuse=reuse, learning_rate=rate
        )
        for reuse in (1, 30)
    )
    assert last.last_loss < 0.9 * first.last_loss


def test_batchnorm_is_deterministic(kit: Any) -> None:
    runs = [kit.condense(network=kit.network(norm="batch"), **INNER) for _ in range(2)]
    assert torch.equal(kit.images(runs[0]), kit.images(runs[1]))


def test_logs_the_loss_and_where_the_time_goes(kit: Any) -> None:
    run = GradientMatchingCondensation(network=kit.network(), **INNER)
    trainer = kit.trainer()
    trainer.fit(run, datamodule=kit.data(batch_size=6))
    metrics = trainer.callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(run.last_loss)
    assert metrics["train/images_per_second"] > 0
    assert {name for name in metrics if name.startswith("time/")} == {f"time/{part}" for part in run.seconds}
    assert run.seconds["network"] > 0
    assert run.seconds["evaluation"] == 0
