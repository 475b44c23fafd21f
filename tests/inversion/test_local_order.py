"""Clients that shuffle their images: attacks search for the order too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage import LeNet, Protocol, Victim
from leakage.attacks import DLGAttack, GaussNewtonAttack, GradientInversion, IDLGAttack
from leakage.clients.local_steps import Secrets, draw_orders
from leakage.dummies import LocalOrder
from leakage.seeds import derive_seed

# Three passes over four images, two at a time.
STEPS: dict[str, Any] = {"local_steps": 6, "learning_rate": 0.02, "local_batch_size": 2}
# Two passes, so that attacks are quicker.
CLIENTS: dict[str, Any] = {"images": 4, **STEPS, "local_steps": 4, "shuffle": True, "reveal_labels": True}


def mean_psnr(attack: GradientInversion) -> float:
    return sum(score.psnr for score in attack.scores.values()) / len(attack.scores)


def supposed_to_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalOrder, "shape", lambda self, protocol: None)


def test_finds_images_of_an_order_of_its_own(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly as good as of clients in a known order, and far better than if it supposed a wrong one."""

    def make() -> GradientInversion:
        return IDLGAttack(max_evaluations=70, restarts=0)

    searched = mean_psnr(kit.fit(make(), kit.victims(victims=2, **CLIENTS)))
    told = mean_psnr(kit.fit(make(), kit.victims(victims=2, **CLIENTS | {"shuffle": False})))
    supposed_to_take_turns(monkeypatch)
    wrong = mean_psnr(kit.fit(make(), kit.victims(victims=2, **CLIENTS)))
    assert searched > wrong + 0.6 * (told - wrong)
    assert told > wrong + 5


def test_in_one_pass_it_finds_the_partition(kit: Any) -> None:
    """Of two images, whose labels are known: which was first."""
    clients = CLIENTS | {"images": 2, "local_batch_size": 1, "local_steps": 2, "learning_rate": 0.1}
    attack = kit.fit(IDLGAttack(max_evaluations=400), kit.victims(victims=3, **clients))
    assert bool((kit.by_id(attack).loss < 1e-5).all())
    assert sum(score.success == 1 for score in attack.scores.values()) >= 2


def test_labels_and_rate_may_be_unknown_too(kit: Any) -> None:
    clients = CLIENTS | {"images": 2, "local_batch_size": 1, "reveal_labels": False, "reveal_learning_rate": False}
    start, attack = (
        kit.fit(DLGAttack(max_evaluations=evaluations, restarts=0), kit.victims(victims=1, **clients))
        for evaluations in (1, 150)
    )
    assert bool((kit.by_id(attack).loss < 1e-3 * kit.by_id(start).loss).all())
    rate = kit.by_id(attack).learning_rate
    assert (rate / 0.02 - 1).abs().max() < 0.1
    kit.fit(GaussNewtonAttack(max_evaluations=2, restarts=0, underdetermined=True), kit.victims(victims=1, **CLIENTS))


def test_labels_are_inferred_though_images_are_taken_in_turns(kit: Any) -> None:
    options = CLIENTS | {"reveal_labels": False, "learning_rate": 1e-3}
    victims = kit.victims(victims=4, **options)
    attack = kit.fit(IDLGAttack(max_evaluations=1, restarts=0), victims)
    (truth,) = victims.val_dataloader()
    right = kit.by_id(attack).labels == truth.labels.sort(1).values
    assert right.float().mean() > 0.9


# Clients.


def client(**options: Any) -> Victim:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LeNet(1, 12)
    return Victim(model, image_shape=(1, 12, 12), num_images=4, **{**STEPS, "shuffle": True, **options})


