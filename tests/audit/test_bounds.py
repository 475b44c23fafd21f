import math
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from leakage.audit import (
    approximate_success_bound,
    gaussian_renyi_epsilon,
    gaussian_success_bound,
    mse_bound,
    subsampled_success_bound,
)
from leakage.audit import bounds as module
from leakage.defenses import DPSGD

TRIALS = 20_000
# Four standard deviations of a share of TRIALS.
TOLERANCE = 4 * math.sqrt(0.25 / TRIALS)

PRIORS = [1e-6, 1e-3, 0.1, 0.5, 0.9]
NO_STEPS = r"Expected `steps` to be a whole number of at least 1, but got"

Array = NDArray[np.float64]


def told_apart(candidates: Array, noise_multiplier: float, steps: int, weights: Array | None = None) -> float:
    """How often the likeliest of K candidates, of norm 1 or less, is the one behind T noisy releases."""
    random = np.random.default_rng(0)
    number, size = candidates.shape
    weights = np.full(number, 1 / number) if weights is None else weights
    truth = random.choice(number, TRIALS, p=weights)
    score = np.log(weights) * np.ones((TRIALS, 1))
    for _ in range(steps):
        release = candidates[truth] + noise_multiplier * random.standard_normal((TRIALS, size))
        score += (release @ candidates.T - (candidates**2).sum(1) / 2) / noise_multiplier**2
    return float((score.argmax(1) == truth).mean())


def directions(number: int, size: int) -> Array:
    drawn = np.random.default_rng(1).standard_normal((number, size))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    return float(ndtr(mu / 2 - epsilon / mu) - np.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu))


# What simulated attackers reach


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(0.5, 1), (1.0, 1), (3.0, 1), (2.0, 4), (5.0, 10)])
def test_opposite_gradients_meet_the_gaussian_bound(noise_multiplier: float, steps: int) -> None:
    measured = told_apart(np.array([[1.0], [-1.0]]), noise_multiplier, steps)
    bound = gaussian_success_bound(0.5, noise_multiplier, steps)
    assert bound == pytest.approx(ndtr(math.sqrt(steps) / noise_multiplier))
    assert measured == pytest.approx(bound, abs=TOLERANCE)
    # Half the sensitivity would be no bound, twice as much is not needed.
    assert measured > gaussian_success_bound(0.5, 2 * noise_multiplier, steps) + TOLERANCE
    assert measured < gaussian_success_bound(0.5, noise_multiplier, steps, "replace-one") - TOLERANCE / 2


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(0.5, 1), (1.0, 1), (2.0, 4), (5.0, 10)])
def test_a_gradient_or_none_is_told_as_exactly_as_can_be(noise_multiplier: float, steps: int) -> None:
    measured = told_apart(np.array([[0.0], [1.0]]), noise_multiplier, steps)
    assert measured == pytest.approx(ndtr(math.sqrt(steps) / (2 * noise_multiplier)), abs=TOLERANCE)
    assert measured < gaussian_success_bound(0.5, noise_multiplier, steps)


@pytest.mark.parametrize("number", [3, 10, 100])
@pytest.mark.parametrize(("noise_multiplier", "steps"), [(0.3, 1), (1.0, 1), (1.0, 4)])
def test_many_candidates_stay_below_the_gaussian_bound(number: int, noise_multiplier: float, steps: int) -> None:
    measured = told_apart(directions(number, 20), noise_multiplier, steps)
    assert 1 / number + TOLERANCE < measured < gaussian_success_bound(1 / number, noise_multiplier, steps)


def test_unequal_candidates_stay_below_the_bound_of_the_best_guess() -> None:
    weights = np.array([0.7, 0.2, 0.1])
    measured = told_apart(directions(3, 2), 0.7, 1, weights)
    assert 0.7 + TOLERANCE < measured < gaussian_success_bound(0.7, 0.7)


