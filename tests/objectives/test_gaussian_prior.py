"""The normal distribution of images: what it says, and how it is weighed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad

from leakage import LeNet, Victim
from leakage.attacks import GaussNewtonAttack
from leakage.datamodules import LabelledImages, Victims, in_unit_range
from leakage.defenses import DPSGD, Defense, GaussianNoise, LaplaceNoise, TopK
from leakage.dummies import InferredLabels, Pixels
from leakage.inversion.evaluator import Evaluator
from leakage.inversion.simulation import known_to
from leakage.labels import Auxiliary
from leakage.objectives import GaussianPrior, Point, SquaredDistance
from tests.kit import fit

SHAPE, CLASSES = (1, 3, 2), 3


def draw(count: int, label: int, seed: int = 0) -> Tensor:
    """Images of a class: of its own brightness, and neighbours that go together."""
    generator = torch.Generator().manual_seed(10 * seed + label)
    mixed = torch.randn(count, 6, generator=generator) @ mixing(label)
    return (0.2 + 0.2 * label + mixed).clamp(0, 1).view(count, *SHAPE)


def mixing(label: int) -> Tensor:
    return 0.04 * (torch.eye(6) + 0.5 * torch.ones(6, 6).tril(label))


def own_images(count: int = 4000, labelled: bool = True) -> Auxiliary:
    labels = torch.arange(CLASSES).repeat_interleave(count)
    return Auxiliary(torch.cat([draw(count, label) for label in range(CLASSES)]), labels if labelled else None)


def point(images: Tensor, targets: Tensor) -> Point:
    return Point(images, targets, {"w": torch.zeros(4)}, {"w": torch.zeros(4)}, {}, {})


def test_is_the_distance_of_mahalanobis() -> None:
    prior = GaussianPrior(own_images())
    prior.prepare(torch.zeros((), dtype=torch.float64))
    for label in range(CLASSES):
        images = draw(50, label, seed=1).double()
        covariance = (mixing(label).T @ mixing(label)).double()
        apart = images.flatten(1) - (0.2 + 0.2 * label)
        expected = torch.einsum("nd,nd->n", apart, torch.linalg.solve(covariance, apart.T).T)
        targets = torch.eye(CLASSES).double()[[label]]
        found = torch.stack([prior(image[None], targets) for image in images])
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.2)


def test_without_labels_it_is_one_distribution_of_all() -> None:
    prior = GaussianPrior(own_images(labelled=False))
    images = draw(1, 0, seed=1).double()
    one, other = (prior(images, torch.eye(CLASSES).double()[[label]]) for label in (0, 2))
    assert one == other
    everything = own_images().images.flatten(1).double()
    apart = images.flatten(1)[0] - everything.mean(0)
    expected = apart @ torch.linalg.solve(everything.T.cov(), apart)
    torch.testing.assert_close(one, expected, rtol=0.1, atol=0)


def test_residuals_add_up_and_derivatives_are_those_of_the_value() -> None:
    prior = GaussianPrior(own_images(200))
    images = torch.rand(2, 3, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = torch.rand(2, 3, CLASSES, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(2)
    values, by_images, by_targets = prior.batched(None)(None, {}, images, targets)  # type: ignore[arg-type]
    for victim in range(2):
        here = point(images[victim], targets[victim])
        torch.testing.assert_close(prior.residuals(here, {}).square().sum(), values[victim])
        torch.testing.assert_close(prior.value(here, {}), values[victim])
        slope = grad(lambda shown, soft: prior(shown, soft), argnums=(0, 1))(images[victim], targets[victim])
        torch.testing.assert_close(by_images[victim], slope[0])
        torch.testing.assert_close(by_targets[victim], slope[1])
        step = torch.zeros_like(images[victim])
        step[1, 0, 2, 1] = 1e-6
        difference = prior(images[victim] + step, targets[victim]) - prior(images[victim] - step, targets[victim])
        torch.testing.assert_close(difference / 2e-6, slope[0][1, 0, 2, 1], rtol=1e-5, atol=1e-5)


def test_few_images_say_little_of_directions_they_do_not_have() -> None:
    few, many = GaussianPrior(own_images(8, labelled=False)), GaussianPrior(own_images(2000, labelled=False))
    generator = torch.Generator().manual_seed(0)
    strange = 0.4 + 0.2 * torch.randn(200, *SHAPE, generator=generator, dtype=torch.float64)
    targets = torch.eye(1).double()
    surprise = [torch.stack([prior(image[None], targets) for image in strange]).mean() for prior in (few, many)]
    assert surprise[0] < 2 * surprise[1]


def weight(
    defenses: list[Defense], adaptive: bool = True, images: int = 1, reduction: str = "mean"
) -> tuple[float, ...]:
    """That the prior is given, that which the relative variance of the noise asks for, and the entries there are."""
    victim = Victim(LeNet(), image_shape=(1, 28, 28), num_images=images, defenses=defenses, reduction=reduction)
    generator = torch.Generator().manual_seed(0)
    shared = victim.share(
        torch.rand(1, images, 1, 28, 28, generator=generator), torch.zeros(1, images).long(), reveal_labels=True
    )
    noise = torch.rand(20, 1, 28, 28, generator=generator)
    told = victim.without_secrets()
    evaluator = Evaluator(
        told,
        SquaredDistance() + GaussianPrior(Auxiliary(noise)),
        Pixels(),
        InferredLabels(),
        defenses=known_to(adaptive, told),
    )
    squares = sum(float(tensor.double().square().sum()) for tensor in shared.gradients.values())
    entries = sum(tensor.numel() for tensor in shared.gradients.values())
    return float(evaluator.begin(shared)["objective/1/scale"]), squares, entries


@pytest.mark.parametrize(
    ("defenses", "images", "reduction", "variance"),
    [
        ([GaussianNoise(0.01)], 1, "mean", 1e-4),
        ([LaplaceNoise(0.01)], 1, "mean", 1e-4),
        ([DPSGD(0.5, norm=0.1)], 1, "mean", 2.5e-3),
        ([DPSGD(0.5, norm=0.1)], 2, "mean", 2.5e-3 / 4),
        ([DPSGD(0.5, norm=0.1)], 2, "sum", 2.5e-3),
        ([TopK(0.5), GaussianNoise(0.01), GaussianNoise(0.02)], 1, "mean", 5e-4),
    ],
)
@pytest.mark.filterwarnings("ignore:The clients defend")
def test_is_weighed_by_the_noise(defenses: list[Defense], images: int, reduction: str, variance: float) -> None:
    found, squares, _ = weight(defenses, images=images, reduction=reduction)
    assert found == pytest.approx(variance / squares, rel=1e-5)


def test_relative_noise_is_that_of_the_gradient_alone() -> None:
    found, _, entries = weight([GaussianNoise(3.0, relative=True)])
    assert found == pytest.approx(9 / 10 / entries, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The clients defend")
@pytest.mark.parametrize("adaptive", [False, True])
def test_weighs_as_much_as_rounding_where_no_noise_is_known_of(adaptive: bool) -> None:
    found, _, entries = weight([GaussianNoise(0.01)] if not adaptive else [], adaptive=adaptive)
    assert found == pytest.approx(1e-10 / entries, rel=1e-5)


def test_finds_more_behind_noise() -> None:
    data = LabelledImages("sample")
    data.setup("fit")
    defenses = [GaussianNoise(0.1, relative=True)]
    victims = Victims(data.test, num_classes=10, victims=2, defenses=defenses, reveal_labels=True)
    own = Auxiliary(in_unit_range(data.train.images), data.train.labels)
    mse = []
    for prior in (None, GaussianPrior(own)):
        attack = fit(GaussNewtonAttack(prior=prior, start="noise", max_evaluations=5, restarts=0), victims)
        mse.append(sum(score.mse for score in attack.scores.values()) / 2)
    assert mse[1] < mse[0] / 2


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"Expected `auxiliary` to be a leakage.labels.Auxiliary, but got Tensor"):
        GaussianPrior(torch.zeros(20, 1, 2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least eight .* of every class .*, but got fewer of \[1\]"):
        GaussianPrior(Auxiliary(torch.rand(17, 1, 2, 2), torch.tensor([0] * 10 + [1] * 7)))
    with pytest.raises(ValueError, match="Expected `seed`"):
        GaussianPrior(Auxiliary(torch.rand(17, 1, 2, 2)), seed=-1)
    with pytest.raises(ValueError, match=r"Expected `prior` to be a term of leakage.objectives.*, but got str"):
        GaussNewtonAttack(prior="gaussian")  # type: ignore[arg-type]
    small = GaussianPrior(Auxiliary(torch.rand(17, 1, 2, 2)))
    with pytest.raises(ValueError, match=r"Expected `auxiliary` images of shape \(1, 28, 28\)"):
        fit(GaussNewtonAttack(prior=small), Victims("sample", victims=1))


def test_is_told_by_all_of_its_images() -> None:
    images = torch.rand(2000, 1, 2, 2)
    other = images.clone()
    other[1000] = 1 - other[1000]
    assert repr(GaussianPrior(Auxiliary(images))) == repr(GaussianPrior(Auxiliary(images.clone())))
    assert repr(GaussianPrior(Auxiliary(images))) != repr(GaussianPrior(Auxiliary(other)))


def test_the_precision_of_an_earlier_search_leaves_no_trace() -> None:
    prior = GaussianPrior(own_images(200))
    images, targets = draw(2, 0, seed=1).double(), torch.eye(CLASSES).double()[[0, 1]]
    before = prior(images, targets)
    prior.prepare(torch.zeros((), dtype=torch.float32))
    prior.prepare(torch.zeros((), dtype=torch.float64))
    assert torch.equal(prior(images, targets), before)


@pytest.mark.parametrize("hidden", [False, True])
def test_noise_is_in_the_unit_of_what_was_shared(hidden: bool) -> None:
    rate = {"learning_rate": 0.01, "reveal_learning_rate": False} if hidden else {}
    victim = Victim(LeNet(), image_shape=(1, 28, 28), defenses=[GaussianNoise(1e-4)], **rate)
    generator = torch.Generator().manual_seed(0)
    shared = victim.share(
        torch.rand(1, 1, 1, 28, 28, generator=generator), torch.zeros(1, 1).long(), reveal_labels=True
    )
    told = victim.without_secrets()
    objective = SquaredDistance() + GaussianPrior(Auxiliary(torch.rand(20, 1, 28, 28, generator=generator)))
    evaluator = Evaluator(told, objective, Pixels(), InferredLabels(), defenses=known_to(True, told))
    squares = sum(float(tensor.double().square().sum()) for tensor in shared.gradients.values())
    assert float(evaluator.begin(shared)["objective/1/scale"]) == pytest.approx(1e-8 / squares, rel=1e-5)
