"""What travels between client and attacker: its parts, and what can be wrong with its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from leakage import SharedGradient
from tests.clients.shared import assert_equal, make


@pytest.mark.parametrize("own", [True, False])
def test_select(own):
    shared = make(4, own=own)
    picked = shared.select(torch.tensor([2, 0]))
    assert len(picked) == 2
    assert picked.ids.tolist() == [12, 10]
    assert torch.equal(picked.labels, shared.labels[[2, 0]])
    assert torch.equal(picked.gradients["0.bias"], shared.gradients["0.bias"][[2, 0]])
    expected = shared.state["0.bias"][[2, 0]] if own else shared.state["0.bias"]
    assert torch.equal(picked.state["0.bias"], expected)
    assert_equal(picked, shared.select(torch.tensor([True, False, True, False])).select(torch.tensor([1, 0])))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_replace_writes_over_the_victims_at_some_places(own, labels):
    whole = make(6, own=own, labels=labels)
    lanes, others = whole.select(torch.arange(4)), whole.select(torch.tensor([4, 5]))
    memory = {name: tensor.data_ptr() for name, tensor in lanes.gradients.items()}
    replaced = lanes.replace(torch.tensor([3, 1]), others)
    assert_equal(replaced, whole.select(torch.tensor([0, 5, 2, 4])))
    assert {name: tensor.data_ptr() for name, tensor in replaced.gradients.items()} == memory  # none is copied
    assert_equal(others, whole.select(torch.tensor([4, 5])))


def test_replace_takes_the_precision_and_device_of_the_first():
    lanes = make(4).select(torch.arange(3)).to(torch.float64)
    replaced = lanes.replace(torch.tensor([2]), make(4).select(torch.tensor([3])))
    assert {tensor.dtype for tensor in replaced.gradients.values()} == {torch.float64}
    assert replaced.state["1.num_batches_tracked"].dtype == torch.int64
    assert_equal(replaced, make(4).select(torch.tensor([0, 1, 3])).to(torch.float64))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_cat_undoes_select(own, labels):
    shared = make(4, own=own, labels=labels)
    parts = [shared.select(torch.tensor([index])) for index in range(4)]
    assert_equal(SharedGradient.cat(parts), shared)
    assert_equal(SharedGradient.cat([shared]), shared)


@pytest.mark.parametrize(
    "other",
    [
        make(own=False),
        make(labels=False),
        dataclasses.replace(make(), protocol=dataclasses.replace(make().protocol, reduction="sum")),
    ],
    ids=["weights", "labels", "protocol"],
)
def test_cat_refuses_what_does_not_belong_together(other):
    with pytest.raises(ValueError, match="Expected parts of the same protocol, own weights and known labels"):
        SharedGradient.cat([make(), other])


def test_to_changes_floating_point_only():
    moved = make().to(torch.float64)
    assert {tensor.dtype for tensor in moved.gradients.values()} == {torch.float64}
    assert moved.state["1.running_mean"].dtype == torch.float64
    assert moved.state["1.num_batches_tracked"].dtype == torch.int64
    assert moved.labels.dtype == moved.ids.dtype == torch.int64


def test_to_moves_all_but_ids():
    moved = make().to("meta")
    assert moved.labels.device.type == moved.state["1.num_batches_tracked"].device.type == "meta"
    assert moved.ids.device.type == "cpu"
    # a precision alone moves nothing, so what is elsewhere stays there
    assert moved.to(torch.float64).labels.device.type == "meta"


def test_non_finite_gradients_name_the_victims():
    shared = make(4)
    shared.gradients["3.weight"][1, 0, 0] = torch.nan
    shared.gradients["3.weight"][3, 2, 5] = -torch.inf
    with pytest.raises(ValueError, match=r"finite numbers in the gradient of '3\.weight'.*\(victims \[11, 13\]\)"):
        shared.check()


def test_many_non_finite_victims_are_abridged():
    shared = make(8)
    shared.gradients["3.bias"][:] = torch.nan
    with pytest.raises(ValueError, match=r"\(victims \[10, 11, 12, 13, 14\], \.\.\.\)"):
        shared.check()


def test_non_finite_weights():
    shared = make()
    shared.state["0.weight"][2] = torch.inf
    with pytest.raises(ValueError, match=r"finite numbers in the state of '0\.weight'.*\(victims \[12\]\)"):
        shared.check()
    shared = make(own=False)
    shared.state["1.running_var"] = torch.tensor([1.0, torch.nan])
    with pytest.raises(ValueError, match=r"finite numbers in the state of '1\.running_var', but got NaN or inf\.$"):
        shared.check()


def test_non_finite_scalar_weight_of_own_networks():
    shared = make()
    shared.state["scale"] = torch.tensor([1.0, torch.nan, 1.0])
    with pytest.raises(ValueError, match=r"state of 'scale'.*\(victims \[11\]\)"):
        shared.check()


def change(**changes: object) -> Callable[[SharedGradient], SharedGradient]:
    return lambda shared: dataclasses.replace(shared, **changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(ids=torch.tensor(3)), r"`ids` as whole numbers of at least 0 and shape \(V,\), but got torch.int64 "),
        (change(ids=torch.tensor([0, -1])), r"`ids` as whole numbers of at least 0 .*\(2,\), \[0, -1"),
        (change(ids=torch.zeros(3, 1, dtype=torch.int64)), r"`ids` .* but got torch.int64 \(3, 1\)"),
        (change(ids=torch.zeros(3)), r"`ids` as whole numbers .* but got torch.float32 \(3,\)"),
        (change(ids=torch.zeros(0, dtype=torch.int64)), r"`ids` .* but got torch.int64 \(0,\)"),
        (change(gradients={}), "`gradients` to hold at least one tensor, but got none"),
        (
            change(gradients={"w": torch.zeros(2, 5)}),
            r"gradient of 'w' to have shape \(3, \.\.\.\), but got \(2, 5\)",
        ),
        (
            change(gradients={"w": torch.tensor(1.0)}),
            r"gradient of 'w' to have shape \(3, \.\.\.\), but got \(\)",
        ),
        (
            change(gradients={"w": torch.zeros(3, 2, dtype=torch.int32)}),
            "in floating point, but got torch.int32",
        ),
        (
            change(state={"w": torch.zeros(2, 5)}),
            r"state of 'w' to have shape \(3, \.\.\.\), but got \(2, 5\)",
        ),
        (change(labels=torch.zeros(3, dtype=torch.int64)), r"`labels` of shape \(3, 2\), but got \(3,\)"),
        (change(labels=torch.zeros(3, 2)), r"`labels` as class indices from 0 to 2, but got torch.float32"),
        (
            change(labels=torch.full((3, 2), 3)),
            "`labels` as class indices from 0 to 2, but got torch.int64 from 3 to 3",
        ),
        (
            change(labels=torch.tensor([[0, 1], [2, -1], [0, 0]])),
            "`labels` as class indices from 0 to 2, but got torch.int64 from -1 to 2",
        ),
    ],
)
def test_check(tmp_path, spoil, message):
    spoiled = spoil(make())
    with pytest.raises(ValueError, match=message):
        spoiled.check()
    spoiled.save(tmp_path / "client.safetensors")
    with pytest.raises(ValueError, match=message):
        SharedGradient.load(tmp_path / "client.safetensors")
