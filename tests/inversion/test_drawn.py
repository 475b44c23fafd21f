"""Networks that draw random numbers: what clients share, and attacks that search for what was drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage import LeNet, Victim
from leakage.attacks import GaussNewtonAttack, GradientInversion, IDLGAttack
from leakage.clients.chain import find_links
from leakage.clients.local_steps import Secrets
from leakage.defenses import DPSGD, PRECODE, VariationalBottleneck
from leakage.dummies import Drawn
from leakage.models.drawing import as_buffers, draw

SHAPE = (3, 4, 4)


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Sigmoid(), *layers, nn.Flatten(), nn.Linear(96, 5))


def lenet(where: int = 6, p: float = 0.3) -> LeNet:
    model = LeNet(image_size=12)
    model.features.insert(where, nn.Dropout(p))
    return model


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters())))


class Masked(nn.Module):
    """What dropout does, with a mask that is given."""

    def __init__(self, kind: type[nn.Module], mask: Tensor, p: float) -> None:
        super().__init__()
        self.kind, self.mask, self.p = kind, mask, p

    def forward(self, inputs: Tensor) -> Tensor:
        if self.kind in (nn.AlphaDropout, nn.FeatureAlphaDropout):
            least = F.selu(torch.tensor(-1e4, dtype=inputs.dtype))  # what SELU has at minus infinity
            dropped = torch.where(self.mask.bool(), inputs, least)
            scale = 1 / ((1 - self.p) * (1 + self.p * least**2)).sqrt()
            return scale * (dropped - self.p * least)
        return torch.where(self.mask.bool(), inputs / (1 - self.p), 0.0)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.Dropout, (6, 4, 4)),
        (nn.Dropout2d, (6, 1, 1)),
        (nn.AlphaDropout, (6, 4, 4)),
        (nn.FeatureAlphaDropout, (6, 1, 1)),
    ],
)
def test_what_is_shared_is_the_gradient_behind_the_mask(kind: Callable[[float], nn.Module], shape: Any) -> None:
    torch.manual_seed(0)
    model = network(kind(0.4)).double()
    victim = Victim(model, image_shape=SHAPE, num_images=3)
    assert {name: own.shape for name, own in victim.draws.items()} == {"2": shape}
    images, labels = torch.rand(2, 3, *SHAPE).double(), torch.randint(5, (2, 3))
    shared = victim.share(images, labels, seed=4)
    drawn = draw(victim.draws, 3, [0, 1], seed=4).double()
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    for client in range(2):
        mask = as_buffers(victim.draws, drawn[client])["2.drawn"]
        masked = nn.Sequential(*model[:2], Masked(kind, mask, 0.4), *model[3:])  # type: ignore[index]
        for found, expected in zip(
            shared.gradients.values(), gradients(masked, images[client], labels[client]), strict=True
        ):
            torch.testing.assert_close(found[client], expected)


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    """As torch's own does."""
    torch.manual_seed(0)
    victim = Victim(nn.Sequential(nn.AlphaDropout(0.3), nn.Flatten(), nn.Linear(48, 3)), image_shape=SHAPE)
    dropout = victim.model.get_submodule("0")
    inputs = torch.randn(100_000)
    dropout.drawn = (torch.rand(100_000) < 0.7).float()
    outputs = dropout(inputs)
    assert abs(float(outputs.mean())) < 0.02
    assert abs(float(outputs.var()) - 1) < 0.03


def test_draws_are_each_clients_own_and_those_of_the_seed() -> None:
    victim = Victim(network(nn.Dropout(0.5)), image_shape=SHAPE)
    images, labels = torch.rand(1, 1, *SHAPE).expand(3, -1, -1, -1, -1), torch.zeros(3, 1, dtype=torch.long)
    state = torch.get_rng_state()
    shared = victim.share(images, labels).gradients["0.weight"]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(shared[0], shared[1])
    torch.testing.assert_close(
        victim.share(images[1:], labels[1:], ids=torch.tensor([1, 2])).gradients["0.weight"], shared[1:]
    )
    assert not torch.equal(victim.share(images, labels, seed=1).gradients["0.weight"], shared)


