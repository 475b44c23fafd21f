"""Distances and losses, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leakage import LeNet, Victim
from leakage.clients.losses import LOSSES, cross_entropy, mean_squared_error
from leakage.dummies import Pixels, RevealedLabels
from leakage.inversion.evaluator import Evaluator
from leakage.objectives import DISTANCES as CLASSES
from leakage.objectives import CosineDistance, RowCosineDistance, SquaredDistance

DISTANCES = {name: kind() for name, kind in CLASSES.items()}
squared_distance, cosine_distance, row_cosine_distance = SquaredDistance(), CosineDistance(), RowCosineDistance()

SHAPES = {"conv": (4, 2, 3, 3), "linear": (3, 5), "bias": (3,), "scale": ()}


def gradients_and_targets(generator, *batch):
    return [
        {
            name: torch.randn((*batch, *shape), generator=generator, dtype=torch.float64)
            for name, shape in SHAPES.items()
        }
        for _ in range(2)
    ]


def plain_squared(gradients, targets):
    return sum(((gradients[name] - target) ** 2).sum() for name, target in targets.items())


def plain_cosine(gradients, targets):
    inner = sum((gradients[name] * target).sum() for name, target in targets.items())
    lengths = [sum(tensor.square().sum() for tensor in side.values()).sqrt() for side in (gradients, targets)]
    return 1 - inner / (lengths[0] * lengths[1])


def plain_row_cosine(gradients, targets):
    total = 0
    for name in ("conv", "linear"):
        for row, target in zip(gradients[name], targets[name], strict=True):
            a, b = row.flatten(), target.flatten()
            total += 1 - torch.dot(a, b) / (a.square().sum().sqrt() * b.square().sum().sqrt() + 1e-6)
    return total


PLAIN = {"squared": plain_squared, "cosine": plain_cosine, "row_cosine": plain_row_cosine}


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_and_their_derivatives_are_those_of_a_plain_loop(name, generator):
    gradients, targets = gradients_and_targets(generator)
    for tensor in gradients.values():
        tensor.requires_grad_()
    results = []
    for distance in (DISTANCES[name], PLAIN[name]):
        value = distance(gradients, targets)
        assert value.shape == ()
        results.append((value, torch.autograd.grad(value, list(gradients.values()), materialize_grads=True)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_taken_apart_under_vmap(name, generator):
    gradients, targets = gradients_and_targets(generator, 4)
    found = torch.func.vmap(DISTANCES[name])(gradients, targets)
    for i in range(4):
        expected = PLAIN[name](*({key: tensor[i] for key, tensor in side.items()} for side in (gradients, targets)))
        torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("zero", ["gradients", "targets", "both", "a row"])
def test_distances_of_zero_gradients_are_finite_with_their_derivatives(name, zero, generator):
    gradients, targets = gradients_and_targets(generator, 2)
    for side, tensors in (("gradients", gradients), ("targets", targets)):
        for tensor in tensors.values():
            if zero in (side, "both"):
                tensor.zero_()
            elif zero == "a row" and tensor.ndim > 1:
                tensor[:, 0] = 0
    derivatives, values = torch.func.vmap(torch.func.grad_and_value(DISTANCES[name]))(gradients, targets)
    assert values.isfinite().all()
    assert all(derivative.isfinite().all() for derivative in derivatives.values())
    if zero == "both":
        # Two vectors without a direction: no angle of zero.
        expected = {"squared": 0.0, "cosine": 1.0, "row_cosine": 7.0}[name]
        torch.testing.assert_close(values, torch.full((2,), expected, dtype=torch.float64))


@pytest.mark.parametrize(("distance", "largest"), [(cosine_distance, 2.0), (row_cosine_distance, 14.0)])
def test_cosines_go_from_zero_to_opposite_whatever_the_lengths(distance, largest, generator):
    _, targets = gradients_and_targets(generator)
    for factor, expected in ((1.0, 0.0), (1e3, 0.0), (-1.0, largest), (-1e3, largest)):
        scaled = {name: factor * target for name, target in targets.items()}
        torch.testing.assert_close(distance(scaled, targets), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)


def test_rows_differ_from_one_long_vector():
    # One row matches, the much shorter other one is opposite: the long vector hardly sees it.
    targets = {"w": torch.tensor([[100.0, 0.0], [0.0, 0.1]])}
    gradients = {"w": torch.tensor([[100.0, 0.0], [0.0, -0.1]])}
    assert cosine_distance(gradients, targets) < 1e-4
    assert row_cosine_distance(gradients, targets) == pytest.approx(2, abs=1e-3)


def test_row_cosine_leaves_out_what_has_no_rows(generator):
    gradients, targets = gradients_and_targets(generator)
    others = gradients | {"bias": gradients["bias"] * -7, "scale": gradients["scale"] + 5}
    assert row_cosine_distance(gradients, targets) == row_cosine_distance(others, targets)
    with pytest.raises(ValueError, match=r"Expected a gradient of at least two dimensions, but got only \['bias'\]"):
        row_cosine_distance({"bias": torch.ones(3)}, {"bias": torch.ones(3)})


def test_the_small_number_below_the_fraction_is_that_of_the_paper():
    # |a||b| is 1e-6 too, so the cosine is halved.
    gradients, targets = {"w": torch.full((1, 1), 1e-3)}, {"w": torch.full((1, 1), 1e-3)}
    torch.testing.assert_close(row_cosine_distance(gradients, targets), torch.tensor(0.5))


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_name_what_does_not_fit(name):
    distance = DISTANCES[name]
    with pytest.raises(ValueError, match=r"with the same names, but got \['a'\] and \['a', 'b'\]"):
        distance({"a": torch.ones(1, 1)}, {"a": torch.ones(1, 1), "b": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"with the same shapes, but got \(2, 2\) and \(4,\) for 'w'"):
        distance({"w": torch.ones(2, 2)}, {"w": torch.ones(4)})


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


class WithoutBiases(SquaredDistance):
    def __call__(self, gradients: Any, shared: Any) -> Tensor:
        return torch.stack(
            [(gradients[name] - shared[name]).square().sum() for name in shared if "weight" in name]
        ).sum()


class Constant(SquaredDistance):
    def value(self, point: Any, kept: Any) -> Tensor:
        return 7 + 0 * point.images.sum()


@pytest.mark.parametrize("relative", [True, False])
def test_a_subclass_of_the_squared_distance_is_evaluated_as_it_is(relative: bool) -> None:
    """On a chain too, whose fast way knows only the whole distance."""
    victim = Victim(LeNet(1, 8, 5), image_shape=(1, 8, 8))
    images = torch.rand(3, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shared = victim.share(images, torch.tensor([[0], [1], [2]]), reveal_labels=True)
    # One gradient so small that it needs a unit of its own.
    shared.gradients = {name: part * torch.tensor([1.0, 1e-9, 1.0]).view(-1, *[1] * (part.ndim - 1))
                        for name, part in shared.gradients.items()}  # fmt: skip
    found = {}
    for kind in (SquaredDistance, WithoutBiases, Constant):
        evaluator = Evaluator(victim, kind(relative), Pixels(), RevealedLabels())
        kept = evaluator.begin(shared)
        found[kind], _ = evaluator(shared, kept, {"images": 1 - images})
        scale = kept["objective/0/scale"] if relative else torch.ones(3)
        unit = kept["objective/0/unit"] if relative else torch.ones(3)
        targets = torch.eye(5)[torch.tensor([[0], [1], [2]])]
        for index in range(3):
            gradients = victim.gradients(victim.state, 1 - images[index], targets[index])
            wanted = {name: part[index] for name, part in shared.gradients.items()}
            exact = 7.0 if kind is Constant else unit[index] ** 2 * kind(relative)(gradients, wanted)
            torch.testing.assert_close(found[kind][index], scale[index] * exact, rtol=1e-4, atol=0)
    assert bool((found[WithoutBiases] < found[SquaredDistance]).all())