@pytest.mark.parametrize(("noise_multiplier", "sample_rate", "steps"), [(0.5, 0.1, 20), (1.0, 0.5, 5), (0.3, 0.05, 10)])
def test_opposite_gradients_stay_below_the_subsampled_bound(
    noise_multiplier: float, sample_rate: float, steps: int
) -> None:
    random = np.random.default_rng(0)
    truth = random.choice([-1.0, 1.0], (TRIALS, 1))
    release = truth * (random.random((TRIALS, steps)) < sample_rate)
    release += noise_multiplier * random.standard_normal((TRIALS, steps))

    def likelihood(candidate: float) -> Array:
        ratio = np.exp((candidate * release - 0.5) / noise_multiplier**2)
        return np.asarray(np.log(1 - sample_rate + sample_rate * ratio).sum(1))

    measured = float(((likelihood(1) > likelihood(-1)) == (truth[:, 0] > 0)).mean())
    bound = subsampled_success_bound(0.5, noise_multiplier, sample_rate, steps)
    assert 0.5 + TOLERANCE < measured < bound + TOLERANCE
    assert bound < gaussian_success_bound(0.5, noise_multiplier, steps)


@pytest.mark.parametrize(("noise_multiplier", "sample_rate", "steps"), [(0.5, 0.1, 20), (1.0, 0.5, 5), (2.0, 0.3, 20)])
def test_the_best_test_meets_the_subsampled_bound(noise_multiplier: float, sample_rate: float, steps: int) -> None:
    """Neyman and Pearson's: an event of probability kappa without the target, and as likely as can be with it."""
    random = np.random.default_rng(0)
    trials = 100_000

    def losses(taken: NDArray[np.bool_] | bool) -> Array:
        release = taken + noise_multiplier * random.standard_normal((trials, steps))
        ratio = np.exp((release - 0.5) / noise_multiplier**2)
        return np.asarray(np.log(1 - sample_rate + sample_rate * ratio).sum(1))

    without, within = losses(False), losses(random.random((trials, steps)) < sample_rate)
    for prior in (0.01, 0.9):
        measured = float((within > np.quantile(without, 1 - prior)).mean())
        bound = subsampled_success_bound(prior, noise_multiplier, sample_rate, steps)
        assert measured == pytest.approx(bound, abs=0.012)


