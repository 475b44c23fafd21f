import math
import os
import pickle
import socket
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributed

from leakage.metrics import Estimate, MeanOverVictims, ShareOverVictims, mean_interval, wilson_interval
from tests import processes

METRICS = [MeanOverVictims, ShareOverVictims]
Metric = MeanOverVictims | ShareOverVictims


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Published: Newcombe, Statistics in Medicine 17 (1998), Table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes / n, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 7), (899, 1000), (1000, 1000), (5, 100_000)])
def test_wilson_interval_equals_scipy(successes: int, n: int) -> None:
    reference = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes / n, n) == pytest.approx(tuple(reference), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 999, 1000])
def test_wilson_interval_holds_the_share_and_keeps_within_0_and_1(n: int) -> None:
    for share in (0.0, 1e-9, 1 / 3, 0.999, 1.0):
        low, high = wilson_interval(share, n)
        assert 0 <= low <= share <= high <= 1
        assert low < high


def test_wilson_interval_of_no_victims_is_unknown() -> None:
    assert all(math.isnan(end) for end in wilson_interval(0.5, 0))


@pytest.mark.parametrize("share", [-0.1, 1.1, 100.0, math.nan])
def test_wilson_interval_needs_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected `share` in \[0, 1\], but got {share}\."):
        wilson_interval(share, 10)


def test_wilson_interval_needs_a_number_of_victims() -> None:
    with pytest.raises(ValueError, match=r"Expected `n` to be at least 0, but got -3\."):
        wilson_interval(0.5, -3)


@pytest.mark.parametrize("n", [2, 3, 30, 1000])
def test_mean_interval_equals_scipy(n: int, generator: torch.Generator) -> None:
    values = 30 + 5 * torch.randn(n, generator=generator, dtype=torch.float64)
    array = values.numpy()
    reference = stats.t.interval(0.95, n - 1, loc=array.mean(), scale=stats.sem(array))
    assert mean_interval(values) == pytest.approx(reference, rel=1e-12)


def test_mean_interval_does_not_cancel_where_the_spread_is_small() -> None:
    values = torch.tensor([1e4, 1e4 + 0.125, 1e4 - 0.125])  # exact in single precision, their squares aren't
    half = stats.t.ppf(0.975, 2) * 0.125 / math.sqrt(3)
    low, high = mean_interval(values)
    assert (low - 1e4, high - 1e4) == pytest.approx((-half, half), rel=1e-9)


@pytest.mark.parametrize("values", [[], [3.0], [1.0, math.inf], [1.0, -math.inf, 2.0]])
def test_mean_interval_is_unknown_without_a_spread(values: list[float]) -> None:
    assert all(math.isnan(end) for end in mean_interval(torch.tensor(values)))


def test_mean_interval_covers_the_mean_in_95_of_100_cases() -> None:
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(1))
    covered = sum(low <= 0 <= high for low, high in map(mean_interval, draws))
    assert 0.935 < covered / 2000 < 0.965  # three standard errors of 2,000 cases


@pytest.mark.parametrize("metric_class", METRICS)
def test_batches_accumulate_to_the_value_of_all_at_once(metric_class: type[Metric], generator: torch.Generator) -> None:
    values = torch.rand(50, generator=generator)
    at_once, accumulated = metric_class(), metric_class()
    at_once.update(values)
    for part in values.split([1, 0, 20, 29]):
        accumulated.update(part)
    assert accumulated.compute() == at_once.compute()
    value, low, high, victims = at_once.compute()
    assert victims == 50
    assert value == pytest.approx(values.double().mean().item(), rel=1e-12)
    expected = mean_interval(values) if metric_class is MeanOverVictims else wilson_interval(value, 50)
    assert (low, high) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric_class", METRICS)
def test_forward_gives_the_batch_and_keeps_all(metric_class: type[Metric]) -> None:
    metric = metric_class()
    metric.update(torch.tensor([0.0, 0.5]))
    assert metric(torch.tensor([1.0, 1.0])).value == 1.0
    assert metric.compute()[::3] == (0.625, 4)