def test_each_local_step_draws_anew() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_images": 4, "local_steps": 4, "local_batch_size": 2, "learning_rate": 0.1}
    victim = Victim(network(nn.Dropout(0.5)), image_shape=SHAPE, **options)
    images, labels = torch.rand(1, 4, *SHAPE), torch.tensor([[0, 1, 2, 3]])
    drawn = draw(victim.draws, 8, [0], seed=0)[0]
    shared = victim.share(images, labels)
    model = network(nn.Identity())
    model.load_state_dict(victim.state)
    start = [weight.detach().clone() for weight in model.parameters()]
    for step in range(4):
        mask = as_buffers(victim.draws, drawn[2 * step : 2 * step + 2])["2.drawn"]
        masked = nn.Sequential(*model[:2], Masked(nn.Dropout, mask, 0.5), *model[3:])  # type: ignore[index]
        first = 2 * step % 4
        found = gradients(masked, images[0, first : first + 2], labels[0, first : first + 2])
        with torch.no_grad():
            for weight, gradient in zip(masked.parameters(), found, strict=True):
                weight -= 0.1 * gradient
    for name, before, after in zip(shared.gradients, start, model.parameters(), strict=True):
        torch.testing.assert_close(shared.gradients[name][0], (before - after) / 0.4, rtol=1e-3, atol=1e-5)


def test_in_evaluation_mode_nothing_is_drawn() -> None:
    for model in (network(nn.Dropout(0.5)).eval(), network(nn.Dropout(0.0)), PRECODE(network()).eval()):
        assert Victim(model, image_shape=SHAPE).draws == {}


def test_the_users_model_stays_as_it_was() -> None:
    model = network(nn.Dropout(0.5))
    Victim(model, image_shape=SHAPE).share(torch.rand(1, 1, *SHAPE), torch.tensor([[1]]))
    assert "forward" not in vars(model[2])  # type: ignore[index]
    assert not [*model.buffers()]


def test_penalty_of_the_bottleneck_is_the_divergence() -> None:
    torch.manual_seed(0)
    model = PRECODE(network(), size=4, weight=0.1)
    victim = Victim(model, image_shape=SHAPE)
    images, labels = torch.rand(1, 1, *SHAPE), torch.tensor([[2]])
    shared = victim.share(images, labels)
    (noise,) = as_buffers(victim.draws, draw(victim.draws, 1, [0], seed=0)[0]).values()
    bottleneck = next(module for module in model.modules() if isinstance(module, VariationalBottleneck))
    features = model.network[:-1](images[0])  # type: ignore[index]
    mean, log_variance = bottleneck.encoder(features).chunk(2, dim=1)
    normal = torch.distributions.Normal
    posterior = normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, normal(torch.zeros(4), torch.ones(4))).sum()
    linear = model.network[-1][-1]  # type: ignore[index]
    logits = linear(bottleneck.decoder(mean + posterior.stddev * noise))
    loss = F.cross_entropy(logits, labels[0]) + 0.1 * divergence
    expected = torch.autograd.grad(loss, [*model.parameters()])
    for found, wanted in zip(shared.gradients.values(), expected, strict=True):
        torch.testing.assert_close(found[0], wanted)
    assert bottleneck.penalties is None


def test_precode_is_drawn_anew_with_its_network() -> None:
    victim = Victim(PRECODE(LeNet(image_size=12), size=8), image_shape=(1, 12, 12))
    first, second = ({name: state[place] for name, state in victim.fresh_states([0, 1]).items()} for place in (0, 1))
    encoder = "network.classifier.0.encoder.weight"
    bound = victim.state[encoder].shape[1] ** -0.5
    assert float(first[encoder].abs().max()) <= bound < 0.4 < float(first["network.features.0.weight"].abs().max())
    assert not torch.equal(first[encoder], second[encoder])