@pytest.mark.parametrize("noise_multiplier", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("pixel_range", [1.0, 255.0])
def test_unbiased_attackers_stay_above_the_mse_bound(noise_multiplier: float, pixel_range: float) -> None:
    random = np.random.default_rng(0)
    images = random.random((TRIALS, 16)) * pixel_range
    radius = 2 * pixel_range  # of the cube with 16 sides, about its centre
    shared = (images - pixel_range / 2) / radius
    assert np.linalg.norm(shared, axis=1).max() <= 1
    found = (shared + noise_multiplier * random.standard_normal(shared.shape)) * radius + pixel_range / 2
    assert ((found - images) ** 2).mean() > mse_bound(gaussian_renyi_epsilon(noise_multiplier), pixel_range)


def test_an_unbiased_attacker_on_one_pixel_comes_near_the_mse_bound() -> None:
    random = np.random.default_rng(0)
    pixels = random.random(TRIALS)
    found = (2 * pixels - 1 + 10 * random.standard_normal(TRIALS) + 1) / 2
    bound = mse_bound(gaussian_renyi_epsilon(10.0))
    assert bound < ((found - pixels) ** 2).mean() < 4.2 * bound


def test_a_grey_image_is_below_the_mse_bound_for_it_is_biased() -> None:
    assert ((np.random.default_rng(0).random(TRIALS) - 0.5) ** 2).mean() < mse_bound(gaussian_renyi_epsilon(10.0))


# Closed forms


@pytest.mark.parametrize("prior", PRIORS)
def test_gaussian_bound_from_no_noise_to_nothing_but_noise(prior: float) -> None:
    noises = [1e-3, 0.1, 0.3, 1.0, 3.0, 10.0, 1e9]
    bounds = [gaussian_success_bound(prior, noise) for noise in noises]
    assert bounds[0] == 1
    assert bounds == sorted(bounds, reverse=True)
    assert prior < bounds[3] < 1
    assert bounds[-1] == pytest.approx(prior, rel=1e-7)


def test_gaussian_bound_knows_steps_and_adjacency_by_their_share_of_the_noise() -> None:
    bound = gaussian_success_bound(0.1, 1.5)
    assert bound == pytest.approx(ndtr(ndtri(0.1) + 1 / 1.5))
    assert gaussian_success_bound(0.1, 3.0, steps=4) == pytest.approx(bound)
    assert gaussian_success_bound(0.1, 3.0, adjacency="replace-one") == pytest.approx(bound)
    assert gaussian_success_bound(0.1, 3.0, 4, "replace-one") > bound


@pytest.mark.parametrize(
    "bound",
    [
        partial(gaussian_success_bound, noise_multiplier=1.0),
        partial(approximate_success_bound, epsilon=1.0, delta=0.0),
        partial(subsampled_success_bound, noise_multiplier=1.0, sample_rate=0.1, steps=20),
    ],
)
def test_what_is_known_stays_known_and_what_cannot_be_stays_so(bound: Callable[[float], float]) -> None:
    assert bound(0.0) == 0
    assert bound(1.0) == 1


@pytest.mark.parametrize(
    ("prior", "epsilon", "delta", "expected"),
    [
        (0.1, 0.0, 0.0, 0.1),
        (0.1, 0.0, 0.2, 0.3),
        (0.01, 1.0, 0.001, 0.01 * math.e + 0.001),
        (0.9, 1.0, 0.0, 1 - 0.1 / math.e),
        (0.5, math.log(3), 0.0, 1 - 0.5 / 3),
        (0.5, math.log(2), 0.1, 1 - 0.4 / 2),
        (0.5, 1.0, 0.5, 1.0),
        (0.5, 1e4, 0.0, 1.0),
        (1e-300, 1e4, 0.0, 1.0),
        (0.0, 1e4, 0.2, 0.2),
    ],
)
def test_approximate_bound(prior: float, epsilon: float, delta: float, expected: float) -> None:
    assert approximate_success_bound(prior, epsilon, delta) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("bound", [gaussian_success_bound, partial(approximate_success_bound, delta=0.0)])
def test_no_bound_is_below_the_guess(prior: float, bound: Callable[[float, float], float]) -> None:
    assert bound(prior, 1e-20) >= prior
    assert bound(prior, 1e20) >= prior


def test_renyi_privacy_of_gaussian_releases() -> None:
    assert gaussian_renyi_epsilon(2.0) == 1
    assert gaussian_renyi_epsilon(2.0, adjacency="add-remove") == 0.25
    assert gaussian_renyi_epsilon(2.0, steps=10, order=5.0) == 25
    accountants = pytest.importorskip("opacus.accountants.analysis.rdp")
    ours = gaussian_renyi_epsilon(2.0, steps=7, order=3.0, adjacency="add-remove")
    assert ours == pytest.approx(accountants.compute_rdp(q=1.0, noise_multiplier=2.0, steps=7, orders=3.0))


def test_mse_bound() -> None:
    assert mse_bound(math.log(2)) == pytest.approx(0.25)
    assert mse_bound(math.log(5), pixel_range=255.0) == pytest.approx(255**2 / 16)
    assert mse_bound(1e-6) == pytest.approx(0.25e6, rel=1e-5)
    assert mse_bound(1e6) == 0
    assert mse_bound(1.0) > mse_bound(2.0) > mse_bound(3.0)


@pytest.mark.parametrize("prior", PRIORS)
def test_subsampled_bound_where_it_has_a_closed_form(prior: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    gaussian = gaussian_success_bound(prior, 1.0)
    assert subsampled_success_bound(prior, 1.0, 0.2, 1) == pytest.approx(0.8 * prior + 0.2 * gaussian)
    assert subsampled_success_bound(prior, 2.0, 1.0, 4) == gaussian


# Functions that agree


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 5.0])
def test_gaussian_bound_is_the_least_of_all_approximate_ones(prior: float, noise_multiplier: float) -> None:
    mu = 1 / noise_multiplier
    epsilons = np.linspace(0, 12 * mu, 4001).tolist()
    approximate = [approximate_success_bound(prior, epsilon, gaussian_delta(epsilon, mu)) for epsilon in epsilons]
    gaussian = gaussian_success_bound(prior, noise_multiplier)
    assert all(bound > gaussian - 1e-12 for bound in approximate)
    assert min(approximate) == pytest.approx(gaussian, rel=1e-4)


