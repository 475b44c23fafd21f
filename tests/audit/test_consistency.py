from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from leakage import Victim
from leakage.audit import check_shared, check_update
from leakage.audit.report import Check
from leakage.defenses import GaussianNoise
from tests.updates.clients import IMAGE_SHAPE, flower_list, images, network, trained

RATE = 0.1


def client(model: nn.Module, **options: Any) -> Victim:
    return Victim(model, image_shape=IMAGE_SHAPE, **options)


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.finding for check in checks if not check.passed}


def test_sound_updates_pass() -> None:
    norm = network(norm=True)
    cases: list[tuple[nn.Module, int, dict[str, Any]]] = [
        (network(), 1, {}),
        (network(), 4, {}),
        (network(), 32, {}),
        (network(), 4, {"reduction": "sum"}),
        (network(), 1, {"label_smoothing": 0.3}),
        (network(), 4, {"label_smoothing": 0.3}),
        (norm, 3, {}),
        (norm.eval(), 1, {}),
    ]
    for model, count, options in cases:
        after = trained(model, count, lr=RATE, **options)
        checks = check_update(model, after, client(model, num_images=count, **options), learning_rate=RATE)
        assert not failed(checks)
        assert {"arrays", "trained", "bias sum", "classes", "rank", "biases", "last layer"} <= {
            check.name for check in checks
        }


@pytest.mark.parametrize("count", [1, 4])
def test_sound_steps_pass(count: int) -> None:
    model, options = network(), {"momentum": 0.9, "weight_decay": 5e-4}
    for steps, more in ((5, {}), (5, options)):
        victim = client(model, num_images=count, local_steps=steps, learning_rate=0.01, **more)
        assert not failed(check_update(model, trained(model, count, lr=0.01, steps=steps, **more), victim))


def test_sound_updates_of_a_network_that_has_learnt_pass() -> None:
    model = trained(network(), 40, lr=0.2, steps=200)
    for count in (1, 4, 32):
        for steps in (1, 5):
            told = {} if steps == 1 else {"local_steps": steps, "learning_rate": RATE}
            victim = client(model, num_images=count, **told)
            after = trained(model, count, lr=RATE, steps=steps)
            rate = RATE if steps == 1 else None
            assert not failed(check_update(model, after, victim, learning_rate=rate))


def test_a_loss_that_is_not_declared_is_caught() -> None:
    model = network()
    smoothed = trained(model, lr=RATE, label_smoothing=0.3)
    assert "last layer" in failed(check_update(model, smoothed, client(model), learning_rate=RATE))
    declared = client(model, label_smoothing=0.3)
    assert "last layer" in failed(check_update(model, trained(model, lr=RATE), declared, learning_rate=RATE))
    faster = trained(model, lr=10 * RATE, label_smoothing=0.3)
    assert "10 times the declared" in failed(check_update(model, faster, declared, learning_rate=RATE))["last layer"]


def test_wrong_sign_is_named() -> None:
    model = network()
    after = trained(model, lr=RATE)
    exchanged = failed(check_update(after, model, client(model), learning_rate=RATE))
    assert exchanged["last layer"] == "The update is explained if `before` and `update` are exchanged."
    new = after.state_dict()
    difference = {name: tensor - new[name] for name, tensor in model.state_dict().items()}  # before - after
    found = failed(check_update(model, difference, client(model), holds="difference", learning_rate=RATE))
    assert found["classes"].endswith("The update has the opposite sign: after - before was given for before - after.")
    assert found["last layer"].startswith("The update has the opposite sign")
    several = failed(check_update(trained(model, 4, lr=RATE), model, client(model, num_images=4), learning_rate=RATE))
    assert "opposite sign" in several["classes"]


def test_wrong_learning_rate_is_named() -> None:
    model = network()
    for count in (1, 4):
        victim = client(model, num_images=count)
        found = failed(check_update(model, trained(model, count, lr=0.01), victim, learning_rate=RATE))
        assert "learning rate that is" in found["last layer"]
        assert "0.1 times the declared one" in found["last layer"]
    found = failed(check_update(model, trained(model, lr=0.037), client(model), learning_rate=RATE))
    assert "learning rate times steps is 0.037 by the update, 0.1 as declared" in found["last layer"]
    after = dict(trained(model, lr=0.02).named_parameters())
    update = {name: after[name] - weight for name, weight in model.named_parameters()}
    found = failed(check_update(model, update, client(model), holds="gradient", learning_rate=0.02))
    assert found["last layer"] == "The update is explained if it is a difference of weights, after - before."


def test_steps_momentum_and_reduction_are_named() -> None:
    model = network()
    one = failed(check_update(model, trained(model, lr=0.01, steps=5), client(model), learning_rate=0.01))
    assert one["last layer"] == "The update is explained by local steps: 5, not 1."
    assert "has rank 5" in one["rank"] or "has rank" in one["rank"]
    steps = client(model, local_steps=5, learning_rate=0.01)
    found = failed(check_update(model, trained(model, lr=0.01, steps=5, momentum=0.9), steps))
    assert found["last layer"].endswith("The update is explained by momentum: 0.9, not 0.")
    for count in (4, 32):
        after = trained(model, count, lr=RATE, reduction="sum")
        found = failed(check_update(model, after, client(model, num_images=count), learning_rate=RATE))
        assert found["last layer"].endswith("if the loss is the sum over the images, not the mean.")


