"""Rules that claim to be exact are, on gradients from known predictions, features and labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from leakage.clients.victim import Victim
from leakage.labels import Auxiliary, infer_labels
from leakage.labels.from_gradients import idlg, llg, rlg, row_minimum
from leakage.models import LeNet
from tests.labels.by_hand import (
    Constant,
    Signed,
    counts_of,
    images_and_labels,
    layer_of,
    linear,
    network,
    victim_of,
)

NON_NEGATIVE = (nn.Sigmoid, nn.Softplus)
SIGNED = (nn.Tanh, nn.SiLU, nn.LogSigmoid)
STEPS: dict[str, Any] = {"local_steps": 3, "learning_rate": 0.1}


@given(
    seed=st.integers(0, 2**16),
    classes=st.sampled_from([2, 3, 10, 257]),
    width=st.integers(1, 20),
    activation=st.sampled_from(NON_NEGATIVE + SIGNED),
    bias=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    own=st.booleans(),
    steps=st.booleans(),
)
def test_the_label_of_one_image_whatever_the_network(
    seed: int,
    classes: int,
    width: int,
    activation: type[nn.Module],
    bias: bool,
    scale: float,
    reduction: str,
    own: bool,
    steps: bool,
) -> None:
    # The last layer's bias tells it, or that features are not negative, or that rows are multiples of one vector.
    assume(bias or activation in NON_NEGATIVE or (classes > 2 and not steps))
    model = network(seed, classes=classes, width=width, bias=bias, activation=activation(), scale=scale)
    victim = victim_of(model, 1, reduction=reduction, **(STEPS if steps else {}))
    images, labels = images_and_labels(seed, 6, 1, classes)
    shared = victim.share(images, labels, states=victim.fresh_states([*range(6)]) if own else None)
    for rule in ("idlg", "auto"):
        inferred = infer_labels(shared, victim, rule=rule)
        assert inferred.rule == "idlg"
        assert torch.equal(inferred.labels, labels)


@pytest.mark.parametrize("activation", [*NON_NEGATIVE, *SIGNED, nn.ReLU])
@pytest.mark.parametrize("bias", [True, False])
def test_the_label_of_one_image_after_training(activation: type[nn.Module], bias: bool) -> None:
    model = network(0, classes=10, width=30, bias=bias, activation=activation())
    images, labels = images_and_labels(0, 1, 100, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[0]), labels[0])
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.0, "this is about a network that has learnt something"
    victim = victim_of(model, 1)
    images, labels = images_and_labels(1, 1000, 1, 10)
    assert torch.equal(infer_labels(victim.share(images, labels), victim).labels, labels)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"class_weights": tuple(range(1, 11))}], ids=str)
def test_labels_of_other_targets(options: dict[str, Any]) -> None:
    sure = network(0, classes=10, scale=30.0)
    images, labels = images_and_labels(1, 100, 1, 10)
    predictions = sure(images[:, 0]).softmax(1)
    assert bool((predictions.gather(1, labels) > 0.9).any()), "smoothing makes the entry of a sure label positive"
    victim = victim_of(sure, 1, **options)
    shared = victim.share(images, labels)
    assert torch.equal(infer_labels(shared, victim).labels, labels)
    several = victim_of(network(0, classes=10), 8, **options)
    images, labels = images_and_labels(2, 20, 8, 10)
    for rule in ("auto", "mean_feature", "geng"):
        found = infer_labels(several.share(images, labels), several, rule=rule)
        assert torch.minimum(found.counts, counts_of(labels, 10)).sum() >= 0.97 * labels.numel()
    with pytest.raises(ValueError, match="Expected a loss without label smoothing and class weights for rule='llg'"):
        infer_labels(several.share(images, labels), several, rule="llg")
    unbiased = victim_of(network(0, classes=10, bias=False), 1, **options)
    shared = unbiased.share(images[:, :1], labels[:, :1])
    if "class_weights" in options:
        assert torch.equal(infer_labels(shared, unbiased).labels, labels[:, :1])
    else:
        with pytest.raises(ValueError, match="Expected a loss without label smoothing, or both gradients of the last"):
            infer_labels(shared, unbiased, rule="idlg")


def test_one_image_of_each_of_many_networks() -> None:
    victim = Victim(LeNet(3, 8, num_classes=100), image_shape=(3, 8, 8))
    images, labels = images_and_labels(0, 20, 1, 100, (3, 8, 8))
    shared = victim.share(images, labels, states=victim.fresh_states([*range(20)]))
    assert torch.equal(infer_labels(shared, victim).labels, labels)


def test_scaled_gradients_tell_the_same_label() -> None:
    victim = Victim(LeNet(1, 8), image_shape=(1, 8, 8))
    images, _ = images_and_labels(1, 10, 1, 10, (1, 8, 8))
    labels = torch.arange(10)[:, None]
    shared = victim.share(images, labels)
    for gradient in shared.gradients.values():
        gradient *= 1e-6
    assert torch.equal(infer_labels(shared, victim).labels, labels)


@pytest.mark.parametrize("classes", [3, 4, 20])
@pytest.mark.parametrize("seed", range(3))
def test_one_image_without_bias_where_the_sums_of_rows_are_not_enough(seed: int, classes: int) -> None:
    victim = victim_of(network(seed, classes=classes, width=6, bias=False, activation=nn.LogSigmoid()), 1)
    images, labels = images_and_labels(seed, 40, 1, classes)
    shared = victim.share(images, labels)
    rows = shared.gradients[f"{victim.classifier}.weight"].sum(-1)
    assert not torch.equal(rows.argmin(1, keepdim=True), labels)
    assert torch.equal(infer_labels(shared, victim).labels, labels)


def test_two_classes_without_bias_are_one_problem_with_two_answers() -> None:
    # Why iDLG claims nothing there: features h of class 0 and -h of class 1 share the same gradient.
    victim = Victim(linear(2, 4, before=Signed(), bias=False), image_shape=(1, 2, 2))
    image = torch.rand(1, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    first = victim.share(image, torch.tensor([[0]])).gradients
    second = victim.share(1 - image, torch.tensor([[1]])).gradients
    torch.testing.assert_close(first, second)


def test_a_frozen_weight_leaves_the_bias_to_read() -> None:
    model = linear(3, 12)
    model[1].weight.requires_grad_(False)
    victim = victim_of(model, 1)
    images, _ = images_and_labels(0, 3, 1, 3)
    labels = torch.tensor([[2], [0], [1]])
    assert torch.equal(infer_labels(victim.share(images, labels), victim).labels, labels)


def probabilities(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=generator)).softmax(-1)


@given(seed=st.integers(0, 2**16), classes=st.integers(2, 40), share=st.floats(0, 1))
def test_distinct_labels_by_the_minimum_of_rows_where_each_image_has_a_feature_of_its_own(
    seed: int, classes: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = 1 + int(share * (classes - 1))
    labels = torch.stack([torch.randperm(classes, generator=generator)[:count] for _ in range(3)])
    own = torch.eye(count).expand(3, -1, -1) * (0.1 + torch.rand(3, count, 1, generator=generator))
    features = torch.cat([own, torch.rand(3, count, 5, generator=generator)], dim=2)
    counts, _, present = row_minimum(layer_of(probabilities(generator, 3, count, classes), features, labels))
    assert torch.equal(counts, counts_of(labels, classes))
    assert torch.equal(present, counts > 0)


@given(seed=st.integers(0, 2**16), count=st.integers(1, 12), width=st.integers(1, 20))
def test_a_negative_entry_proves_a_class(seed: int, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(12, (4, count), generator=generator)
    features = torch.rand(4, count, width, generator=generator)
    _, _, present = row_minimum(layer_of(probabilities(generator, 4, count, 12), features, labels))
    assert not (present & (counts_of(labels, 12) == 0)).any()


@given(seed=st.integers(0, 2**16), count=st.integers(1, 8), total=st.floats(0.01, 100))
def test_llg_where_predictions_are_uniform_and_few_of_many_classes_are_there(
    seed: int, count: int, total: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randperm(20, generator=generator)[:3]
    labels = kinds[torch.randint(3, (4, count), generator=generator)]
    features = torch.rand(4, count, 5, generator=generator)
    features *= total / features.sum(2, keepdim=True)
    counts, _, _ = llg(layer_of(torch.full((4, count, 20), 1 / 20), features, labels))
    assert torch.equal(counts, counts_of(labels, 20))


def test_the_impact_of_llg_by_hand() -> None:
    # Sums of rows, K = 4 and N = 4: the impact is (0.5 + 0.3) / 4 * (1 + 1/4) = 0.25.
    layer = layer_of(torch.full((1, 4, 4), 1 / 4), torch.ones(1, 4, 2), torch.zeros(1, 4, dtype=torch.long))
    layer.weight_gradient = torch.tensor([[[-0.2, -0.3], [0.3, -0.6], [0.5, 0.2], [0.05, 0.05]]])
    counts, scores, _ = llg(layer)
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.2, -2.8, -0.4]]))
    # One each for the negative ones leaves -0.25 and -0.05: one more for the first, then 0 and -0.05.
    assert counts.tolist() == [[2, 2, 0, 0]]


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 14))
def test_rlg_finds_every_class_that_is_there_and_few_others(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(30, (1, count), generator=generator)
    features = torch.randn(1, count, 40, generator=generator)
    _, _, present = rlg(layer_of(probabilities(generator, 1, count, 30).double(), features.double(), labels))
    truth = counts_of(labels, 30) > 0
    assert present is not None
    assert not (truth & ~present).any()
    if count <= 5:
        assert torch.equal(present, truth)


def test_rlg_can_part_every_class_from_one_image_fewer_than_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (3, 9), generator=generator)  # half of the classes are not there
    features = torch.randn(3, 9, 20, generator=generator)
    _, _, present = rlg(layer_of(probabilities(generator, 3, 9, 10), features, labels))
    assert present is not None
    assert present.all()


def test_rlg_misses_classes_whose_images_have_the_same_features() -> None:
    # The columns only hold the sum of the two images' p - y: no plane is below one class alone.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, 8, generator=generator).expand(-1, 2, -1)
    layer = layer_of(torch.full((1, 2, 6), 1 / 6), features, torch.tensor([[1, 4]]))
    _, _, present = rlg(layer)
    assert present is not None
    assert not present.any()


SIZES = st.sampled_from([(1, 2), (5, 2), (5, 3), (64, 10), (30, 100), (300, 3), (1024, 100)])


@given(
    seed=st.integers(0, 2**16),
    sizes=SIZES,
    scale=st.sampled_from([0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    own=st.booleans(),
    few=st.booleans(),
)
def test_all_images_have_the_same_features(
    seed: int, sizes: tuple[int, int], scale: float, reduction: str, own: bool, few: bool
) -> None:
    count, classes = sizes
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(6, generator=generator) + 0.1
    victim = victim_of(
        linear(classes, 6, before=Constant(features), scale=scale, seed=seed), count, reduction=reduction
    )
    images, labels = images_and_labels(seed, 3, count, min(classes, 2) if few else classes)
    states = None
    if own:
        states = {name: torch.stack([tensor, 0.5 * tensor, -tensor]) for name, tensor in victim.state.items()}
        states["0.features"] = states["0.features"].abs()
    shared = victim.share(images, labels, states=states)
    truth = counts_of(labels, classes)
    auxiliary = Auxiliary(torch.rand(2 * classes, 3, 2, 2, generator=generator), torch.arange(classes).repeat(2))
    for rule in ("geng", "mean_feature"):
        assert torch.equal(infer_labels(shared, victim, rule=rule).counts, truth), rule
    assert torch.equal(infer_labels(shared, victim, rule="mean_feature", auxiliary=auxiliary).counts, truth)
    if not own:
        assert torch.equal(infer_labels(shared, victim, rule="rlu", auxiliary=auxiliary).counts, truth)
    # One image weighs 1 - 1/K² of what LLG's impact says: exact until the difference adds up to an image.
    if int(truth.max()) < classes**2:
        for rule in ("llg_star", "llg_plus"):
            inferred = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary)
            assert torch.equal(inferred.counts, truth), rule
    # iLRG looks at classes with more images than predicted only: others' rows have no negative entry.
    logits = shared.state["1.weight"] @ features[..., None] if not own else None
    if logits is not None:
        predicted = count * (logits.squeeze(-1) + shared.state["1.bias"]).softmax(-1)
        if bool(((truth == 0) | (truth > predicted + 1e-3 * count)).all()):
            assert torch.equal(infer_labels(shared, victim, rule="ilrg").counts, truth)


@given(seed=st.integers(0, 2**16), sizes=st.sampled_from([(1, 3), (7, 3), (64, 10), (50, 30)]))
def test_ilrg_where_all_images_have_the_same_features_that_may_be_negative(seed: int, sizes: tuple[int, int]) -> None:
    count, classes = sizes
    features = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    features = -features.abs() if seed % 2 else features
    assume(bool((features < 0).any()))
    victim = victim_of(linear(classes, 6, before=Constant(features), seed=seed), count)
    images, labels = images_and_labels(seed, 4, count, classes)
    inferred = infer_labels(victim.share(images, labels), victim, rule="ilrg")
    assert torch.equal(inferred.counts, counts_of(labels, classes))


def test_ilrg_misses_a_class_that_is_rarer_than_predicted() -> None:
    victim = victim_of(linear(3, 6, before=Constant(torch.arange(1.0, 7.0)), scale=0.0), 12)
    images, _ = images_and_labels(0, 1, 12, 3)
    labels = torch.tensor([[0] * 9 + [1] * 2 + [2]])
    inferred = infer_labels(victim.share(images, labels), victim, rule="ilrg")
    assert inferred.counts.tolist() == [[12, 0, 0]]


@pytest.mark.parametrize("frozen", ["weight", "bias", None])
def test_geng_with_either_gradient(frozen: str | None) -> None:
    model = linear(20, 6, before=Constant(torch.arange(1.0, 7.0)), seed=3)
    if frozen:
        getattr(model[1], frozen).requires_grad_(False)
    victim = victim_of(model, 40)
    images, labels = images_and_labels(0, 5, 40, 20)
    inferred = infer_labels(victim.share(images, labels), victim, rule="geng")
    assert torch.equal(inferred.counts, counts_of(labels, 20))


@given(seed=st.integers(0, 2**16), sizes=st.sampled_from([(1, 3), (7, 3), (64, 10), (50, 30)]))
def test_rlu_where_all_images_of_a_class_have_the_same_prediction(seed: int, sizes: tuple[int, int]) -> None:
    count, classes = sizes
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.rand(classes, 3, 2, 2, generator=generator)
    victim = victim_of(linear(classes, 12, seed=seed), count)
    labels = torch.randint(classes, (4, count), generator=generator)
    auxiliary = Auxiliary(kinds.repeat(2, 1, 1, 1), torch.arange(classes).repeat(2))
    shared = victim.share(kinds[labels], labels)
    inferred = infer_labels(shared, victim, rule="rlu", auxiliary=auxiliary)
    assert torch.equal(inferred.counts, counts_of(labels, classes))


@pytest.mark.parametrize("rule", ["ilrg", "geng", "mean_feature", "llg", "llg_star"])
@pytest.mark.parametrize("labels", [[1, 1, 4], [2, 2, 2], [0, 5, 9], [9, 0, 9]])
def test_repeated_labels_of_an_untrained_network(rule: str, labels: list[int]) -> None:
    victim = victim_of(network(3, classes=10, scale=0.3), 3)
    images, _ = images_and_labels(3, 1, 3, 10)
    inferred = infer_labels(victim.share(images, torch.tensor([labels])), victim, rule=rule)
    assert inferred.labels.tolist() == [sorted(labels)]


def test_idlg_needs_no_more_than_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (50, 1), generator=generator)
    layer = layer_of(probabilities(generator, 50, 1, 7), torch.randn(50, 1, 4, generator=generator), labels)
    assert torch.equal(idlg(layer)[0], counts_of(labels, 7))
    without = copy.copy(layer)
    without.bias_gradient = None
    assert torch.equal(idlg(without)[0], counts_of(labels, 7))


def test_idlg_is_exact_where_the_network_is_so_sure_that_most_entries_are_zero() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False), nn.Linear(6, 8))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 4 * torch.randn(parameter.shape, generator=generator)
    victim = Victim(model, image_shape=(3, 2, 2))
    images = torch.rand(200, 1, 3, 2, 2, generator=generator)
    labels = model(images.squeeze(1)).argmax(1, keepdim=True)  # what the network predicts
    shared = victim.share(images, labels)
    push = shared.gradients["2.bias"]
    tied = ((push == 0).sum(1) > 1) & (push != 0).any(1)
    assert tied.sum() > 10
    assert torch.equal(infer_labels(shared.select(tied), victim).labels, labels[tied])


def test_idlg_without_a_bias_reads_gradients_that_nearly_vanish() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 8, bias=False))
    victim = Victim(model, image_shape=(3, 2, 2))
    images, labels = torch.rand(50, 1, 3, 2, 2, generator=generator), torch.randint(8, (50, 1), generator=generator)
    shared = victim.share(images, labels)
    for gradient in shared.gradients.values():
        gradient *= 1e-30
    assert torch.equal(infer_labels(shared, victim).labels, labels)
