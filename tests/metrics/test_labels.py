import math
import pickle
from collections import Counter
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from leakage.metrics import Estimate, LabelMetrics, LabelScore, score_labels, trivial_score, wilson_interval

NAMES = ["irec", "leacc", "lnacc", "exact"]


def counts_of(labels: Tensor, num_classes: int) -> Tensor:
    return torch.stack([torch.bincount(row, minlength=num_classes) for row in labels])


def loop_score(guess: list[int], truth: list[int], num_classes: int, present: list[bool] | None = None) -> LabelScore:
    """One victim, from lists of labels."""
    found, true = Counter(guess), Counter(truth)
    present = [k in found for k in range(num_classes)] if present is None else present
    return LabelScore(
        irec=(found & true).total() / len(truth),
        leacc=sum(present[k] == (k in true) for k in range(num_classes)) / num_classes,
        lnacc=sum(found[k] == true[k] for k in range(num_classes)) / num_classes,
        exact=float(found == true),
    )


def score_of(counts: list[list[int]], labels: list[list[int]], present: list[list[bool]] | None = None) -> LabelScore:
    told = None if present is None else torch.tensor(present)
    (one,) = score_labels(torch.tensor(counts), torch.tensor(labels), present=told)
    return one


def test_scores_worked_out_by_hand() -> None:
    # Truth 0 0 1 3 of five classes.
    truth = [[3, 0, 1, 0]]
    assert score_of([[2, 1, 0, 1, 0]], truth) == LabelScore(irec=1.0, leacc=1.0, lnacc=1.0, exact=1.0)
    assert score_of([[1, 2, 0, 1, 0]], truth) == LabelScore(irec=0.75, leacc=1.0, lnacc=0.6, exact=0.0)
    assert score_of([[4, 0, 0, 0, 0]], truth) == LabelScore(irec=0.5, leacc=0.6, lnacc=0.4, exact=0.0)
    assert score_of([[0, 0, 4, 0, 0]], truth) == LabelScore(irec=0.0, leacc=0.2, lnacc=0.2, exact=0.0)


@pytest.mark.parametrize(("num_images", "num_classes"), [(1, 2), (8, 10), (24, 100), (64, 10), (5, 1)])
def test_scores_equal_those_of_a_loop(num_images: int, num_classes: int, generator: torch.Generator) -> None:
    labels, guess = torch.randint(num_classes, (2, 40, num_images), generator=generator)
    guess[::4] = labels[::4].flip(1)
    guess[1::4, : num_images // 2] = labels[1::4, : num_images // 2]
    present = torch.rand(40, num_classes, generator=generator) < 0.5
    counts = counts_of(guess, num_classes)
    pairs = list(zip(guess.tolist(), labels.tolist(), strict=True))
    assert score_labels(counts, labels) == [loop_score(*pair, num_classes) for pair in pairs]
    told = score_labels(counts, labels, present=present)
    assert told == [loop_score(*pair, num_classes, row) for pair, row in zip(pairs, present.tolist(), strict=True)]
    if num_images > 1 and num_classes > 1:
        assert len({one.irec for one in told}) > 2


def test_presence_is_told_apart_from_counts() -> None:
    present = [[True, False, True, True]]
    assert score_of([[1, 1, 0, 0]], [[0, 1]], present) == LabelScore(irec=1.0, leacc=0.25, lnacc=1.0, exact=1.0)


def test_neither_order_nor_other_victims_matter(generator: torch.Generator) -> None:
    labels, guess = torch.randint(10, (2, 6, 16), generator=generator)
    counts = counts_of(guess, 10)
    shuffled = labels[:, torch.randperm(16, generator=generator)]
    both = score_labels(counts, labels), trivial_score(labels, 10)
    assert (score_labels(counts, shuffled), trivial_score(shuffled, 10)) == both
    for v in range(6):
        alone = score_labels(counts[v : v + 1], labels[v : v + 1]), trivial_score(labels[v : v + 1], 10)
        assert alone == tuple(scores[v : v + 1] for scores in both)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_whole_numbers_of_every_kind(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 2, 2]], dtype=dtype)
    counts = torch.tensor([[1, 1, 1]], dtype=dtype)
    assert score_labels(counts, labels) == [LabelScore(irec=2 / 3, leacc=2 / 3, lnacc=1 / 3, exact=0.0)]
    # One of each class is expected: two images and two classes of three are found, one count is right.
    assert trivial_score(labels, 3) == [LabelScore(irec=2 / 3, leacc=2 / 3, lnacc=1 / 3, exact=0.0)]