def test_wrong_number_of_images_is_caught() -> None:
    model = network()
    after = trained(model, 4, lr=RATE)
    for declared in (1, 3):
        found = failed(check_update(model, after, client(model, num_images=declared), learning_rate=RATE))
        assert "has rank 4" in found["rank"]
        assert f"declared {declared} images" in found["rank"]
    # More than there are could be the same images twice, which no gradient tells apart.
    checks = check_update(model, after, client(model, num_images=8), learning_rate=RATE)
    assert not failed(checks)
    (finding,) = [check.finding for check in checks if check.name == "rank"]
    assert "rank 4 (images are alike, or predicted with certainty, or fewer than declared)" in finding


def test_another_model_is_caught() -> None:
    model, other = network(), network(seed=1)
    found = failed(check_update(other, trained(model, lr=RATE), client(model), learning_rate=RATE))
    assert {"bias sum", "rank", "biases", "last layer"} <= found.keys()
    # The gradient alone is a sound one, but was not taken at these weights.
    inputs, labels = images(1)
    shared = client(model).share(inputs[None], labels[None])
    elsewhere = dataclasses.replace(shared, state=client(other).state)
    found = failed(check_shared(elsewhere, client(other)))
    assert "`before` is from another round or model" in found["last layer"]
    assert not failed(check_shared(shared, client(model)))


def test_shuffled_order_of_flower_is_caught() -> None:
    model = network()
    before, after = flower_list(model), flower_list(trained(model, lr=RATE))
    names = [*model.state_dict()]
    by_name = sorted(range(len(names)), key=names.__getitem__)  # biases before weights
    reverse = list(range(len(names)))[::-1]
    for order in (by_name, reverse):
        found = failed(
            check_update([before[i] for i in order], [after[i] for i in order], client(model), learning_rate=RATE)
        )
        assert "in another order: that of `state_dict()`" in found["arrays"]
    # Two biases of one shape, whose exchange no shape tells.
    first, second = names.index("0.bias"), names.index("3.bias")
    order = list(range(len(names)))
    order[first], order[second] = second, first
    shuffled = network()
    dead = [0]
    with torch.no_grad():
        shuffled[0].bias[dead] = -100.0  # a unit that never fires: its row is zero, and its entry of the bias
    before, after = flower_list(shuffled), flower_list(trained(shuffled, lr=RATE))
    assert not failed(check_update(before, after, client(shuffled), learning_rate=RATE))
    swapped = [[arrays[i] for i in order] for arrays in (before, after)]
    found = failed(check_update(*swapped, client(shuffled), learning_rate=RATE))
    assert "Rows 0, 3 of the gradient of '0.weight' are zero, but those of '0.bias' are not" in found["biases"]


def test_batch_norm_tells_mode_and_steps() -> None:
    model = network(norm=True)
    after = trained(model, 3, lr=0.01, steps=2)
    wrong = failed(check_update(model, after, client(model, num_images=3), learning_rate=0.01))
    assert wrong["BatchNorm"] == "'1' counted 2 batches, but the declared number of local steps is 1."
    evaluated = failed(check_update(model, after, client(network(norm=True).eval(), num_images=3), learning_rate=0.01))
    assert "Put the model in training mode" in evaluated["BatchNorm"]
    after = trained(network(norm=True).eval(), 3, lr=0.01)
    training = failed(check_update(model, after, client(model, num_images=3), learning_rate=0.01))
    assert "Put the model in evaluation mode" in training["BatchNorm"]


def test_what_is_trained_and_what_is_frozen() -> None:
    model = network()
    same = failed(check_update(model, model, client(model), learning_rate=RATE))
    assert same == {"trained": "Nothing has changed: before and after are the same."}
    after = trained(model, lr=RATE)
    for name in ("0.weight", "0.bias"):
        after.get_parameter(name).data = model.get_parameter(name).data
    found = failed(check_update(model, after, client(model), learning_rate=RATE))
    assert "'0.weight' did not change" in found["trained"]
    frozen = network()
    frozen[0].requires_grad_(False)
    found = failed(check_update(model, trained(model, lr=RATE), client(frozen), learning_rate=RATE))
    assert "'0.bias', '0.weight' changed, though they are frozen" in found["trained"]


def test_another_loss_and_defenses() -> None:
    model = network()
    inputs, labels = images(1)
    squared = client(model, loss="mean_squared_error")
    shared = squared.share(inputs[None], labels[None])
    assert not failed(check_shared(shared, squared))
    found = failed(check_shared(dataclasses.replace(shared, protocol=client(model).protocol), client(model)))
    assert "the loss is not the cross-entropy" in found["bias sum"]
    noisy = client(model, defenses=[GaussianNoise(0.1)])
    checks = check_shared(noisy.share(inputs[None], labels[None]), noisy)
    assert not failed(checks)
    assert all(
        check.finding.startswith("Not tested: the declared defenses") for check in checks if check.name == "rank"
    )
    undeclared = dataclasses.replace(noisy.share(inputs[None], labels[None]), protocol=client(model).protocol)
    assert {"rank", "biases", "last layer"} <= failed(check_shared(undeclared, client(model))).keys()


def test_several_victims_have_names() -> None:
    model = network()
    inputs, labels = images(2)
    shared = client(model).share(inputs[:, None], labels[:, None])
    assert {check.client for check in check_shared(shared, client(model), client="phone")} == {"phone 0", "phone 1"}
    (check,) = check_shared(shared, client(model, num_images=2))
    assert (check.name, check.passed) == ("arrays", False)


def test_arrays_that_do_not_fit_are_a_check_and_no_error() -> None:
    model = network()
    found = failed(check_update(model, {"weight": torch.zeros(3)}, client(model), learning_rate=RATE))
    assert "with the names of the model" in found["arrays"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_update("missing.pt", model, client(model), learning_rate=RATE)
