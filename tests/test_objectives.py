"""Distances and losses, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from leakage.objectives import LOSSES, cross_entropy, mean_squared_error, squared_distance


def test_squared_distance_sums_over_all_gradients(generator):
    shapes = {"w": (3, 4), "b": (3,), "scale": ()}
    gradients, targets = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)
    )
    expected = sum(F.mse_loss(gradients[name], targets[name], reduction="sum") for name in shapes)
    torch.testing.assert_close(squared_distance(gradients, targets), expected)
    assert squared_distance(targets, targets) == 0
    assert squared_distance(gradients, targets).shape == ()


def test_squared_distance_does_not_depend_on_order():
    a, b = torch.ones(2), torch.full((3,), 2.0)
    assert squared_distance({"a": a, "b": b}, {"b": b + 1, "a": a}) == 3


def test_squared_distance_is_per_victim_under_vmap(generator):
    gradients = {"w": torch.randn(5, 3, generator=generator)}
    targets = {"w": torch.randn(5, 3, generator=generator)}
    distances = torch.func.vmap(squared_distance)(gradients, targets)
    torch.testing.assert_close(distances, (gradients["w"] - targets["w"]).square().sum(1))


def test_squared_distance_errors():
    with pytest.raises(ValueError, match=r"of the same names, but got \['a'\] and \['a', 'b'\]"):
        squared_distance({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"of the same shapes, but got \(2, 2\) and \(2,\) for 'w'"):
        squared_distance({"w": torch.ones(2, 2)}, {"w": torch.ones(2)})


def test_cross_entropy_of_one_hot_and_of_soft_labels(generator):
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (6,), generator=generator)
    soft = torch.randn(6, 4, generator=generator, dtype=torch.float64).softmax(1)
    one_hot = F.one_hot(labels, 4).double()
    torch.testing.assert_close(cross_entropy(logits, one_hot), F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(cross_entropy(logits, soft), F.cross_entropy(logits, soft, reduction="none"))


def test_mean_squared_error(generator):
    logits = torch.randn(6, 4, generator=generator)
    targets = F.one_hot(torch.randint(4, (6,), generator=generator), 4).float()
    expected = F.mse_loss(logits, targets, reduction="none").mean(1)
    torch.testing.assert_close(mean_squared_error(logits, targets), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_per_image(loss):
    assert LOSSES[loss](torch.zeros(5, 3), torch.zeros(5, 3)).shape == (5,)