def test_no_victims_have_no_scores() -> None:
    labels = torch.empty(0, 8, dtype=torch.long)
    assert score_labels(torch.empty(0, 10, dtype=torch.long), labels) == trivial_score(labels, 10) == []


@pytest.mark.parametrize(("num_images", "num_classes"), [(3, 4), (4, 4), (6, 4), (1, 2), (7, 3), (3, 1)])
def test_trivial_scores_are_those_of_a_loop_over_all_even_guesses(
    num_images: int, num_classes: int, generator: torch.Generator
) -> None:
    labels = torch.randint(num_classes, (30, num_images), generator=generator)
    each, left_over = divmod(num_images, num_classes)
    even = [
        [*range(num_classes)] * each + list(more) for more in combinations(range(num_classes), left_over)
    ]  # every choice of the classes with one more
    for truth, score in zip(labels.tolist(), trivial_score(labels, num_classes), strict=True):
        scores = [loop_score(guess, truth, num_classes) for guess in even]
        assert score.irec == pytest.approx(sum(one.irec for one in scores) / len(scores))
        assert score.exact == pytest.approx(sum(one.exact for one in scores) / len(scores))


@pytest.mark.parametrize(("num_images", "num_classes"), [(1, 2), (2, 3), (3, 3), (4, 3), (5, 2), (6, 2)])
def test_no_guess_beats_the_trivial_one_under_uniform_labels(num_images: int, num_classes: int) -> None:
    worlds = torch.tensor([*product(range(num_classes), repeat=num_images)])  # all equally likely
    true = counts_of(worlds, num_classes)
    trivial = trivial_score(worlds, num_classes)
    mean = {name: sum(getattr(one, name) for one in trivial) / len(trivial) for name in NAMES}
    best = dict.fromkeys(NAMES, 0.0)
    for guess in product(range(num_images + 1), repeat=num_classes):
        counts = torch.tensor(guess)
        best["leacc"] = max(best["leacc"], ((counts > 0) == (true > 0)).double().mean().item())
        best["lnacc"] = max(best["lnacc"], (counts == true).double().mean().item())
        if sum(guess) == num_images:
            recall = counts.minimum(true).sum(1).double().mean().item() / num_images
            best["irec"] = max(best["irec"], recall)
            best["exact"] = max(best["exact"], (counts == true).all(1).double().mean().item())
    assert mean == pytest.approx(best)


def test_absent_classes_make_nothing_at_all_look_good() -> None:
    labels = torch.randint(100, (2000, 24), generator=torch.Generator().manual_seed(0))
    scores = trivial_score(labels, 100)
    leacc = sum(one.leacc for one in scores) / 2000
    assert leacc == pytest.approx(0.99**24, abs=2e-3)  # .786; three standard errors are .0012
    absent = [100 - len(set(row)) for row in labels.tolist()]  # what "nothing" gets right
    assert [round(100 * one.leacc) for one in scores] == absent
    assert sum(one.lnacc for one in scores) / 2000 == pytest.approx(0.99**24, abs=2e-3)
    # What is found instead is one image in five.
    assert sum(one.irec for one in scores) / 2000 == pytest.approx(1 - 0.99**24, abs=2e-3)
    assert max(one.exact for one in scores) < 1e-20


