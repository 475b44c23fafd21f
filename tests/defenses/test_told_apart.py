"""Gradients that an attacker who knows a defense can't tell apart, and those it can: values and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leakage.defenses import Clip, Defense, Quantise, RandomPruning, Sign, Soteria, TopK
from tests.defenses.test_simulate import DEFENSES, Gradients, around, assert_like_shared, client, flat, sent


def slopes(defense: Defense, gradients: Gradients, shared: Gradients) -> Tensor:
    """The derivative of all entries by all entries."""
    sizes = [tensor.numel() for tensor in gradients.values()]

    def found(entries: Tensor) -> Tensor:
        parts = torch.split(entries, sizes)
        given = {name: part.view_as(gradients[name]) for name, part in zip(gradients, parts, strict=True)}
        return flat(defense.simulate(given, shared))

    jacobian: Tensor = torch.func.jacrev(found)(flat(gradients))
    return jacobian


def one_by_one(defense: Defense, gradients: Gradients, shared: Gradients) -> Tensor:
    """The derivative of each entry by itself, on which no other depends."""
    jacobian = slopes(defense, gradients, shared)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    return jacobian.diagonal()


def nearest(numbers: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Of the values that there are to send, by looking at each."""
    steps = 2 ** (bits - 1) - 1
    values = torch.arange(-steps, steps + 1) / steps if bits > 1 else torch.tensor([-1.0, 1.0])
    values = values.double() * largest
    return values[(numbers.flatten()[:, None] - values).abs().argmin(1)].view_as(numbers)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_what_rounds_to_the_same_values_can_not_be_told_apart(bits):
    own, gradients = client()
    shared = sent([Quantise(bits)], own, gradients)
    others = around(gradients, 0.3)
    largest = {name: tensor.abs().max() for name, tensor in gradients.items()}
    inside = {name: others[name].abs() <= largest[name] for name in others}
    same = flat({n: inside[n] & nearest(others[n], largest[n], bits).isclose(shared[n]) for n in others})
    assert 0.05 < float(same.double().mean()) < 0.99
    found = flat(Quantise(bits).simulate(others, shared))
    assert torch.equal(found == flat(shared), same)
    torch.testing.assert_close(one_by_one(Quantise(bits), others, shared), (~same).double())


@pytest.mark.parametrize("bits", [1, 4])
def test_what_may_be_rounded_to_the_same_values_by_chance_can_not_be_told_apart(bits):
    defense, (own, gradients) = Quantise(bits, stochastic=True), client()
    shared = sent([defense], own, gradients)
    others = around(gradients, 0.3)
    seen = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in others.items()}
    # The largest entry tells the values that there are: where it stays, draws tell which may become which.
    for name, tensor in gradients.items():
        kept = tensor.abs() == tensor.abs().max()
        others[name] = torch.where(kept, tensor, others[name].clamp(-tensor.abs().max(), tensor.abs().max()))
    for seed in range(2000):
        again = sent([defense], own, others, seed)
        seen = {name: seen[name] | again[name].isclose(shared[name], atol=1e-12) for name in seen}
    share = float(flat(seen).double().mean())
    assert share == 1 if bits == 1 else 0.3 < share < 0.9
    unlikely = (1 - one_by_one(defense, others, shared)).bool() != flat(seen)
    assert float(unlikely.double().mean()) < 0.01
    assert not bool((unlikely & flat(seen)).any())


@pytest.mark.parametrize("defense", [RandomPruning(0.4), TopK(0.3)], ids=repr)
def test_entries_that_were_pruned_by_chance_are_not_looked_at(defense):
    own, gradients = client()
    shared = sent([defense], own, gradients)
    pruned = flat(shared) == 0
    assert float(pruned.double().mean()) == pytest.approx(1 - defense.share, abs=0.01)
    assert torch.equal(one_by_one(defense, around(gradients, 1.0), shared), (~pruned).double())


def test_columns_that_were_pruned_are_not_looked_at():
    defense, (own, gradients) = Soteria(0.5, layer="3"), client()
    shared = sent([defense], own, gradients)
    expected = {name: torch.ones_like(tensor) for name, tensor in gradients.items()}
    pruned = [column for column in range(7) if not shared["3.weight"][:, column].any()]
    assert len(pruned) == 4
    expected["3.weight"][:, pruned] = 0
    others = around(gradients, 1.0)
    assert torch.equal(one_by_one(defense, others, shared), flat(expected))
    found = defense.simulate(others, shared)
    assert torch.equal(flat(found), flat(expected) * flat(others))


@pytest.mark.parametrize("scaled", [False, True])
def test_entries_on_the_right_side_of_zero_can_not_be_told_apart(scaled):
    defense, (own, gradients) = Sign(scaled), client()
    shared = sent([defense], own, gradients)
    others = around(gradients, 1.0)
    right = flat({name: gradients[name].sign() == others[name].sign() for name in gradients})
    assert 0.2 < float((~right).double().mean()) < 0.8
    found, jacobian = defense.simulate(others, shared), slopes(defense, others, shared)
    assert torch.equal(flat(found) == flat(shared), right)
    assert torch.equal(jacobian.abs().sum(1) == 0, right)
    assert bool((jacobian.diagonal()[~right] > 0).all())
    # By how much, in units that do not depend on how large the gradient is.
    larger = defense.simulate({name: 1e6 * tensor for name, tensor in others.items()}, shared)
    torch.testing.assert_close(flat(larger), flat(found))


def test_the_length_of_a_clipped_gradient_can_not_be_told():
    defense, (own, gradients) = Clip(0.05), client()
    shared, others = sent([defense], own, gradients), around(gradients, 1.0)
    assert float(flat(others).norm()) > 0.05
    jacobian, entries = slopes(defense, others, shared), flat(others)
    assert float((jacobian @ entries).abs().max()) < 1e-12
    across = torch.randn(len(entries), generator=torch.Generator().manual_seed(0)).double()
    across -= entries * (across @ entries) / (entries @ entries)
    torch.testing.assert_close(jacobian @ across, across * (0.05 / entries.norm()))


@pytest.mark.parametrize("size", [0.5, 1e-3, 0.0])
def test_a_short_gradient_can_be_told_from_every_other(size):
    """Also one of zero."""
    defense, gradients = Clip(0.05), client()[1]
    short = {name: tensor * (size * 0.05 / flat(gradients).norm()) for name, tensor in gradients.items()}
    torch.testing.assert_close(flat(defense.simulate(short, gradients)), flat(short))
    jacobian = slopes(defense, short, gradients)
    torch.testing.assert_close(jacobian, torch.eye(len(jacobian)).double())


# -- gradients of zero


@pytest.mark.parametrize("defense", [d for d in DEFENSES if not isinstance(d, Soteria)], ids=repr)
def test_a_tensor_of_zeros_is_what_was_shared_of_it_and_nothing_is_divided_by_it(defense):
    given = {"weight": torch.zeros(3, 2).double(), "bias": torch.tensor([0.3, -0.1]).double()}
    shared = defense(given, torch.Generator())
    assert_like_shared([defense], given, shared)
    assert bool(slopes(defense, given, shared).isfinite().all())
    nothing = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    assert not bool(flat(defense.simulate(nothing, nothing)).any())
    assert bool(slopes(defense, nothing, nothing).isfinite().all())
