"""Priors, and how terms add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leakage.clients import Activation
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.models import LeNet
from leakage.objectives import (
    L2,
    BatchNormStatistics,
    CosineDistance,
    Point,
    SquaredDistance,
    Sum,
    Term,
    TotalVariation,
)


def images(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(shown: Tensor) -> Point:
    gradient = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double(), "b": torch.tensor([0.1, 0.2]).double()}
    shared = {"w": torch.tensor([[2.0, 1.0], [0.0, 3.0]]).double(), "b": torch.tensor([0.0, 1.0]).double()}
    return Point(shown, torch.eye(2).double(), gradient, shared, {}, {})


def plain_variation(shown: Tensor, kind: str) -> float:
    """Pixel by pixel."""
    down, across, both, every = [], [], [], []
    for image in shown.flatten(0, 1).tolist():
        for row in range(len(image)):
            for column in range(len(image[0])):
                if row + 1 < len(image):
                    down.append(image[row + 1][column] - image[row][column])
                if column + 1 < len(image[0]):
                    across.append(image[row][column + 1] - image[row][column])
                if row + 1 < len(image) and column + 1 < len(image[0]):
                    both.append((down[-1] ** 2 + across[-1] ** 2) ** 0.5)
                below, right = row + 1 < len(image), column + 1 < len(image[0])
                squares = below * down[-1] ** 2 + right * across[-1] ** 2 if down and across else 0
                every.append((squares + 0.01**2) ** 0.5 - 0.01)
    if kind == "smooth":
        return sum(every) / len(every)
    if kind == "isotropic":
        return sum(both) / len(both)
    size = abs if kind == "anisotropic" else lambda difference: difference**2
    return sum(map(size, down)) / len(down) + sum(map(size, across)) / len(across)


@pytest.mark.parametrize("kind", ["anisotropic", "isotropic", "smooth", "squared"])
def test_total_variation_is_that_of_a_plain_loop(kind: str) -> None:
    assert float(TotalVariation(kind)(images())) == pytest.approx(plain_variation(images(), kind), rel=1e-6)


@pytest.mark.parametrize("kind", ["anisotropic", "isotropic", "smooth", "squared"])
def test_total_variation_is_least_and_has_a_slope_where_images_are_flat(kind: str) -> None:
    flat = torch.full((1, 1, 4, 4), 0.3, dtype=torch.float64, requires_grad=True)
    value = TotalVariation(kind)(flat)
    assert value == 0
    assert torch.autograd.grad(value, flat)[0].isfinite().all()
    assert TotalVariation(kind)(torch.zeros(1, 1, 1, 1)) == 0, "no neighbours"
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of \['anisotropic', .*\], but got 'l1'"):
        TotalVariation("l1")


SQUARES = [L2(), TotalVariation("squared"), TotalVariation("smooth"), SquaredDistance(), CosineDistance()]


@pytest.mark.parametrize("term", SQUARES, ids=repr)
def test_residuals_are_the_root_of_the_value(term: Term) -> None:
    at = point(images())
    assert term.is_sum_of_squares
    torch.testing.assert_close(term.residuals(at, {}).square().sum(), term.value(at, {}))


@pytest.mark.parametrize("term", SQUARES[:3], ids=repr)
def test_residuals_have_the_slope_of_the_value(term: Term) -> None:
    values = [lambda at: term.value(at, {}), lambda at: term.residuals(at, {}).square().sum()]
    shown = [images().requires_grad_() for _ in values]
    by_value, by_residuals = (
        torch.autograd.grad(value(point(x)), x)[0] for value, x in zip(values, shown, strict=True)
    )
    torch.testing.assert_close(by_value, by_residuals)


@pytest.mark.parametrize("term", [TotalVariation(), BatchNormStatistics()], ids=repr)
def test_other_terms_say_that_they_are_no_sum_of_squares(term: Term) -> None:
    assert not term.is_sum_of_squares


def test_no_residuals_of_what_is_no_sum_of_squares() -> None:
    with pytest.raises(NotImplementedError, match="Expected a term that is a sum of squares, but got BatchNorm"):
        BatchNormStatistics().residuals(point(images()), {})


def test_batch_norm_statistics_are_those_of_a_plain_loop() -> None:
    maps = images()
    mean, variance = torch.tensor([0.5, 0.1, 0.9]).double(), torch.tensor([0.2, 0.3, 0.1]).double()
    expected = 0.0
    for statistic, running in (("mean", mean), ("var", variance)):
        squares = 0.0
        for channel in range(3):
            values = maps[:, channel].flatten().tolist()
            average = sum(values) / len(values)
            found = average if statistic == "mean" else sum((v - average) ** 2 for v in values) / len(values)
            squares += (found - float(running[channel])) ** 2
        expected += squares**0.5
    state = {"norm.running_mean": mean, "norm.running_var": variance}
    found = BatchNormStatistics()({"norm": Activation(maps, maps)}, state)
    assert float(found) == pytest.approx(expected)


def test_batch_norm_statistics_have_a_slope_at_zero() -> None:
    maps = torch.zeros(1, 2, 3, 3, requires_grad=True)
    state = {"norm.running_mean": torch.zeros(2), "norm.running_var": torch.zeros(2)}
    value = BatchNormStatistics()({"norm": Activation(maps, maps)}, state)
    assert torch.autograd.grad(value, maps)[0].isfinite().all()


def test_batch_norm_statistics_look_at_layers_with_running_statistics_alone() -> None:
    norms = nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), *norms, nn.Flatten(), nn.Linear(72, 10)).eval()
    assert list(BatchNormStatistics().watched(Victim(model, image_shape=(1, 8, 8)))) == ["1"]


def test_terms_add_up_with_weights() -> None:
    total = 2 * (CosineDistance() + 0.5 * L2()) + TotalVariation()
    assert isinstance(total, Sum)
    assert [(weight, type(term)) for weight, term in total.parts()] == [
        (2.0, CosineDistance),
        (1.0, L2),
        (1.0, TotalVariation),
    ]
    assert repr(total) == "2 * CosineDistance() + L2() + TotalVariation(kind='anisotropic')"
    assert [weight for weight, _ in (3 * SquaredDistance()).parts()] == [3.0]
    assert (SquaredDistance() + 0 * L2()).parts()[1:] == []
    assert repr(0 * L2()) == "0"
    assert repr(sum([L2(), CosineDistance() / 4])) == "L2() + 0.25 * CosineDistance()"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: float("nan") * L2(), "Expected `weights` of at least 0, but got nan"),
        (lambda: -1 * L2(), "Expected `weights` of at least 0, but got -1"),
        (lambda: "1" * L2(), "Expected `weights` of at least 0, but got '1'"),
        (lambda: Sum([]), "Expected at least one of `terms` and as many `weights`, but got 0 and 0"),
        (lambda: Sum([L2()], [1.0, 2.0]), "Expected at least one of `terms` and as many `weights`, but got 1 and 2"),
        (lambda: Sum([torch.nn.MSELoss()]), "Expected `terms` of leakage.objectives, .* but got MSELoss"),
    ],
)
def test_names_what_does_not_add_up(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_term_and_something_else_do_not_add_up() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = L2() + 1


def shared_of(*norms: float, dtype: torch.dtype = torch.float32) -> SharedGradient:
    victim = Victim(LeNet(1, 12), image_shape=(1, 12, 12))
    shared = victim.share(torch.rand(len(norms), 1, 1, 12, 12), torch.zeros(len(norms), 1, dtype=torch.long))
    shared = shared.to(dtype)
    for row, norm in enumerate(norms):
        size = sum(tensor[row].double().square().sum() for tensor in shared.gradients.values()).sqrt()
        for tensor in shared.gradients.values():
            tensor[row] *= norm / size
    return shared


def test_units_are_powers_of_two_and_one_where_nothing_is_lost() -> None:
    shared = shared_of(1e-18, 1e-3, 1.0, 1e3, 1e20)
    kept = SquaredDistance().begin(shared, Victim(LeNet(1, 12), image_shape=(1, 12, 12)))
    units = kept["unit"].tolist()
    assert units[1:4] == [1.0, 1.0, 1.0]
    assert units[0] > 1e16
    assert units[4] < 1e-18
    assert all(float(torch.tensor(unit).log2()) % 1 == 0 for unit in units)
    # What the unit and the scale make of a gradient has length 1.
    lengths = (
        torch.tensor([1e-18, 1e-3, 1.0, 1e3, 1e20]).double() * kept["unit"].double() * kept["scale"].double().sqrt()
    )
    torch.testing.assert_close(lengths, torch.ones(5).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("distance", "dtype", "expected"),
    [
        (SquaredDistance(), torch.float32, [False, False, True]),
        (SquaredDistance(), torch.float64, [False, True, True]),
        (SquaredDistance(relative=False), torch.float32, [False, True, True]),
        (CosineDistance(), torch.float32, [False, True, True]),
    ],
    ids=["float32", "float64", "absolute", "cosine"],
)
def test_which_gradients_say_something(distance: Term, dtype: torch.dtype, expected: list[bool]) -> None:
    assert distance.informative(shared_of(0.0, 4e-26, 1e-8, dtype=dtype)).tolist() == expected


def test_the_cosine_distance_keeps_its_digits_near_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(10_000, generator=generator)
    other = gradient + 1e-4 * torch.randn(10_000, generator=generator)
    exact = CosineDistance()({"w": gradient.double()}, {"w": other.double()})
    found = CosineDistance()({"w": gradient}, {"w": other})
    assert 4e-9 < float(exact) < 6e-9
    assert float(found) == pytest.approx(float(exact), rel=1e-2)
    assert CosineDistance()({"w": gradient}, {"w": gradient}) == 0
    tiny = {"w": 1e-30 * gradient}
    assert float(CosineDistance()(tiny, {"w": other})) == pytest.approx(float(exact), rel=1e-2)
