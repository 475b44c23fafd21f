"""The posterior that is learnt on simulated clients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.clients.victim import Victim
from leakage.datamodules.benchmarks import read_sheet
from leakage.labels import Auxiliary, infer_labels
from leakage.labels import posterior as module
from leakage.labels.posterior import LabelPosterior, _between, _edges
from tests.labels.by_hand import auxiliary_images, counts_of, images_and_labels, network, recall, victim_of


def tail(probabilities: list[float], edges: list[int], count: int) -> float:
    """P(n >= count), with the probability of a bin spread evenly over its numbers."""
    ends = [*edges[1:], edges[-1] + 1]
    total = 0.0
    for first, end, probability in zip(edges, ends, probabilities, strict=True):
        inside = [number for number in range(first, end) if number >= count]
        total += probability * len(inside) / (end - first)
    return total


@pytest.mark.parametrize(
    ("edges", "num_images"),
    [([0, 1, 2, 3, 4], 4), ([0, 1, 3, 7, 8], 10), ([0, 4], 9), ([0, 1], 3), ([0, 5, 40], 100), ([0], 3)],
)
def test_tails_between_the_edges_of_bins(edges: list[int], num_images: int) -> None:
    probabilities = torch.rand(3, 2, len(edges), generator=torch.Generator().manual_seed(0)).double()
    probabilities /= probabilities.sum(2, keepdim=True)
    at_least = probabilities.flip(2).cumsum(2).flip(2)
    tails = _between(at_least, torch.tensor(edges), num_images)
    assert tails.shape == (3, 2, num_images)
    for victim, label, count in np.ndindex(*tails.shape):
        expected = tail(probabilities[victim, label].tolist(), edges, count + 1)
        assert tails[victim, label, count].item() == pytest.approx(expected, abs=1e-6)
    assert (tails.diff(dim=2) <= 1e-6).all()


def test_every_count_that_occurs_is_a_bin_while_they_are_few() -> None:
    assert _edges(torch.tensor([[3, 0, 7], [3, 3, 4]])).tolist() == [0, 3, 4, 7]
    assert _edges(torch.tensor([[2, 3]])).tolist() == [0, 2, 3]


def test_bins_of_many_counts() -> None:
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(3000, [0.2, 0.3, 0.5], 400))
    counts = torch.cat([counts, torch.tensor([[0, 0, 3000]])])
    edges = _edges(counts)
    assert edges[0] == 0
    assert edges[-1] == 3000
    assert (edges.diff() > 0).all()
    assert len(edges) <= module._BINS * 2
    inside = torch.bucketize(counts, edges, right=True) - 1
    assert ((edges[inside] <= counts) & (inside >= 0)).all()
    assert inside.flatten().bincount().max() < counts.numel() / 8, "common counts are told apart"


@pytest.mark.parametrize(("count", "classes"), [(1, 3), (3, 2), (4, 3), (5, 4), (6, 3)])
def test_no_counts_have_a_larger_expected_recall(count: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    every = torch.tensor(
        [counts for counts in itertools.product(range(count + 1), repeat=classes) if sum(counts) == count]
    )
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(30, classes, count + 1, generator=generator).double()
    none = torch.zeros(())
    posterior = LabelPosterior(count, none, none, none, torch.arange(count + 1), nn.Identity())
    found, expected_counts = posterior._find(logits)
    marginals = logits.softmax(2)
    assert (found.sum(1) == count).all()
    torch.testing.assert_close(expected_counts, marginals @ torch.arange(count + 1.0).double())
    numbers = torch.arange(count + 1)

    def expected_recall(counts: Tensor, marginal: Tensor) -> float:
        return (torch.minimum(counts[:, None], numbers) * marginal).sum().item()

    for counts, marginal in zip(found, marginals, strict=True):
        best = max(expected_recall(candidate, marginal) for candidate in every)
        assert expected_recall(counts, marginal) == pytest.approx(best)


def trained_on_the_sample() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network that knows the first 40 images of every class well, pooled to 14 by 14 pixels."""
    images = F.avg_pool2d(read_sheet().flatten(0, 1).float() / 255, 2)
    labels = torch.arange(10).repeat_interleave(100)
    place = torch.arange(100).repeat(10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 10))
        seen = (place < 40).nonzero().flatten()
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(15):
            for batch in seen[torch.randperm(len(seen))].split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    return model, images, labels, place


@pytest.mark.usefixtures("quick_posterior")
def test_a_trained_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEWEST", 1500)
    monkeypatch.setattr(module, "_MOST", 1500)
    model, images, labels, place = trained_on_the_sample()
    victim = Victim(model, image_shape=(1, 14, 14), num_images=16)
    generator = torch.Generator().manual_seed(1)
    theirs, others = (place < 40).nonzero().flatten(), (place >= 40).nonzero().flatten()
    held = theirs[torch.randint(len(theirs), (100, 16), generator=generator)]
    shared = victim.share(images[held], labels[held])
    auxiliary = Auxiliary(images[others], labels[others])
    recalls = {
        rule: recall(infer_labels(shared, victim, rule=rule, auxiliary=auxiliary).counts, labels[held])
        for rule in ("posterior", "ilrg", "llg_plus", "rlu", "geng")
    }
    even = torch.full((100, 10), 1) + (torch.arange(10) < 6)
    trivial = recall(even, labels[held])
    best_published = max(recalls[rule] for rule in ("ilrg", "llg_plus", "rlu", "geng"))
    assert recalls["posterior"] > trivial + 0.1
    assert recalls["posterior"] > recalls["ilrg"] + 0.1
    assert recalls["posterior"] > best_published


@pytest.mark.usefixtures("quick_posterior")
@pytest.mark.parametrize("bias", [True, False])
def test_a_last_layer_with_and_without_bias(bias: bool) -> None:
    # It must not learn from a bias' gradient that it will not get.
    victim = victim_of(network(0, classes=6, width=40, bias=bias), 6)
    images, labels = images_and_labels(0, 50, 6, 6)
    inferred = infer_labels(
        victim.share(images, labels), victim, rule="posterior", auxiliary=auxiliary_images(1, 6, 10)
    )
    assert recall(inferred.counts, labels) > 0.85


@pytest.mark.usefixtures("quick_posterior")
@pytest.mark.parametrize(("count", "classes"), [(300, 3), (5, 100)])
def test_many_images_and_many_classes(count: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEWEST", 128)
    monkeypatch.setattr(module, "_MOST", 256)
    victim = victim_of(network(0, classes=classes, width=12), count)
    images, labels = images_and_labels(0, 20, count, classes)
    inferred = infer_labels(
        victim.share(images, labels), victim, rule="posterior", auxiliary=auxiliary_images(1, classes)
    )
    assert (inferred.counts.sum(1) == count).all()
    assert torch.isfinite(inferred.scores).all()
    found, guess = recall(inferred.counts, labels), recall(torch.full_like(inferred.counts, count // 3), labels)
    assert found > (guess if classes == 3 else 0.3)
    assert (counts_of(inferred.labels, classes) == inferred.counts).all()