@pytest.mark.parametrize("metric_class", METRICS)
def test_copies_and_pickles_are_equal_and_independent(metric_class: type[Metric]) -> None:
    metric = metric_class()
    metric.update(torch.tensor([0.0, 0.25, 1.0]))
    estimate = metric.compute()
    for copy in (metric.clone(), deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert copy.compute() == estimate
        copy.update(torch.tensor([1.0]))
        assert copy.compute().victims == 4
    assert metric.compute() == estimate
    metric.reset()
    metric.update(torch.tensor([1.0, 1.0]))
    assert metric.compute()[::3] == (1.0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("metric_class", METRICS)
def test_values_in_every_precision(metric_class: type[Metric], dtype: torch.dtype) -> None:
    metric = metric_class()
    metric.update(torch.tensor([1, 0, 1, 1]).to(dtype))
    assert metric.compute() == metric_class()(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    metric.half()  # a Trainer of half precision must not round the scores
    metric.update(torch.full((4,), 0.1))
    assert metric.compute().value == pytest.approx((3 + 0.4) / 8, rel=1e-7)


def test_double_precision_is_kept_on_request() -> None:
    metric = MeanOverVictims().set_dtype(torch.float64)
    metric.update(torch.tensor([0.1], dtype=torch.float64))
    assert metric.compute().value == 0.1


@pytest.mark.parametrize("metric_class", METRICS)
def test_no_victims_have_an_unknown_estimate(metric_class: type[Metric]) -> None:
    metric = metric_class()
    metric.update(torch.empty(0))
    assert metric.compute().victims == 0
    assert all(math.isnan(number) for number in metric.compute()[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics says that nothing was updated
        never = metric_class().compute()
    assert never.victims == 0
    assert math.isnan(never.value)


def test_one_victim_has_a_value_and_a_share_an_interval() -> None:
    mean, share = MeanOverVictims(), ShareOverVictims()
    mean.update(torch.tensor([7.0]))
    share.update(torch.tensor([1.0]))
    assert mean.compute().value == 7.0
    assert math.isnan(mean.compute().low)
    assert share.compute()[:3] == (1.0, pytest.approx(1 / (1 + 1.959964**2), abs=1e-6), 1.0)


def test_an_infinite_score_makes_the_mean_infinite_and_its_interval_unknown() -> None:
    metric = MeanOverVictims()
    metric.update(torch.tensor([1.0, math.inf]))
    estimate = metric.compute()
    assert estimate.value == math.inf
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_shares_of_several_images_count_victims_not_images() -> None:
    metric = ShareOverVictims()
    metric.update(torch.tensor([0.25, 0.75, 0.5, 1.0]))
    assert metric.compute() == Estimate(0.625, *wilson_interval(0.625, 4), victims=4)


@pytest.mark.parametrize("metric_class", METRICS)
def test_bad_values_are_refused_and_leave_no_trace(metric_class: type[Metric]) -> None:
    metric = metric_class()
    metric.update(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"Expected `values` of shape \(V,\), but got \(2, 3\)\."):
        metric.update(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"Expected `values` of shape \(V,\), but got \(\)\."):
        metric.update(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"Expected `values` without NaN, but got NaN for 2 of 3 victims\."):
        metric.update(torch.tensor([math.nan, 0.5, math.nan]))
    assert metric.compute().victims == 1


@pytest.mark.parametrize("bad", [-0.5, 1.5, math.inf])
def test_a_share_outside_0_and_1_is_refused(bad: float) -> None:
    low, high = sorted((0.5, bad))
    with pytest.raises(ValueError, match=rf"Expected `values` in \[0, 1\], but got {low:g} to {high:g}\."):
        ShareOverVictims().update(torch.tensor([0.5, bad]))


def compute_in_process(rank: int, port: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    parts = [torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1.0])]
    uneven, one_sided = MeanOverVictims(), ShareOverVictims()
    uneven.update(parts[rank][:2])
    if rank == 0:
        uneven.update(parts[rank][2:])
        one_sided.update(parts[rank])  # the other process has no victims
    torch.save([tuple(uneven.compute()), tuple(one_sided.compute())], f"{folder}/{rank}.pt")
    # Without a destructor: `destroy_process_group` can deadlock with gloo before torch 2.8 (its destructor
    # waits, holding the GIL, for a thread that needs it: pytorch/pytorch#154976), and leaving the group to
    # the interpreter's end can abort.
    os._exit(0)


@pytest.mark.slow
def test_estimates_are_those_of_all_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    started = [processes.Running(log, compute_in_process, rank, port, str(tmp_path)) for rank, log in enumerate(logs)]
    ended = [process.end() for process in started]
    assert [one.returncode for one in ended] == [0, 0], ended
    uneven = (0.625, *mean_interval(torch.tensor([1.0, 0.0, 0.5, 1.0])), 4)
    one_sided = (0.5, *wilson_interval(0.5, 3), 3)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [uneven, one_sided]


def test_estimates_cover_the_success_rate_of_many_runs() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        metric = ShareOverVictims()
        metric.update(torch.from_numpy(rng.random(50) < 0.93))
        covered += metric.compute().low <= 0.93 <= metric.compute().high
    assert covered / 500 > 0.9