@pytest.mark.parametrize(
    ("num_images", "num_classes", "leacc", "lnacc"),
    [
        (8, 10, 1 - 0.9**8, 0.9**8),
        (6, 10, 0.9**6, 0.9**6),  # 6 images of 10 classes leave more than half of them absent,
        (7, 10, 1 - 0.9**7, 0.9**7),  # 7 fewer
        (64, 10, 1 - 0.9**64, math.comb(64, 6) * 0.1**6 * 0.9**58),
    ],
)
def test_trivial_scores_equal_the_formula(num_images: int, num_classes: int, leacc: float, lnacc: float) -> None:
    labels = torch.randint(num_classes, (5000, num_images), generator=torch.Generator().manual_seed(1))
    scores = trivial_score(labels, num_classes)
    assert sum(one.leacc for one in scores) / 5000 == pytest.approx(leacc, abs=6e-3)
    assert sum(one.lnacc for one in scores) / 5000 == pytest.approx(lnacc, abs=6e-3)


@pytest.mark.parametrize(
    ("counts", "labels", "message"),
    [
        ([1, 1], [[0, 1]], r"Expected `counts` of shape \(V, K\), but got \(2,\)\."),
        ([[1, 1]], [0, 1], r"Expected `labels` of shape \(V, N\) with N at least 1, but got \(2,\)\."),
        ([[0, 0]], [[]], r"Expected `labels` of shape \(V, N\) with N at least 1, but got \(1, 0\)\."),
        ([[1, 1]], [[0, 1]] * 2, r"Expected `counts` of 2 victims, as many as `labels`, but got 1\."),
        ([[1, 1]], [[0, 2]], r"Expected `labels` from 0 to 1, as there are 2 classes, but got 0 to 2\."),
        ([[1, 1]], [[-1, 0]], r"Expected `labels` from 0 to 1, as there are 2 classes, but got -1 to 0\."),
        ([[1, 1]], [[0.0, 1.0]], r"Expected `labels` as whole numbers, but got torch\.float32\."),
        ([[1.0, 1.0]], [[0, 1]], r"Expected `counts` as whole numbers, but got torch\.float32\."),
        ([[True, True]], [[0, 1]], r"Expected `counts` as whole numbers, but got torch\.bool\."),
        (
            [[1, 1], [1, 0]],
            [[0, 1]] * 2,
            r"sum to the 2 images .* got a sum of 1 with a smallest count of 0 for victim 1",
        ),
        ([[3, -1]], [[0, 1]], r"at least 0 that sum to .* got a sum of 2 with a smallest count of -1 for victim 0\."),
    ],
)
def test_bad_counts_and_labels_are_refused(counts: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_labels(torch.tensor(counts), torch.tensor(labels))


@pytest.mark.parametrize(
    ("present", "got"),
    [([[True]], r"\(1, 1\) and torch\.bool"), ([[1, 0]], r"\(1, 2\) and torch\.int64")],
)
def test_presence_must_be_yes_or_no_of_every_class(present: list, got: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected `present` of shape \(V, K\) = \(1, 2\) and .* but got {got}\."):
        score_labels(torch.tensor([[1, 1]]), torch.tensor([[0, 1]]), present=torch.tensor(present))


def test_the_trivial_guess_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"Expected `num_classes` to be a whole number of at least 1, but got 0\."):
        trivial_score(torch.tensor([[0]]), 0)
    with pytest.raises(ValueError, match=r"Expected `labels` from 0 to 9, as there are 10 classes, but got 10 to 10"):
        trivial_score(torch.tensor([[10]]), 10)


def metrics_of(values: Tensor) -> LabelMetrics:
    metrics = LabelMetrics()
    metrics.update([LabelScore(value, value, value, value) for value in values.tolist()])
    return metrics


def test_every_score_is_its_own_mean() -> None:
    metrics = LabelMetrics()
    metrics.update([LabelScore(irec=0.5, leacc=0.25, lnacc=0.125, exact=0.0)])
    metrics.update([LabelScore(irec=1.0, leacc=0.75, lnacc=0.375, exact=1.0)])
    estimates = metrics.compute()
    assert {name: estimate.value for name, estimate in estimates.items()} == {
        "irec": 0.75,
        "leacc": 0.5,
        "lnacc": 0.25,
        "exact": 0.5,
    }
    assert list(estimates) == NAMES
    assert all(estimate.victims == 2 for estimate in estimates.values())


def test_batches_copies_and_reset(generator: torch.Generator) -> None:
    labels = torch.randint(10, (30, 8), generator=generator)
    scores = trivial_score(labels, 10)
    at_once, accumulated = LabelMetrics(), LabelMetrics()
    at_once.update(scores)
    accumulated.update(scores[:3])
    accumulated.reset()
    accumulated.update(scores[:20])
    accumulated.update(iter(scores[20:]))
    accumulated.update([])
    estimates = at_once.compute()
    assert accumulated.compute() == estimates
    for copy in (at_once.clone(), pickle.loads(pickle.dumps(at_once))):
        copy.update(scores)
        assert copy.compute()["irec"].victims == 60
    assert at_once.compute() == estimates


@pytest.mark.parametrize("right", [0, 1, 25, 49, 50])
def test_the_interval_of_all_or_nothing_is_wilsons(right: int) -> None:
    values = (torch.arange(50) < right).float()
    estimate = metrics_of(values).compute()["exact"]
    assert estimate == Estimate(pytest.approx(right / 50), *wilson_interval(right / 50, 50), victims=50)


@pytest.mark.parametrize("value", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("victims", [1, 2, 50])
def test_without_a_spread_the_interval_is_wilsons(value: float, victims: int) -> None:
    estimate = metrics_of(torch.full((victims,), value)).compute()["irec"]
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(value, victims), rel=1e-6)
    assert estimate.low < value


def test_no_victims_have_an_unknown_estimate() -> None:
    metrics = LabelMetrics()
    metrics.update([])
    value, low, high, victims = metrics.compute()["irec"]
    assert victims == 0
    assert all(math.isnan(number) for number in (value, low, high))


def draws(law: str, victims: int, runs: int) -> tuple[float, Tensor]:
    """The mean of a score, and its values ``(runs, victims)`` with 24 images each."""
    generator = torch.Generator().manual_seed(3)
    shape = runs, victims, 24
    if law == "most victims all right":
        return 0.98, 1 - 0.5 * (torch.rand(shape[:2], generator=generator) < 0.04).float()
    if law == "all or nothing":
        return 0.95, (torch.rand(shape[:2], generator=generator) < 0.95).float()
    mean = float(law)
    return mean, (torch.rand(shape, generator=generator) < mean).float().mean(2)


@pytest.mark.parametrize("law", ["0.3", "0.95", "0.99", "most victims all right", "all or nothing"])
def test_the_interval_covers_the_mean_in_95_of_100_cases(law: str) -> None:
    mean, values = draws(law, victims=50, runs=400)
    covered = width = 0.0
    for run in values:
        estimate = metrics_of(run).compute()["irec"]
        covered += estimate.low <= mean <= estimate.high
        width += (estimate.high - estimate.low) / 400
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert 0.92 < covered / 400 < 0.985  # three standard errors of 400 cases are .033
    if law in ("0.3", "0.95", "0.99"):  # far narrower than Wilson's, and no wider than the spread says
        low, high = wilson_interval(mean, 50)
        assert width < 0.3 * (high - low)
        assert width == pytest.approx(2 * 2.01 * math.sqrt(mean * (1 - mean) / 24 / 50), rel=0.1)


def test_two_victims_that_happen_to_be_close_tell_little() -> None:
    estimate = metrics_of(torch.tensor([0.95, 0.96])).compute()["irec"]
    assert estimate.high - estimate.low > 0.1


def test_anything_but_label_scores_is_refused() -> None:
    metrics = LabelMetrics()
    with pytest.raises(TypeError, match=r"Expected `scores` to hold LabelScores, but got float\."):
        metrics.update([LabelScore(1.0, 1.0, 1.0, 1.0), 0.5])  # type: ignore[list-item]
    metrics.update([])
    assert metrics.compute()["irec"].victims == 0
