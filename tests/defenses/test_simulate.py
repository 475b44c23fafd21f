"""What an attacker who knows a defense says of gradients: those of the client are what it shared, others are not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

import leakage.defenses
from leakage import Victim
from leakage.defenses import (
    DPSGD,
    Client,
    Clip,
    Defense,
    Encoding,
    GaussianNoise,
    HalfPrecision,
    LaplaceNoise,
    Quantise,
    RandomPruning,
    Sign,
    Soteria,
    TopK,
)
from leakage.defenses.base import simulate
from tests.clients.networks import CLASSES, IMAGE_SHAPE, network, private

Gradients = dict[str, Tensor]
DEFENSES = [
    Clip(0.05),
    TopK(0.3),
    RandomPruning(0.4),
    Soteria(0.5, layer="3"),
    Quantise(1),
    Quantise(4),
    Quantise(6),
    Quantise(1, stochastic=True),
    Quantise(4, stochastic=True),
    Sign(),
    Sign(scaled=True),
]
SEEDS = st.integers(0, 2**32 - 1)
VICTIM = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)


def client(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Client, Gradients]:
    """One of a network of its own, and its gradient; no entry of it is zero."""
    images, labels = (tensor[0] for tensor in private(1, seed=seed))
    state = {name: tensor[0] for name, tensor in VICTIM.fresh_states([seed]).items()}
    targets = F.one_hot(labels, CLASSES).double()
    gradients = VICTIM.gradients(state, images, targets)
    return Client(VICTIM, state, images, targets), {name: tensor.to(dtype) for name, tensor in gradients.items()}


def sent(defenses: list[Defense], own: Client, gradients: Gradients, seed: int = 0) -> Gradients:
    """After all of them."""
    for place, defense in enumerate(defenses):
        generator = torch.Generator().manual_seed(seed + place)
        gradients = defense.for_client(own)(gradients, generator)
    return gradients


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def assert_like_shared(defenses: Sequence[Defense], gradients: Gradients, shared: Gradients) -> None:
    """To rounding, in units of each tensor's largest entry."""
    found = simulate(defenses, gradients, shared)
    assert found.keys() == shared.keys()
    for name, wanted in shared.items():
        slack = 16 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=slack)