def test_each_client_and_each_pass_has_an_order_of_its_own() -> None:
    orders = draw_orders(client().protocol, [0, 1, 2, 3], 5)
    assert orders is not None
    assert orders.shape == (4, 12)
    passes = orders.view(4, 3, 4)
    assert torch.equal(passes.sort(-1).values, torch.arange(4).expand(4, 3, 4))
    assert len({tuple(order) for order in passes.flatten(0, 1).tolist()}) > 6
    assert torch.equal(draw_orders(client().protocol, [2], 5), orders[2:3])
    assert not torch.equal(draw_orders(client().protocol, [2], 6), orders[2:3])
    assert draw_orders(client(shuffle=False).protocol, [0], 0) is None


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "weight_decay": 0.1, "reduction": "sum"}])
def test_shuffled_steps_are_those_of_torchs_sgd(options: dict[str, Any]) -> None:
    victim = client(**options)
    images, labels = torch.rand(2, 4, 1, 12, 12), torch.randint(10, (2, 4))
    shared = victim.share(images, labels, ids=torch.tensor([7, 3]), seed=1)
    for place, id_ in enumerate((7, 3)):
        generator = torch.Generator().manual_seed(derive_seed(1, id_, "local order"))
        model = LeNet(1, 12)
        model.load_state_dict(shared.state)
        decay = {name: options.get(name, 0.0) for name in ("momentum", "weight_decay")}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, **decay)
        for _ in range(3):
            for batch in torch.randperm(4, generator=generator).split(2):
                optimizer.zero_grad()
                reduction = options.get("reduction", "mean")
                F.cross_entropy(model(images[place, batch]), labels[place, batch], reduction=reduction).backward()
                optimizer.step()
        for name, parameter in model.named_parameters():
            step = (shared.state[name] - parameter) / (0.02 * 6)
            torch.testing.assert_close(shared.gradients[name][place], step, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum", "momentum": 0.9}, {"local_steps": 8}, {"local_steps": 66}]
)
def test_shares_of_zero_and_one_are_an_order(options: dict[str, Any]) -> None:
    """Also where the simulation is differentiated in little memory."""
    victim = client(**options)
    images, targets = torch.rand(4, 1, 12, 12), torch.eye(10)[[3, 1, 4, 1]]
    orders = draw_orders(victim.protocol, [0], 0)
    assert orders is not None
    order = orders[0].view(-1, 2)
    shares = torch.zeros(len(order), 4).scatter_(1, order, 1.0)

    def evaluated(images: Tensor, secrets: Secrets, sparing: bool) -> tuple[Tensor, Tensor]:
        images = images.clone().requires_grad_()
        gradients, seen = victim.evaluate(
            victim.state, images, targets, ["classifier"], secrets=secrets, sparing=sparing
        )
        assert len(seen["classifier"].inputs) == 4
        value = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
        return value, torch.autograd.grad(value, images)[0]

    expected = evaluated(images, Secrets(order=orders[0]), False)
    for sparing in (False, True):
        found = evaluated(images, Secrets(shares=shares), sparing)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    equal = Secrets(shares=torch.full_like(shares, 0.5))
    one, other = (
        victim.evaluate(victim.state, images[p], targets[p], secrets=equal)[0] for p in ([0, 1, 2, 3], [3, 1, 0, 2])
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_shares_of_an_epoch_add_up_to_one() -> None:
    protocol = client().protocol
    shape = LocalOrder().shape(protocol)
    assert shape == (3, 2, 4)
    shares = LocalOrder().write(torch.randn(shape), {})
    torch.testing.assert_close(shares.view(3, 2, 4).sum(1), torch.ones(3, 4))
    assert LocalOrder().shape(client(shuffle=False).protocol) is None


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_batch_size": None}, "a `local_batch_size` below `num_images` with `shuffle`, .* but got None of 4"),
        ({"local_batch_size": 4}, "a `local_batch_size` below `num_images` with `shuffle`, .* but got 4 of 4"),
        ({"shuffle": 1}, "`shuffle` to be True or False, but got 1"),
    ],
)
def test_wrong_orders(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        Protocol((1, 4, 4), 3, 4, **{**STEPS, "shuffle": True, **options})


def test_batch_norm_that_mixes_the_images_of_a_step(kit: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10))
    with pytest.raises(ValueError, match=r"Expected BatchNorm in evaluation mode for clients that shuffle .* '1'"):
        kit.fit(IDLGAttack(), kit.victims(victims=1, model=model.train(), **CLIENTS))
    kit.fit(IDLGAttack(max_evaluations=2, restarts=0), kit.victims(victims=1, model=model.eval(), **CLIENTS))