@pytest.mark.parametrize("prior", [1e-3, 0.5])
def test_privacy_loss_and_closed_forms_agree(prior: float) -> None:
    for noise_multiplier, steps in [(1.0, 1), (2.0, 5)]:
        bound = module._by_privacy_loss(prior, noise_multiplier, 1.0, steps)
        assert 1 <= bound / gaussian_success_bound(prior, noise_multiplier, steps) < 1.002
    told = module._told_which_steps(prior, 1.0, 0.2, 1)
    assert 1 <= module._by_privacy_loss(prior, 1.0, 0.2, 1) / told < 1.002


@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate", "steps", "expected"),
    [
        # min over epsilon of kappa e^epsilon + delta(epsilon), with delta of dp-accounting 0.6.0 (its `_pmf_remove`),
        # `from_gaussian_mechanism(..., value_discretization_interval=1e-4).self_compose(steps)`
        (1.0, 0.1, 20, {1e-6: 4.62238e-05, 0.1: 0.239932, 0.9: 0.956246}),
        (0.5, 0.5, 10, {1e-3: 0.653352}),
        (1.0, 1e-4, 100, {1e-3: 0.00100774, 0.5: 0.500541}),
    ],
)
def test_subsampled_bound_equals_another_accountant(
    noise_multiplier: float, sample_rate: float, steps: int, expected: dict[float, float]
) -> None:
    ours = {prior: subsampled_success_bound(prior, noise_multiplier, sample_rate, steps) for prior in expected}
    assert ours == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.05])
def test_subsampled_bound_is_below_what_epsilon_and_delta_tell(delta: float) -> None:
    epsilon = DPSGD(1.0, norm=1.0).epsilon(steps=20, sample_rate=0.1, delta=delta)
    for prior in (1e-3, 0.9):
        assert subsampled_success_bound(prior, 1.0, 0.1, 20) < approximate_success_bound(prior, epsilon, delta)


def test_subsampled_bound_rises_with_steps_and_rate_and_falls_with_noise() -> None:
    bound = partial(subsampled_success_bound, 0.1)
    usual = bound(1.0, 0.1, 20)
    assert 0.1 < bound(1.0, 0.1, 2) < usual < bound(1.0, 0.1, 40) < gaussian_success_bound(0.1, 1.0, 40)
    assert bound(1.0, 0.01, 20) < usual < bound(1.0, 0.3, 20)
    assert bound(0.7, 0.1, 20) > usual > bound(2.0, 0.1, 20)
    assert bound(1e6, 0.1, 20) == pytest.approx(0.1, rel=1e-3)
    assert bound(1.0, 1e-12, 20) == pytest.approx(0.1, rel=1e-3)


def test_with_hardly_any_noise_the_target_is_found_unless_it_is_never_drawn() -> None:
    assert subsampled_success_bound(1e-3, 1e-3, 0.1, 10) == pytest.approx(1 - 0.999 * 0.9**10)


@pytest.mark.parametrize("steps", [10**6, 10**9, 10**12])
def test_more_steps_than_can_be_looked_at_one_by_one(steps: int) -> None:
    # As many draws of the target each time, and hardly any noise of their number.
    bound = module._told_which_steps(0.1, 1000.0, 10**5 / steps, steps)
    assert bound == pytest.approx(gaussian_success_bound(0.1, 1000.0, 10**5), rel=2e-3)


def test_groups_of_steps_are_never_below_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = module._told_which_steps(0.1, 3.0, 0.01, 4000)
    monkeypatch.setattr(module, "_GROUPS", 20)
    assert exact < module._told_which_steps(0.1, 3.0, 0.01, 4000) < 1.2 * exact