def around(gradients: Gradients, size: float, seed: int = 0) -> Gradients:
    """Others, so many times each tensor's root mean square away."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in gradients.items()
    }


def test_these_are_all_stock_defenses_that_are_simulated():
    kinds = [value for value in vars(leakage.defenses).values() if isinstance(value, type)]
    stock = {kind for kind in kinds if issubclass(kind, Defense) and not issubclass(kind, Encoding)} - {Defense}
    others = {GaussianNoise, LaplaceNoise, DPSGD, HalfPrecision}
    assert {type(defense) for defense in DEFENSES} == stock - others
    assert all(defense.is_simulated for defense in DEFENSES)
    assert not any(defense.averages_out for defense in DEFENSES)
    for defense in (GaussianNoise(0.1), LaplaceNoise(0.1), DPSGD(0.1, 1.0), HalfPrecision()):
        assert not defense.is_simulated
        assert defense.averages_out
        given = client()[1]
        assert defense.simulate(given, {}) is given


# -- the client's own gradient


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
@given(seed=SEEDS, power=st.integers(-8, 2), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_clients_own_gradient_is_what_it_shared(defense, seed, power, dtype):
    own, gradients = client(seed, dtype)
    gradients = {name: 10.0**power * tensor for name, tensor in gradients.items()}
    shared = sent([defense], own, gradients, seed)
    assert_like_shared([defense], gradients, shared)


ORDERS = [*permutations(DEFENSES, 2)]
SEEN = [order for order in ORDERS if order[0].can_be_seen_after(order[1:])]


def test_what_an_attacker_can_see_after_another_defense():
    """What is done can be done again, and zeros last; what was rounded is not, or not only, what was shared."""
    for first, second in ORDERS:
        one_bit = isinstance(second, Quantise) and second.bits == 1
        sparse = isinstance(first, TopK | RandomPruning | Soteria) and not one_bit
        assert ((first, second) in SEEN) == (isinstance(first, Clip) or sparse)
        assert first.can_be_seen_after([])
        assert not isinstance(first, TopK) or not first.can_be_seen_after([second, GaussianNoise(0.1)])


@pytest.mark.parametrize("order", SEEN, ids=repr)
def test_so_it_is_after_two_defenses_one_after_the_other(order):
    for seed in range(10):
        own, gradients = client(seed)
        # Layers whose largest entries are not all of one size.
        gradients = {name: (1 + 3 * place) * tensor for place, (name, tensor) in enumerate(gradients.items())}
        shared = sent(list(order), own, gradients, 100 * seed)
        assert_like_shared(order, gradients, shared)


@given(
    sparse=st.sampled_from([None, TopK(0.3), RandomPruning(0.4), Soteria(0.5, layer="3")]),
    small=st.sampled_from([None, Quantise(6), Quantise(4, stochastic=True), Sign()]),
    seed=SEEDS,
)
def test_so_it_is_of_a_clipped_sparse_and_rounded_one(sparse, small, seed):
    defenses = [defense for defense in (Clip(0.05), sparse, small) if defense is not None]
    own, gradients = client(seed)
    shared = sent(defenses, own, gradients, seed)
    assert_like_shared(defenses, gradients, shared)
    assert not torch.allclose(flat(simulate(defenses, client(seed + 1)[1], shared)), flat(shared), rtol=0.01)


@pytest.mark.parametrize(
    "fine", [GaussianNoise(0.1), HalfPrecision(), Quantise(7), Quantise(6, stochastic=True)], ids=repr
)
def test_what_averages_out_is_left_out(fine):
    own, gradients = client()
    defenses = [Clip(0.05), fine]
    found = simulate(defenses, gradients, sent(defenses, own, gradients))
    torch.testing.assert_close(dict(found), sent([Clip(0.05)], own, gradients))


# -- other gradients


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
@given(seed=SEEDS)
def test_another_clients_gradient_is_not(defense, seed):
    own, gradients = client(seed)
    shared = sent([defense], own, gradients, seed)
    other = client(seed + 1)[1]
    if defense.describe() == {"name": "Quantise", "bits": 1, "stochastic": True}:  # of smaller ones it tells nothing
        other = {name: 3 * tensor for name, tensor in other.items()}
    found = defense.simulate(other, shared)
    assert float((flat(found) - flat(shared)).norm()) > 0.01 * float(flat(shared).norm())


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_it_is_further_off_the_further_a_gradient_is(defense):
    own, gradients = client()
    shared = sent([defense], own, gradients)
    off = [
        float((flat(defense.simulate(around(gradients, size), shared)) - flat(shared)).norm())
        for size in (0.01, 0.1, 1.0)
    ]
    assert off == sorted(off)
    assert off[2] > off[0]


# -- many victims at once


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_many_victims_it_is_that_of_each(defense, dtype):
    pairs = [client(seed, dtype) for seed in range(4)]
    gradients, shared = [], []
    for seed, (own, exact) in enumerate(pairs):
        gradients.append(around(exact, 0.5, seed))
        gradients[-1] = {name: tensor.to(dtype) for name, tensor in gradients[-1].items()}
        shared.append(sent([defense], own, exact, seed))
    stacked = [{name: torch.stack([part[name] for part in side]) for name in side[0]} for side in (gradients, shared)]
    leaves = {name: tensor.requires_grad_() for name, tensor in stacked[0].items()}
    found = vmap(defense.simulate)(leaves, stacked[1])
    by = torch.autograd.grad(sum(tensor.sin().sum() for tensor in found.values()), list(leaves.values()))
    for victim in range(4):
        own_leaves = {name: tensor.requires_grad_() for name, tensor in gradients[victim].items()}
        alone = defense.simulate(own_leaves, shared[victim])
        expected = torch.autograd.grad(sum(tensor.sin().sum() for tensor in alone.values()), list(own_leaves.values()))
        for name in alone:
            torch.testing.assert_close(found[name][victim], alone[name])
        for all_of_them, one in zip(by, expected, strict=True):
            torch.testing.assert_close(all_of_them[victim], one)
