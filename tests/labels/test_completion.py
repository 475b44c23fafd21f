"""Labels of clients that leave out entries of their gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from leakage import LeNet, Protocol, Victim
from leakage.defenses import Clip, Defense, RandomPruning, TopK
from leakage.labels import infer_labels
from leakage.labels.auxiliary import KnownFeatures
from leakage.labels.completion import complete, leave_out
from tests.labels.by_hand import layer_of, recall


def test_a_few_entries_of_each_row_determine_a_layer_of_equal_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features = 0.5 + torch.rand(40, generator=generator, dtype=torch.float64)
    probabilities = torch.rand(3, 4, 6, generator=generator, dtype=torch.float64).softmax(2)
    layer = layer_of(probabilities, features.expand(3, 4, -1), torch.randint(6, (3, 4), generator=generator))
    sent = torch.rand(layer.rows.shape, generator=generator) < 0.3
    sent[1, 2] = False  # nothing of a class, which the sum over the classes determines
    part = dataclasses.replace(
        layer, weight_gradient=layer.rows * sent, bias_gradient=layer.push * (torch.arange(6) % 2 == 1)
    )
    known = KnownFeatures(features.expand(1, 5, -1), probabilities[:1, :1].expand(1, 5, -1), None)
    found = complete(part, known)
    torch.testing.assert_close(found.push, layer.push)
    torch.testing.assert_close(found.rows, layer.rows)
    without = complete(dataclasses.replace(part, bias_gradient=None), known)
    assert without.bias_gradient is None
    assert float((without.rows - layer.rows).abs().max()) < 0.1 * float(layer.rows.abs().max())


@pytest.mark.parametrize(
    ("defense", "least"), [(RandomPruning(0.1), 0.95), (TopK(0.1), 0.7), (RandomPruning(0.01), 0.9)], ids=repr
)
def test_who_knows_what_is_left_out_finds_more_labels(defense: Defense, least: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LeNet()
    victim = Victim(model, image_shape=(1, 28, 28), num_images=8, defenses=[defense])
    images, labels = torch.rand(12, 8, 1, 28, 28, generator=generator), torch.randint(10, (12, 8), generator=generator)
    shared = victim.share(images, labels)
    plain = dataclasses.replace(victim.protocol, defenses=())
    naive = Victim.of(model, plain), dataclasses.replace(shared, protocol=plain)
    found = recall(infer_labels(shared, victim, rule="mean_feature").counts, labels)
    assert found > least
    assert found > recall(infer_labels(naive[1], naive[0], rule="mean_feature").counts, labels) + 0.1


def test_only_defenses_that_leave_out_entries() -> None:
    for defenses, expected in (([TopK(0.1)], True), ([Clip(1.0), RandomPruning(0.5)], True), ([Clip(1.0)], False)):
        assert leave_out(Protocol((1, 8, 8), 2, defenses=tuple(each.describe() for each in defenses))) is expected
