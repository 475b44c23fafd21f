"""Clients that keep their learning rate to themselves: every attack searches for it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from leakage import LeNet, Protocol, SharedGradient, Victim
from leakage.attacks import (
    DLGAttack,
    GaussNewtonAttack,
    GradientInversion,
    IDLGAttack,
    InvertingGradientsAttack,
    RGAPAttack,
)
from leakage.callbacks import VictimTable
from leakage.datamodules import SharedGradients
from leakage.dummies import LearningRate
from leakage.inversion.evaluator import Evaluator
from leakage.inversion.reconstruction import Reconstruction
from leakage.objectives import CosineDistance, LengthDistance, RowCosineDistance, SquaredDistance, TotalVariation

RATE = 0.1
CLIENTS: dict[str, Any] = {"local_steps": 2, "learning_rate": RATE, "reveal_learning_rate": False}

# Each with the most that the found rate is off, relative to the true one, and a PSNR that images surely have.
ATTACKS: dict[str, tuple[Callable[[], GradientInversion], float, float]] = {
    "idlg": (lambda: IDLGAttack(max_evaluations=200, restarts=0), 1e-3, 50.0),
    "dlg": (lambda: DLGAttack(max_evaluations=300, restarts=0), 1e-2, 50.0),
    "inverting_gradients": (lambda: InvertingGradientsAttack(steps=100, total_variation=1e-3), 1e-2, 22.0),
    "gauss_newton": (lambda: GaussNewtonAttack(restarts=0, solver="cholesky"), 1e-5, 80.0),
}


def found_rate(attack: GradientInversion) -> Tensor:
    rate = attack.finished.learning_rate
    assert rate is not None
    return rate


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_finds_rate_and_images(kit: Any, name: str) -> None:
    """Nearly as good images as those of the attack that is told the rate."""
    make, error, psnr = ATTACKS[name]
    searched = kit.fit(make(), kit.victims(victims=2, **CLIENTS))
    told = kit.fit(make(), kit.victims(victims=2, local_steps=2, learning_rate=RATE))
    assert told.finished.learning_rate is None
    assert (found_rate(searched) / RATE - 1).abs().max() < error
    for victim, score in searched.scores.items():
        assert score.label_accuracy == 1
        assert score.psnr > min(psnr, told.scores[victim].psnr - 1)
    assert min(score.psnr for score in told.scores.values()) > psnr


def test_an_attack_that_does_nothing_does_not_find_the_rate(kit: Any) -> None:
    attack = kit.fit(IDLGAttack(max_evaluations=1, restarts=0), kit.victims(victims=4, **CLIENTS))
    assert (found_rate(attack) / RATE - 1).abs().max() > 0.1


@pytest.mark.parametrize("rate", [1e-6, 10.0])
def test_rates_of_any_size(kit: Any, rate: float) -> None:
    attack = kit.fit(IDLGAttack(max_evaluations=200), kit.victims(victims=1, **CLIENTS | {"learning_rate": rate}))
    assert (found_rate(attack) / rate - 1).abs().max() < 1e-3
    kit.assert_successful(attack, 1)


@pytest.mark.parametrize("make", [IDLGAttack, GaussNewtonAttack])
def test_of_one_step_it_is_a_factor(kit: Any, make: Callable[[], GradientInversion]) -> None:
    attack = kit.fit(make(), kit.victims(victims=2, learning_rate=RATE, reveal_learning_rate=False))
    assert (found_rate(attack) / RATE - 1).abs().max() < 1e-4
    kit.assert_successful(attack, 2)


def test_restarts_begin_at_other_rates_and_the_best_is_kept(kit: Any) -> None:
    few, more = (
        kit.fit(
            IDLGAttack(max_evaluations=15, restarts=restarts, restart_above=1e-12), kit.victims(victims=4, **CLIENTS)
        )
        for restarts in (0, 2)
    )
    one, best = kit.by_id(few), kit.by_id(more)
    kept = one.loss == best.loss
    assert torch.equal(one.learning_rate[kept], best.learning_rate[kept])
    assert bool((best.loss[~kept] < one.loss[~kept]).all())
    starts = LearningRate().starts(torch.ones(3, 1), torch.tensor([0, 1, 2]))
    assert starts[0] == 0
    assert starts[1] == starts[2] != 0


def test_all_that_the_attack_is_given_is_what_was_shared(kit: Any, tmp_path: Path) -> None:
    """The same bits without the clients: what they shared holds neither rate nor order."""
    options = CLIENTS | {"images": 2, "local_batch_size": 1, "shuffle": True, "reveal_labels": True, "weights": "own"}
    victims = kit.victims(victims=3, lanes=3, **options)
    victims.setup("fit")
    shared = victims.share(range(3))
    shared.save(tmp_path / "client.safetensors")
    protocol = SharedGradient.load(tmp_path / "client.safetensors").protocol
    assert protocol == shared.protocol
    assert (protocol.learning_rate, protocol.shuffle) == ("unknown", True)

    direct = kit.fit(IDLGAttack(max_evaluations=15, restarts=1), victims)
    alone = SharedGradients(shared, LeNet(1, 12), lanes=3)
    kit.assert_same(direct, kit.fit(IDLGAttack(max_evaluations=15, restarts=1), alone))
    assert vars(direct.victim).keys() == vars(victims.victim).keys()
    assert RATE not in [value for value in vars(direct.victim).values() if isinstance(value, float)]
    with pytest.raises(ValueError, match=r"Expected a victim with a known learning rate to share, .*'unknown'"):
        direct.victim.share(torch.rand(1, 2, 1, 12, 12), torch.tensor([[3, 8]]))


@pytest.mark.parametrize("shuffle", [False, True])
def test_resumes_bit_for_bit(kit: Any, tmp_path: Path, shuffle: bool) -> None:
    options: dict[str, Any] = {"victims": 3, "lanes": 2, **CLIENTS}
    if shuffle:
        options |= {"images": 2, "local_batch_size": 1, "shuffle": True, "reveal_labels": True}

    def attack() -> IDLGAttack:
        return IDLGAttack(max_evaluations=8, restarts=1)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole = kit.fit(attack(), kit.victims(**options), enable_checkpointing=True, callbacks=[saving])
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    for path in (paths[1], paths[-1]):  # before and after a restart
        kit.assert_same(whole, kit.fit(attack(), kit.victims(**options), ckpt_path=str(path)))


def test_it_is_told_with_the_reconstruction(kit: Any, tmp_path: Path) -> None:
    attack = IDLGAttack(max_evaluations=5, restarts=0)
    kit.fit(attack, kit.victims(victims=2, **CLIENTS), callbacks=[VictimTable(tmp_path)])
    (path,) = tmp_path.glob("reconstructions/*.safetensors")
    loaded = Reconstruction.load(path)
    assert torch.equal(loaded.learning_rate, found_rate(attack))
    lines = [line.split(",") for line in (tmp_path / "victims.csv").read_text(encoding="utf-8").splitlines()]
    assert lines[0][-1] == "learning_rate"
    assert [float(line[-1]) for line in lines[1:]] == pytest.approx(found_rate(attack).tolist())


def test_a_client_that_does_not_move(kit: Any) -> None:
    """Beside others: no rate can be told, and nothing is searched for."""
    victims = kit.victims(victims=2, weights="own", **CLIENTS)
    victims.setup("fit")
    shared = victims.share(range(2))
    for gradient in shared.gradients.values():
        gradient[1] = 0
    attack = kit.fit(
        IDLGAttack(max_evaluations=100, restarts=0), SharedGradients(shared, victims.victim.without_secrets())
    )
    found = kit.by_id(attack)
    assert found.status.tolist()[1] == 5
    assert abs(found.learning_rate[0] / RATE - 1) < 1e-2
    assert bool(torch.isfinite(found.learning_rate).all())


# Pieces.


def test_lengths_are_compared_where_no_distance_does() -> None:
    told, untold = (
        Victim(LeNet(1, 12), image_shape=(1, 12, 12), local_steps=2, learning_rate=0.1, reveal_learning_rate=reveal)
        for reveal in (True, False)
    )
    attack = IDLGAttack()

    def terms(victim: Victim, objective: Any) -> list[tuple[float, str]]:
        evaluator = Evaluator(victim, objective, attack.images, attack.labels)
        return [(weight, type(term).__name__) for weight, term in evaluator.terms.values()]

    angle = CosineDistance() + 1e-2 * TotalVariation()
    assert terms(told, angle) == [(1.0, "CosineDistance"), (1e-2, "TotalVariation")]
    assert terms(untold, angle) == [*terms(told, angle), (0.1, "LengthDistance")]
    assert terms(untold, RowCosineDistance())[1:] == [(0.1, "LengthDistance")]
    assert terms(untold, SquaredDistance()) == [(1.0, "SquaredDistance")]
    assert terms(untold, CosineDistance() + SquaredDistance())[2:] == []


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15])
def test_length_distance(size: float) -> None:
    distance, wanted = LengthDistance(), {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    scaled = {name: (size * tensor).requires_grad_() for name, tensor in wanted.items()}
    value = distance(scaled, wanted)
    torch.testing.assert_close(value, torch.tensor(size).double().log().square().float())
    value.backward()
    for name, tensor in scaled.items():
        # d (ln r)^2 / dx = 2 ln r x / |x|^2
        expected = 2 * torch.tensor(size).log() * (wanted[name] / 25) / size
        torch.testing.assert_close(tensor.grad, expected)
    zero = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in wanted.items()}
    assert torch.isfinite(distance(zero, wanted))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01}, {"images": 4, "local_batch_size": 2}])
def test_the_update_is_that_of_torchs_sgd(kit: Any, options: dict[str, Any]) -> None:
    victims = kit.victims(victims=1, **CLIENTS | {"local_steps": 4}, **options)
    victims.setup("fit")
    shared = victims.share([0])
    batch = next(iter(victims.val_dataloader()))
    model = LeNet(1, 12)
    model.load_state_dict({name: tensor[0] for name, tensor in shared.state.items()})
    decay = {name: options.get(name, 0.0) for name in ("momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, **decay)
    size = options.get("local_batch_size", 1)
    for step in range(4):
        places = torch.arange(step * size, (step + 1) * size) % options.get("images", 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.images[0, places]), batch.labels[0, places]).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(shared.gradients[name][0], shared.state[name][0] - parameter, rtol=1e-3, atol=1e-6)


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": None}, "`learning_rate` to be positive and finite, but got None"),
        ({"learning_rate": -1.0}, "`learning_rate` to be positive and finite, but got -1.0"),
        ({"reveal_learning_rate": "no"}, "`reveal_learning_rate` to be True or False, but got 'no'"),
        (
            {"learning_rate": "unknown"},
            "`learning_rate` as the number that the clients use, but got 'unknown'. To hide it",
        ),
    ],
)
def test_wrong_options(kit: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        kit.victims(victims=1, **CLIENTS | changes)


def test_a_client_that_was_only_told_of_cannot_share() -> None:
    protocol = Protocol((1, 12, 12), 10, local_steps=2, learning_rate="unknown")
    for victim in (
        Victim.of(LeNet(1, 12), protocol),
        Victim(LeNet(1, 12), image_shape=(1, 12, 12), local_steps=2, learning_rate="unknown"),
    ):
        assert victim.protocol == protocol
        with pytest.raises(ValueError, match=r"Expected a victim with a known learning rate to share, but got"):
            victim.share(torch.rand(1, 1, 1, 12, 12), torch.tensor([[3]]))


def test_closed_forms_need_the_rate(kit: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected victims of one local step, .* 1 and `learning_rate` 'unknown'"):
        kit.fit(RGAPAttack(), kit.victims(victims=1, learning_rate=0.1, reveal_learning_rate=False))