@pytest.mark.parametrize("where", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_attacks_search_for_the_mask(kit: Any, where: int) -> None:
    clients: dict[str, Any] = {"victims": 2, "model": lenet(where), "weights": "own"}
    found = kit.fit(IDLGAttack(max_evaluations=250, restarts=0), kit.victims(**clients))
    assert all(score.success for score in found.scores.values())
    with pytest.warns(
        UserWarning, match=r"draws random numbers in \['features\.\d'\], and this attack uses it in evaluation"
    ):
        naive = kit.fit(IDLGAttack(max_evaluations=100, restarts=0, adaptive=False), kit.victims(**clients))
    assert not any(score.success for score in naive.scores.values())


@pytest.mark.slow
def test_second_order_finds_noise_and_images(kit: Any) -> None:
    model = PRECODE(LeNet(image_size=12), size=4)
    clients: dict[str, Any] = {"victims": 2, "model": model, "weights": "own", "reveal_labels": True}
    found = kit.fit(GaussNewtonAttack(restarts=0), kit.victims(**clients))
    assert all(score.success for score in found.scores.values())


def test_results_do_not_depend_on_the_lanes(kit: Any) -> None:
    def attacked(lanes: int) -> GradientInversion:
        victims = kit.victims(victims=3, model=lenet(), weights="own", lanes=lanes)
        found: GradientInversion = kit.fit(IDLGAttack(max_evaluations=10, restarts=0), victims)
        return found

    together, apart = kit.by_id(attacked(3)), kit.by_id(attacked(1))
    torch.testing.assert_close(together.images, apart.images, rtol=1e-2, atol=1e-2)


def test_masks_begin_near_their_probability() -> None:
    victim = Victim(network(nn.Dropout(0.2)), image_shape=SHAPE, num_images=2)
    dummy = Drawn(victim.draws)
    shape = dummy.shape(victim.protocol)
    assert shape == (2, 96)
    torch.testing.assert_close(dummy.write(torch.zeros(shape), {}), torch.full(shape, 0.8))
    assert Drawn({}).shape(victim.protocol) is None


def test_a_mask_of_ones_is_no_dropout() -> None:
    """But for the factor by which the others grow."""
    torch.manual_seed(0)
    victim = Victim(network(nn.Dropout(0.5)), image_shape=SHAPE)
    images, targets = torch.rand(1, *SHAPE), torch.eye(5)[:1]
    plain = victim.evaluate(victim.state, images, targets)[0]
    half = victim.evaluate(victim.state, images, targets, secrets=Secrets(drawn=torch.full((1, 96), 0.5)))[0]
    for name, tensor in plain.items():
        torch.testing.assert_close(half[name], tensor)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(48, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.dropout(self.dropout(images.flatten(1))))
        return logits


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"to be called once in a pass, but got \['dropout'\]"):
        Victim(Twice(), image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"dropout with p below 1, but got '2' with p=1"):
        Victim(network(nn.Dropout(1.0)), image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"draw random numbers for DPSGD, but got \['2'\]"):
        Victim(network(nn.Dropout(0.5)), image_shape=SHAPE, defenses=[DPSGD(1.0, norm=1.0)])
    with pytest.raises(ValueError, match="with a linear layer, but got Conv2d without one"):
        PRECODE(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="`size`"):
        PRECODE(network(), size=0)
    with pytest.raises(ValueError, match="`weight`"):
        PRECODE(network(), weight=-1.0)
    with pytest.raises(ValueError, match=r"\['2'\], which draw random numbers that only the client knows"):
        find_links(Victim(network(nn.Dropout(0.5)), image_shape=SHAPE), [nn.Sigmoid], lambda link: None)
