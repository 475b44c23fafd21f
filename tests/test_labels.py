from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from leakage.labels import check_label_rule, infer_labels
from leakage.models import LeNet
from leakage.victim import Victim


def network(seed: int, *, classes: int, width: int, bias: bool, activation: nn.Module, scale: float) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, width), activation, nn.Linear(width, classes, bias=bias))
        for parameter in model.parameters():
            parameter.data.mul_(scale)
    return model


def images_and_labels(seed: int, victims: int, count: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(victims, count, 3, 2, 2, generator=generator)
    return images, torch.randint(classes, (victims, count), generator=generator)


@given(
    seed=st.integers(0, 2**16),
    classes=st.sampled_from([2, 3, 10, 257]),
    width=st.integers(1, 20),
    bias=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_the_label_of_one_image_is_exact_whatever_the_network(
    seed: int, classes: int, width: int, bias: bool, scale: float, reduction: str
) -> None:
    model = network(seed, classes=classes, width=width, bias=bias, activation=nn.Sigmoid(), scale=scale)
    victim = Victim(model, image_shape=(3, 2, 2), reduction=reduction)
    images, labels = images_and_labels(seed, 6, 1, classes)
    inferred = infer_labels(victim.share(images, labels), victim)
    assert inferred.dtype == torch.int64
    assert torch.equal(inferred, labels)


def test_each_victim_may_have_a_network_of_its_own() -> None:
    victim = Victim(LeNet(3, 8, num_classes=100), image_shape=(3, 8, 8))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 3, 8, 8, generator=generator)
    labels = torch.randint(100, (20, 1), generator=generator)
    shared = victim.share(images, labels, states=victim.fresh_states(list(range(20))))
    assert torch.equal(infer_labels(shared, victim), labels)


def test_scaled_gradients_tell_the_same_label() -> None:
    victim = Victim(LeNet(1, 8), image_shape=(1, 8, 8))
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(10, 1, 1, 8, 8, generator=generator), torch.arange(10)[:, None]
    shared = victim.share(images, labels)
    for gradient in shared.gradients.values():
        gradient *= 1e-6
    assert torch.equal(infer_labels(shared, victim), labels)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "labels", [[[1, 1, 4]], [[2, 2, 2]], [[0, 5, 9]], [[9, 0, 9]]], ids=["pair", "all", "none", "unsorted"]
)
def test_repeated_labels_of_an_untrained_network(labels: list[list[int]], bias: bool, reduction: str) -> None:
    # Weights near zero, as of a network that has hardly been trained: predictions are near uniform.
    model = network(3, classes=10, width=16, bias=bias, activation=nn.Sigmoid(), scale=0.3)
    victim = Victim(model, image_shape=(3, 2, 2), num_images=3, reduction=reduction)
    truth = torch.tensor(labels)
    images, _ = images_and_labels(3, 1, 3, 10)
    inferred = infer_labels(victim.share(images, truth), victim)
    assert inferred.tolist() == truth.sort(dim=1).values.tolist()


def test_most_labels_of_a_batch_of_the_published_network() -> None:
    victim = Victim(LeNet(1, 12), image_shape=(1, 12, 12), num_images=4)
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(30, 4, 1, 12, 12, generator=generator)
    labels = torch.randint(10, (30, 4), generator=generator).sort(dim=1).values
    shared = victim.share(images, labels, states=victim.fresh_states(list(range(30))))
    inferred = infer_labels(shared, victim)
    assert inferred.shape == (30, 4)
    assert torch.equal(inferred, inferred.sort(dim=1).values)
    # Its predictions are far from uniform, so the rule is no longer exact; guessing finds a third.
    recalled = sum(
        min(row.count(label), truth.count(label))
        for row, truth in zip(inferred.tolist(), labels.tolist(), strict=True)
        for label in set(row)
    )
    assert recalled / 120 > 0.6


ERRORS: list[Any] = [
    pytest.param(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
        {"loss": "mean_squared_error"},
        r"Expected a victim with loss 'cross_entropy'.*, but got loss 'mean_squared_error'\. Use DLGAttack.*reveal",
        id="loss",
    ),
    pytest.param(
        nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten()),
        {},
        r"Expected logits that are the output of an nn\.Linear layer.*, but got logits from Conv2d '0' and "
        r"operations after it\. Use DLGAttack",
        id="convolution",
    ),
    pytest.param(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softplus()),
        {},
        r"Expected logits that are the output of an nn\.Linear layer.*, but got logits from Linear '1' and ",
        id="activation",
    ),
    pytest.param(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 3).requires_grad_(False)),
        {},
        r"Expected the last layer '2' to share its gradient, but got frozen weights\. Use DLGAttack",
        id="frozen",
    ),
]


@pytest.mark.parametrize(("model", "options", "message"), ERRORS)
def test_says_why_the_rule_does_not_apply_and_what_does(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    victim = Victim(model, image_shape=(3, 2, 2), **options)
    with pytest.raises(ValueError, match=message):
        check_label_rule(victim)
    images, labels = images_and_labels(0, 2, 1, 3)
    shared = victim.share(images, labels)
    with pytest.raises(ValueError, match=message):
        infer_labels(shared, victim)


@pytest.mark.parametrize("classes", [3, 4, 20])
@pytest.mark.parametrize("seed", range(5))
def test_exact_for_one_image_without_bias_where_inputs_are_negative(seed: int, classes: int) -> None:
    model = network(seed, classes=classes, width=6, bias=False, activation=nn.LogSigmoid(), scale=1.0)
    victim = Victim(model, image_shape=(3, 2, 2))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (40, 1), generator=generator)
    shared = victim.share(torch.rand(40, 1, 3, 2, 2, generator=generator), labels)
    rows = shared.gradients[f"{victim.classifier}.weight"].sum(-1)
    assert not torch.equal(rows.argmin(1, keepdim=True), labels), "the sums of the rows alone are not enough"
    assert torch.equal(infer_labels(shared, victim), labels)


def test_a_frozen_weight_leaves_the_bias_to_read() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model[1].weight.requires_grad_(False)
    victim = Victim(model, image_shape=(3, 2, 2))
    labels = torch.tensor([[2], [0], [1]])
    assert torch.equal(infer_labels(victim.share(torch.rand(3, 1, 3, 2, 2), labels), victim), labels)


def test_a_linear_layer_that_is_applied_twice_tells_no_labels() -> None:
    layer = nn.Linear(12, 12)
    victim = Victim(nn.Sequential(nn.Flatten(), layer, nn.Sigmoid(), layer), image_shape=(3, 2, 2))
    with pytest.raises(ValueError, match=r"but got logits from Linear '1', applied 2 times\. Use DLGAttack"):
        infer_labels(victim.share(torch.rand(1, 1, 3, 2, 2), torch.tensor([[4]])), victim)
