import pickle
import random
import sys

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.nn import functional as F

from leakage.attacks import IDLGAttack
from leakage.datamodules import GroundTruth, Victims
from leakage.models import LeNet
from leakage.seeds import derive_seed
from tests import processes


def ready(dataset="sample", **kwargs):
    data = Victims(dataset, **kwargs)
    data.setup("fit")
    return data


def shared_by_all(data):
    return [data.share(range(first, min(first + 3, data.victims))) for first in range(0, data.victims, 3)]


def truth_of_all(data):
    return GroundTruth.cat(list(data.val_dataloader()))


@pytest.mark.parametrize("change", [{"lanes": 1}, {"lanes": "auto"}, {"num_workers": 2}, {"victims": 300}])
def test_a_victim_is_the_same_however_victims_are_grouped(change):
    usual = {"victims": 7, "images": 1, "seed": 3}
    expected, data = ready(**usual), ready(**(usual | change))
    truth, other = truth_of_all(expected), truth_of_all(data)
    assert other.ids.tolist() == list(range(data.victims))
    assert torch.equal(other.images[:7], truth.images)
    assert torch.equal(other.labels[:7], truth.labels)
    shared, parts = expected.share(range(7)), shared_by_all(data)
    assert torch.cat([part.ids for part in parts])[:7].tolist() == shared.ids.tolist()
    for name, state in shared.state.items():
        assert torch.equal(torch.cat([part.state[name] for part in parts])[:7], state)
    for name, gradient in shared.gradients.items():
        torch.testing.assert_close(torch.cat([part.gradients[name] for part in parts])[:7], gradient)


def tell() -> None:
    sys.stdout.write(f"{Victims('sample', victims=3, images=2, seed=5).configuration}\n")


@pytest.mark.slow
def test_a_victim_is_the_same_in_another_process(tmp_path):
    data = ready(victims=3, images=2, seed=5)
    assert processes.run(tmp_path / "said.txt", tell) == processes.Ended(0, f"{data.configuration}\n")


def test_victims_hold_the_permutation_of_their_seed():
    data = ready(victims=100, images=3, seed=11)
    images = data.source.open()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(11))
    truth = truth_of_all(data)
    assert truth.images.shape == (100, 3, 1, 28, 28)
    assert truth.images.dtype == torch.float32
    assert truth.labels.dtype == torch.int64
    for victim in (0, 1, 99):
        for number in range(3):
            image, label = images[int(order[victim * 3 + number])]
            assert torch.equal(truth.images[victim, number], image)
            assert truth.labels[victim, number] == label


def test_other_seeds_give_other_victims():
    first, second = ready(victims=20, seed=0), ready(victims=20, seed=1)
    assert not torch.equal(truth_of_all(first).images, truth_of_all(second).images)
    name = "classifier.bias"
    assert not torch.equal(first.share(range(20)).state[name], second.share(range(20)).state[name])


@pytest.mark.parametrize("weights", ["own", "shared"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_shared_gradients_are_those_of_autograd(weights, reduction):
    data = ready(victims=3, images=2, weights=weights, reduction=reduction)
    shared, truth = data.share(range(3)), truth_of_all(data)
    assert shared.own_weights is data.own_weights is (weights == "own")
    for victim in range(3):
        model = LeNet()
        model.load_state_dict({k: v[victim] if shared.own_weights else v for k, v in shared.state.items()})
        loss = F.cross_entropy(model(truth.images[victim]), truth.labels[victim], reduction=reduction)
        for (name, _), gradient in zip(
            model.named_parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            torch.testing.assert_close(shared.gradients[name][victim], gradient, rtol=1e-4, atol=1e-6)


LOCAL = {"images": 2, "local_steps": 4, "learning_rate": 0.1, "local_batch_size": 1}


def test_local_steps_reach_the_victims():
    data = ready(victims=2, **LOCAL)
    protocol = data.victim.protocol
    assert (protocol.local_steps, protocol.learning_rate, protocol.local_batch_size) == (4, 0.1, 1)
    shared, truth = data.share(range(2)), truth_of_all(data)
    model = LeNet()
    model.load_state_dict({name: tensor[1] for name, tensor in shared.state.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(truth.images[1, step % 2, None]), truth.labels[1, step % 2, None]).backward()
        optimizer.step()
    average = (shared.state["classifier.bias"][1] - model.classifier.bias) / 0.4
    torch.testing.assert_close(shared.gradients["classifier.bias"][1], average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"local_steps": 2},
        {"learning_rate": 0.2},
        {"local_batch_size": None},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"shuffle": True},
        {"reveal_learning_rate": False},
    ],
)
def test_a_checkpoint_of_other_local_steps(change):
    state = ready(victims=2, **LOCAL).state_dict()
    ready(victims=2, **LOCAL).load_state_dict(state)
    (name,) = change
    with pytest.raises(ValueError, match=f"checkpoint of the same victims, but got .*{name} .* in the checkpoint"):
        ready(victims=2, **(LOCAL | change)).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": None}, "Expected a `learning_rate` for 4 local steps, but got None"),
        ({"momentum": 1.5}, "Expected `momentum` below 1, .* but got 1.5"),
        ({"weight_decay": -1.0}, "Expected `weight_decay` of at least 0, but got -1.0"),
        ({"local_steps": 0}, "Expected `local_steps` to be a whole number of at least 1, but got 0"),
        ({"local_steps": 3}, "Expected `local_steps` to be a multiple of 2"),
        ({"images": 3, "local_batch_size": 2}, "Expected `local_batch_size` to divide `num_images` = 3"),
    ],
)
def test_wrong_local_steps(change, message):
    with pytest.raises(ValueError, match=message):
        Victims("sample", **(LOCAL | change))


