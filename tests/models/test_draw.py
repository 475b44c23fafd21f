"""Weights from a seed and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leakage.models import ConvNet, LeNet, draw_state
from leakage.models.draw import draw_states


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_is_the_initialisation_after_setting_torchs_seed():
    """The layers of these networks draw in the order in which they are built."""
    for network in (LeNet, lambda: ConvNet(width=8)):
        state = draw_state(network(), seed=5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            built = network() if network is not LeNet else draw_in_place(network())
        assert same(state, built.state_dict())


def draw_in_place(model: LeNet) -> LeNet:
    """LeNet draws twice when it is built: first its layers, each on its own, then the whole."""
    torch.manual_seed(5)
    for layer in [*model.features, model.classifier]:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    model.reset_parameters()
    return model


def test_depends_on_the_seed_alone():
    model = ConvNet(width=8)
    first = draw_state(model, seed=3)
    torch.rand(5)
    assert same(first, draw_state(ConvNet(width=8), seed=3))
    other = draw_state(model, seed=4)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_leaves_the_model_and_the_global_random_state():
    model = ConvNet(width=8)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.random.get_rng_state()
    state = draw_state(model, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(weights, dict(model.state_dict()))
    state["classifier.bias"].fill_(7.0)
    assert same(weights, dict(model.state_dict()))
    assert not any(tensor.requires_grad for tensor in state.values())


def test_holds_weights_and_buffers_only():
    model = ConvNet(width=8, norm="batch")
    model.features[1].running_mean.fill_(3.0)
    state = draw_state(model, seed=0)
    assert state.keys() == model.state_dict().keys()
    assert not state["features.1.running_mean"].any()
    model = ConvNet(width=8)
    assert draw_state(model, seed=0).keys() == dict(model.named_parameters()).keys()


def test_precision_is_the_models():
    assert draw_state(LeNet().double(), seed=0)["classifier.bias"].dtype == torch.float64


def test_of_tied_weights_only_the_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert [*draw_state(model, seed=0)] == ["0.weight", "0.bias", "1.bias"]


def test_many_seeds_are_one_after_the_other():
    model = ConvNet(width=8, norm="batch")
    for seed, state in zip((1, 2, 1), draw_states(model, [1, 2, 1]), strict=True):
        assert same(state, draw_state(model, seed))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_weights_that_no_module_draws():
    message = r"^Expected every module .* to have `reset_parameters\(\)`, but got Scale '1'\. Add this method\.$"
    with pytest.raises(ValueError, match=message):
        draw_state(nn.Sequential(nn.Linear(2, 2), Scale()), seed=0)


def test_weights_that_a_parent_draws():
    class Parent(nn.Sequential):
        def reset_parameters(self) -> None:
            nn.init.uniform_(self[0].scale)

    states = draw_states(Parent(Scale()), [0, 1])
    assert states[0]["0.scale"] != states[1]["0.scale"]
