"""Networks of the clients' own, drawn anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leakage import LeNet, Victim
from leakage.seeds import derive_seed
from tests.clients.networks import IMAGE_SHAPE, KINDS, network


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_states_do_not_depend_on_grouping(kind):
    victim = Victim(network(kind, bias=True), image_shape=IMAGE_SHAPE)
    seeds = [derive_seed(3, index, "weights") for index in range(5)]
    whole = victim.fresh_states(seeds)
    parts = [victim.fresh_states(part) for part in (seeds[:1], seeds[1:4], seeds[4:])]
    backwards = victim.fresh_states(seeds[::-1])
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name
        assert torch.equal(tensor, backwards[name].flip(0)), name
    weight = next(name for name in victim.trainable if name.endswith("weight"))
    assert not torch.equal(whole[weight][0], whole[weight][1])


def test_fresh_states_are_the_networks_own_initialisation():
    states = Victim(LeNet(), image_shape=(1, 28, 28)).fresh_states(list(range(20)))
    for name, tensor in states.items():
        assert tensor.abs().max() <= 0.5
        assert tensor.abs().max() > 0.45, f"{name} has torch's narrower initialisation"


def test_fresh_states_reset_statistics():
    model = network("batch_norm", bias=True)
    model[1].running_mean.fill_(3.0)
    states = Victim(model, image_shape=IMAGE_SHAPE).fresh_states([0, 1])
    assert torch.equal(states["1.running_mean"], torch.zeros(2, 3, dtype=torch.float64))
    assert states["1.num_batches_tracked"].shape == (2,)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale


def test_fresh_states_errors():
    with pytest.raises(ValueError, match="Expected `seeds` to hold one seed per victim, but got none"):
        Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE).fresh_states([])
    victim = Victim(nn.Sequential(Scale(), nn.Flatten(), nn.Linear(60, 3)), image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match=r"`reset_parameters\(\)`, but got Scale '0'.*use weights='shared'"):
        victim.fresh_states([0])


def test_fresh_states_by_a_parent_that_draws_the_weights():
    class Parent(nn.Sequential):
        def reset_parameters(self) -> None:
            nn.init.uniform_(self[0].scale)
            self[2].reset_parameters()

    victim = Victim(Parent(Scale(), nn.Flatten(), nn.Linear(60, 3)), image_shape=IMAGE_SHAPE)
    assert victim.fresh_states([0, 1])["0.scale"].unique().numel() == 2


def test_fresh_states_and_the_global_random_state_have_nothing_to_do_with_each_other():
    victim = Victim(network("conv", bias=True), image_shape=IMAGE_SHAPE)
    first = victim.fresh_states([5])
    torch.rand(7)
    before = torch.random.get_rng_state()
    second = victim.fresh_states([5])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