def test_an_attack_through_local_steps(tmp_path):
    """The search sees through two steps: it finds an image whose two steps are those that were shared."""
    data = Victims("sample", victims=2, local_steps=2, learning_rate=0.5, reveal_labels=True)
    attack = IDLGAttack(max_evaluations=60, restarts=0)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(attack, datamodule=data)
    assert attack.victim.protocol.local_steps == 2
    assert attack.finished.loss.max() < 1e-3


def test_own_networks_are_drawn_from_the_seed_of_each_victim():
    data = ready(victims=4, seed=9)
    expected = data.victim.fresh_states([derive_seed(9, victim, "weights") for victim in range(4)])
    state = data.share(range(4)).state
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not torch.equal(state["classifier.bias"][0], state["classifier.bias"][1])


def test_weights_of_a_given_model_are_shared_by_default():
    model = LeNet(num_classes=12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = ready(victims=4, model=model)
    shared = data.share(range(4))
    assert not shared.own_weights
    assert shared.protocol.num_classes == 12
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(shared.state[name], tensor)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_default_model_shared_by_all_depends_on_the_seed_alone():
    states = []
    for seed in (0, 0, 1):
        torch.rand(1)
        states.append(ready(victims=2, weights="shared", seed=seed).share(range(2)).state["classifier.bias"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_gradients_have_the_precision_of_the_model():
    shared = ready(victims=2, model=LeNet().double()).share(range(2))
    assert {gradient.dtype for gradient in shared.gradients.values()} == {torch.float64}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_left_alone(num_workers):
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    data = ready(victims=3, num_workers=num_workers)
    next(iter(data.train_dataloader()))
    truth_of_all(data)
    data.state_dict()
    after = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


@pytest.mark.parametrize("reveal_labels", [False, True])
def test_the_attacker_is_given_no_ground_truth(reveal_labels):
    data = ready(victims=10, images=2, reveal_labels=reveal_labels)
    data.wanted = range(10)
    truth, batch = truth_of_all(data), next(iter(data.train_dataloader()))
    given = list(tensors_in(batch))
    assert len(given) == 2 * 8 + 1 + reveal_labels  # gradients and weights of 4 layers, ids
    assert not any(tensor.numel() == truth.images.numel() for tensor in given)
    revealed = [tensor for tensor in given if tensor.shape == truth.labels.shape and torch.equal(tensor, truth.labels)]
    assert len(revealed) == reveal_labels
    if reveal_labels:
        assert torch.equal(batch.labels, truth.labels)
    else:
        assert batch.labels is None


def test_what_goes_to_workers_travels_by_pickle():
    data = ready(victims=3)
    copy = pickle.loads(pickle.dumps(data.val_dataloader().dataset))
    assert torch.equal(copy[2].images, data.val_dataloader().dataset[2].images)


def test_more_images_than_there_are():
    ready(victims=500, images=2)
    with pytest.raises(
        ValueError,
        match=r"Expected `victims` \* `images` to be at most the 1000 images .*, but got 501 \* 2 = 1002",
    ):
        ready(victims=501, images=2)


@pytest.mark.parametrize("name", ["victims", "images"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_counts(name, value):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a whole number of at least 1, but got {value}"):
        Victims("sample", **{name: value})


@pytest.mark.parametrize("name", ["seed", "num_workers"])
@pytest.mark.parametrize("value", [-1, 0.5, False, "0", 2**63])
def test_counts_from_zero(name, value):
    expected = f"Expected `{name}` to be a whole number of at least 0( and below 2.*)?, but got {value!r}"
    with pytest.raises(ValueError, match=expected):
        Victims("sample", **{name: value})


def test_reveal_labels_is_a_flag():
    with pytest.raises(ValueError, match="Expected `reveal_labels` to be True or False, but got 'no'"):
        Victims("sample", reveal_labels="no")


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("weights", r"\['own', 'shared'\]"),
        ("loss", r"\['cross_entropy', 'mean_squared_error', 'own'\]"),
        ("reduction", r"\['mean', 'sum'\]"),
    ],
)
def test_unknown_choices(name, choices):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be one of {choices}, but got 'nonsense'"):
        Victims("sample", **{name: "nonsense"})


def test_a_model_with_too_few_classes():
    with pytest.raises(ValueError, match="a logit for each of the 10 classes of the data set, but got 9"):
        ready(victims=2, model=LeNet(num_classes=9))


def test_a_model_for_other_images():
    with pytest.raises(ValueError, match=r"Expected `model` to take images of shape \(N, 1, 28, 28\)"):
        ready(victims=2, model=LeNet(channels=3))


def test_what_is_no_model():
    with pytest.raises(ValueError, match=r"Expected `model` to be a torch\.nn\.Module, but got str"):
        Victims("sample", model="lenet")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.classifier = nn.Linear(784, 10)

    def forward(self, images):
        return self.classifier(self.scale * images.flatten(1))


def test_own_networks_of_a_model_that_cannot_be_drawn_anew_fail_at_setup():
    ready(victims=2, model=Scaled())
    with pytest.raises(ValueError, match="Expected every module with weights to have `reset_parameters"):
        ready(victims=2, model=Scaled(), weights="own")