def test_grids_too_coarse_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = module._by_privacy_loss(0.1, 1.0, 0.1, 20)
    monkeypatch.setattr(module, "_POINTS", 2**12)
    assert fine < module._by_privacy_loss(0.1, 1.0, 0.1, 20) < 1
    monkeypatch.setattr(module, "_POINTS", 2**6)
    assert module._by_privacy_loss(0.1, 1.0, 0.1, 20) == 1


# What is refused


@pytest.mark.parametrize("prior", [-0.1, 1.1, math.nan, True, "0.1"])
def test_prior_is_a_probability(prior: float) -> None:
    for bound in (
        partial(gaussian_success_bound, noise_multiplier=1.0),
        partial(approximate_success_bound, epsilon=1.0, delta=0.0),
        partial(subsampled_success_bound, noise_multiplier=1.0, sample_rate=0.1, steps=2),
    ):
        with pytest.raises(ValueError, match=r"Expected `prior` from 0 to 1, but got"):
            bound(prior)


@pytest.mark.parametrize("noise_multiplier", [0.0, -1.0, math.inf, math.nan])
def test_noise_is_positive(noise_multiplier: float) -> None:
    for bound in (
        partial(gaussian_success_bound, 0.1),
        partial(subsampled_success_bound, 0.1, sample_rate=0.1, steps=2),
        gaussian_renyi_epsilon,
    ):
        with pytest.raises(ValueError, match=r"Expected `noise_multiplier` to be positive and finite, but got"):
            bound(noise_multiplier=noise_multiplier)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_are_counted(steps: int) -> None:
    for bound in (
        partial(gaussian_success_bound, 0.1, 1.0),
        partial(subsampled_success_bound, 0.1, 1.0, 0.1),
        partial(gaussian_renyi_epsilon, 1.0),
    ):
        with pytest.raises(ValueError, match=NO_STEPS):
            bound(steps=steps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gaussian_success_bound(0.1, 1.0, adjacency="remove"),
            r"Expected `adjacency` to be one of \['add-remove', 'replace-one'\], but got 'remove'",
        ),
        (
            lambda: gaussian_renyi_epsilon(1.0, adjacency="remove"),
            r"Expected `adjacency` to be one of \['add-remove', 'replace-one'\], but got 'remove'",
        ),
        (lambda: approximate_success_bound(0.1, -1.0, 0.0), r"Expected `epsilon` of at least 0, but got -1\.0"),
        (lambda: approximate_success_bound(0.1, math.inf, 0.0), r"Expected `epsilon` of at least 0, but got inf"),
        (lambda: approximate_success_bound(0.1, 1.0, 1.5), r"Expected `delta` from 0 to 1, but got 1\.5"),
        (lambda: approximate_success_bound(0.1, 1.0, -0.5), r"Expected `delta` from 0 to 1, but got -0\.5"),
        (lambda: subsampled_success_bound(0.1, 1.0, 0.0, 2), r"Expected `sample_rate` to be positive and finite"),
        (lambda: subsampled_success_bound(0.1, 1.0, 1.5, 2), r"Expected `sample_rate` to be above 0 and at most 1"),
        (lambda: gaussian_renyi_epsilon(1.0, order=1.0), r"Expected `order` above 1, but got 1\.0"),
        (lambda: gaussian_renyi_epsilon(1.0, order=math.inf), r"Expected `order` to be positive and finite"),
        (lambda: mse_bound(0.0), r"Expected `renyi_epsilon` to be positive and finite, but got 0\.0"),
        (lambda: mse_bound(1.0, pixel_range=-1.0), r"Expected `pixel_range` to be positive and finite, but got -1\.0"),
    ],
)
def test_out_of_range(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_several_steps_need_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    with pytest.raises(ImportError, match=r"Expected Opacus, .* `pip install leakage\[dp\]`"):
        subsampled_success_bound(0.1, 1.0, 0.1, 2)
