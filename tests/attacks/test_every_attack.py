"""The same tests for every attack of the table."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from lightning import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from leakage.attacks import GaussNewtonAttack, IDLGAttack
from leakage.clients.shared_gradient import SharedGradient
from leakage.datamodules import GroundTruth, SharedGradients
from leakage.models import LeNet
from leakage.seeds import derive_seed
from leakage.solvers import STATUS
from tests.kit import ATTACKS, IN_PAIRS


def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 64), nn.Tanh(), nn.Linear(64, 10))


class Watch(Callback):
    """What the lanes held: the starts of the victims, the most lanes, and who was admitted when."""

    def __init__(self) -> None:
        self.starts: dict[int, Tensor] = {}
        self.lanes: list[int] = []
        self.admitted: list[tuple[int, list[int], int]] = []
        self.labels: Tensor | None = None
        self.losses: list[Tensor] = []  # of the first evaluation

    def on_train_batch_start(self, trainer: Any, attack: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, SharedGradient):
            self.admitted.append((attack.iteration, batch.ids.tolist(), attack.num_running))
            self.labels = batch.labels

    def on_train_batch_end(self, trainer: Any, attack: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.lanes.append(attack.num_running)
        if isinstance(batch, SharedGradient):  # the first evaluation is the best so far
            running = attack.current()
            self.losses.append(running.loss)
            for victim, image, evaluations in zip(
                running.ids.tolist(), running.images, running.evaluations.tolist(), strict=True
            ):
                if evaluations == 1:
                    self.starts[victim] = image


def test_finds_images_and_labels(case: Any, kit: Any) -> None:
    attack = kit.fit(case.attack(), kit.victims(victims=5))
    kit.assert_successful(attack, 5)
    found = kit.by_id(attack)
    assert {STATUS[status] for status in found.status.tolist()} <= {"converged", "stalled"}
    assert bool((found.loss < 1e-6).all())
    assert bool((found.iterations <= found.evaluations).all())
    # Victims are as different as their images.
    assert bool((found.images[0] - found.images[1]).abs().max() > 0.1)
    # Victims that are done are not scored again.
    scored = dict(attack.scores)
    attack.score_finished()
    assert all(attack.scores[victim] is score for victim, score in scored.items())


def test_an_attack_that_does_nothing_is_not_successful(case: Any, kit: Any) -> None:
    attack = kit.fit(case.attack(max_evaluations=1, restarts=0), kit.victims(victims=8))
    found = kit.by_id(attack)
    assert found.evaluations.tolist() == [1] * 8
    assert {STATUS[status] for status in found.status.tolist()} <= {"exhausted", "running"}
    assert all(score.mse > 1e-2 and score.success == 0 for score in attack.scores.values())
    with pytest.raises(AssertionError):
        kit.assert_successful(attack, 8)


@pytest.mark.parametrize(("model", "weights"), [(LeNet(1, 12), "shared"), (mlp(), "own")], ids=["LeNet", "Sequential"])
def test_finds_images_of_other_networks(case: Any, kit: Any, model: nn.Module, weights: str) -> None:
    attack = kit.fit(case.attack(), kit.victims(victims=4, model=model, weights=weights))
    assert sum(score.success for score in attack.scores.values()) >= 3
    assert all(score.label_accuracy == 1 for score in attack.scores.values() if score.success)


def test_two_images_per_victim(case: Any, kit: Any) -> None:
    options: dict[str, Any] = {"victims": 3, "images": 2, "reveal_labels": case.infers_labels}
    start = kit.fit(case.attack(max_evaluations=1, restarts=0), kit.victims(**options))
    most = 40 if case.kind is GaussNewtonAttack else 200
    attack = kit.fit(case.attack(max_evaluations=most, restarts=0), kit.victims(**options))
    before, after = kit.by_id(start), kit.by_id(attack)
    assert after.images.shape == (3, 2, 1, 12, 12)
    assert after.labels.shape == (3, 2)
    assert bool((after.loss < 1e-4 * before.loss).all())
    # The images of a victim have no order: at least two victims are found, in whichever order.
    assert sum(score.success == 1 for score in attack.scores.values()) >= 2
    assert sum(score.label_accuracy == 1 for score in attack.scores.values()) >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Jacobian and normal equations")
@pytest.mark.parametrize("case", ATTACKS[1:], ids=str)
def test_a_large_network_of_torchvision_runs(case: Any, kit: Any) -> None:
    model = torchvision.models.resnet18(num_classes=10).eval()
    model.conv1 = nn.Conv2d(1, 64, 3, stride=2, bias=False)
    before = copy.deepcopy(model.state_dict())
    victims = kit.victims(victims=1, model=model)
    few = {"solver": "cg", "max_products": 2} if case.kind is GaussNewtonAttack else {}
    watch = Watch()
    attack = kit.fit(case.attack(max_evaluations=2, restarts=0, **few), victims, callbacks=[watch])
    found = kit.by_id(attack)
    assert found.evaluations.tolist() == [2]
    assert bool(torch.isfinite(found.images).all())
    assert bool((found.loss < watch.losses[0]).all())
    assert not case.infers_labels or attack.scores[0].label_accuracy == 1
    # The user's network is as it was.
    assert not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@IN_PAIRS
def test_double_precision(lbfgs_case: Any, kit: Any, protocol: str) -> None:
    attack = kit.fit(
        lbfgs_case.attack(protocol=protocol, max_evaluations=60), kit.victims(victims=2), precision="64-true"
    )
    single = kit.fit(lbfgs_case.attack(protocol=protocol, max_evaluations=60), kit.victims(victims=2))
    found, rough = kit.by_id(attack), kit.by_id(single)
    assert found.images.dtype == found.loss.dtype == torch.float64
    assert rough.images.dtype == torch.float32
    assert torch.equal(found.labels, rough.labels)
    # The starts are the same in both precisions.
    starts = [
        kit.by_id(
            kit.fit(lbfgs_case.attack(max_evaluations=1, restarts=0), kit.victims(victims=2), precision=precision)
        ).images.double()
        for precision in ("64-true", "32-true")
    ]
    torch.testing.assert_close(starts[0], starts[1], rtol=1e-6, atol=1e-7)


@IN_PAIRS
def test_the_same_seed_gives_the_same_bits(lbfgs_case: Any, kit: Any, protocol: str) -> None:
    one, two, other = (
        kit.fit(
            lbfgs_case.attack(protocol=protocol, seed=seed, max_evaluations=20, restarts=1),
            kit.victims(victims=2),
        )
        for seed in (5, 5, 6)
    )
    kit.assert_same(one, two)
    assert one.scores == two.scores
    assert not torch.equal(kit.by_id(one).images, kit.by_id(other).images)


@pytest.mark.parametrize("case", ATTACKS[1:], ids=str)
def test_lanes_change_neither_starts_nor_success(case: Any, kit: Any) -> None:
    watches = [Watch(), Watch()]
    few, many = (
        kit.fit(case.attack(), kit.victims(victims=5, lanes=number), callbacks=[watch])
        for number, watch in zip((2, "auto"), watches, strict=True)
    )
    for attack in (few, many):
        kit.assert_successful(attack, 5)  # each victim exactly once
    assert torch.equal(kit.by_id(few).labels, kit.by_id(many).labels)
    assert few.finished.ids.tolist() == list(range(5))
    assert [victim for _, ids, _ in watches[0].admitted for victim in ids] == list(range(5))
    assert watches[1].admitted == [(0, list(range(5)), 0)]
    for victim in range(5):
        assert torch.equal(watches[0].starts[victim], watches[1].starts[victim])
    generator = torch.Generator().manual_seed(derive_seed(0, 3, "start/images/0"))
    expected = 0.01 * torch.randn(1, 1, 12, 12, generator=generator)
    assert torch.equal(watches[0].starts[3], expected)


def test_a_victim_enters_when_another_leaves(kit: Any) -> None:
    watch = Watch()
    attack = kit.fit(IDLGAttack(), kit.victims(victims=8, lanes=3), callbacks=[watch])
    kit.assert_successful(attack, 8)
    first, *later = watch.admitted
    assert first == (0, [0, 1, 2], 0)
    assert [victim for _, ids, _ in later for victim in ids] == [3, 4, 5, 6, 7]
    # Never more than there are lanes, and no lane waits for the slowest.
    assert max(watch.lanes) == 3
    assert all(len(ids) + running <= 3 for _, ids, running in watch.admitted)
    assert any(running > 0 for _, _, running in later)
    assert attack.iteration < attack.finished.evaluations.sum() / 1.5


def test_restarts_stay_within_their_budget_and_the_best_start_is_kept(case: Any, kit: Any) -> None:
    # So few evaluations that all start again as often as they may.
    attacks = [
        kit.fit(
            case.attack(max_evaluations=case.few, restarts=restarts, tolerance=1e-12, restart_above=1e-12),
            kit.victims(victims=8),
        )
        for restarts in (0, 2)
    ]
    found = [kit.by_id(attack) for attack in attacks]
    for restarts, one in zip((0, 2), found, strict=True):
        assert one.restarts.tolist() == [restarts] * 8
        assert one.evaluations.tolist() == [case.few * (restarts + 1)] * 8
    for fewer, more in itertools.pairwise(found):
        assert bool((more.loss <= fewer.loss).all())
        # Where a further start was no better, the earlier result is still there.
        kept = more.loss == fewer.loss
        assert torch.equal(more.images[kept], fewer.images[kept])
        assert torch.equal(more.labels[kept], fewer.labels[kept])
        assert not torch.equal(more.images[~kept], fewer.images[~kept]) or bool(kept.all())
    assert bool((found[1].loss < found[0].loss).any())


def test_only_victims_that_ended_above_the_threshold_start_again(kit: Any) -> None:
    first = kit.by_id(kit.fit(IDLGAttack(max_evaluations=45, restarts=0), kit.victims(victims=6)))
    middle = float(first.loss.sort().values[2:4].mean())
    attack = IDLGAttack(max_evaluations=45, restarts=1, restart_above=middle)
    second = kit.by_id(kit.fit(attack, kit.victims(victims=6)))
    assert second.restarts.tolist() == (first.loss > middle).long().tolist()


def test_leaves_the_global_random_states_alone(case: Any, kit: Any) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    kit.fit(
        case.attack(max_evaluations=20, restarts=2),
        kit.victims(victims=3, lanes=2),
        limit_val_batches=1.0,
        val_check_interval=10,
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002


def test_never_sees_the_truth(case: Any, kit: Any) -> None:
    class Lies(kit.victims):  # type: ignore[misc, name-defined]
        """Tells everyone but the clients wrong images and labels."""

        sharing = False

        def share(self, victims: Sequence[int]) -> SharedGradient:
            self.sharing = True
            shared = super().share(victims)
            self.sharing = False
            return shared

        def _load(self, victims: Sequence[int], batch_size: int) -> DataLoader[GroundTruth]:
            loader = super()._load(victims, batch_size)
            if self.sharing:
                return loader
            honest = GroundTruth.cat(list(loader))
            wrong = GroundTruth(honest.ids, 1 - honest.images.roll(1, 0), (honest.labels + 1) % 10)
            return DataLoader([wrong], batch_size=None)  # type: ignore[arg-type]

    options: dict[str, Any] = {"victims": 3, "lanes": 2}
    attacks = [
        kit.fit(case.attack(max_evaluations=5 * case.few, restarts=1), victims(**options), val_check_interval=7)
        for victims in (kit.victims, Lies)
    ]
    kit.assert_same(*attacks)
    honest, lied = ([attack.scores[victim] for victim in range(3)] for attack in attacks)
    assert all(score.success == 0 and score.label_accuracy == 0 for score in lied)
    assert all(score.mse < 0.5 * other.mse for score, other in zip(honest, lied, strict=True))


@pytest.mark.parametrize("case", ATTACKS[1:], ids=str)
def test_validation_scores_on_the_way_and_changes_nothing(case: Any, kit: Any) -> None:
    class Scores(Callback):
        """The scores after each validation."""

        def __init__(self) -> None:
            self.seen: list[dict[int, Any]] = []
            self.logged: list[dict[str, float]] = []

        def on_validation_end(self, trainer: Any, attack: Any) -> None:
            self.seen.append(copy.deepcopy(attack.scores))
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    scores = Scores()
    plain = kit.fit(case.attack(), kit.victims(victims=4, lanes=3))
    often = kit.fit(case.attack(), kit.victims(victims=4, lanes=3), val_check_interval=case.few, callbacks=[scores])
    kit.assert_same(plain, often)
    assert plain.scores == often.scores
    assert len(scores.seen) >= often.iteration // case.few
    first, last = scores.seen[0], scores.seen[-1]
    assert sorted(first) == [0, 1, 2]
    assert not any(score.final for score in first.values())
    assert all(score.final for score in last.values())
    assert sum(score.mse for score in last.values()) < 1e-2 * sum(score.mse for score in first.values())
    assert scores.logged[-1]["val/victims"] == 4
    assert scores.logged[-1]["val/success_rate"] == 1
    low, value, high = (scores.logged[-1][f"val/mse{end}"] for end in ("_low", "", "_high"))
    assert low <= value <= high < 1e-3


def test_own_gradients_in_files_without_a_truth(case: Any, kit: Any, tmp_path: Path) -> None:
    victims = kit.victims(victims=4, weights="own")
    victims.setup("fit")
    victims.share(range(3)).save(tmp_path / "first.safetensors")
    victims.share(range(3, 4)).save(tmp_path / "second.safetensors")
    files = SharedGradients(str(tmp_path / "*.safetensors"), LeNet(1, 12), lanes=2)
    attack = kit.fit(case.attack(), files)
    found = kit.by_id(attack)
    assert attack.scores == {}
    truth = GroundTruth.cat(list(victims.val_dataloader()))
    assert torch.equal(found.labels, truth.labels)
    assert float((found.images - truth.images).square().flatten(1).mean(1).max()) < 1e-3


def test_a_gradient_of_zero_is_no_trouble_for_the_other_victims(case: Any, kit: Any, tmp_path: Path) -> None:
    victims = kit.victims(victims=3, weights="own")
    victims.setup("fit")
    shared = victims.share(range(3))
    for gradient in shared.gradients.values():
        gradient[1] = 0
    shared.save(tmp_path / "client.safetensors")
    files = SharedGradients(tmp_path / "client.safetensors", LeNet(1, 12))
    found = kit.by_id(kit.fit(case.attack(max_evaluations=200, restarts=0), files))
    truth = GroundTruth.cat(list(victims.val_dataloader()))
    errors = (found.images - truth.images).square().flatten(1).mean(1)
    assert errors[0] < 1e-3
    assert errors[2] < 1e-3
    assert bool(torch.isfinite(found.images).all())


def test_can_be_fitted_again(case: Any, kit: Any) -> None:
    attack = kit.fit(case.attack(max_evaluations=25, restarts=1), kit.victims(victims=3))
    kit.fit(attack, kit.victims(victims=2, seed=1))
    assert sorted(attack.scores) == [0, 1]
    fresh = case.attack(max_evaluations=25, restarts=1)
    kit.assert_same(attack, kit.fit(fresh, kit.victims(victims=2, seed=1)))


def test_progress_is_told_while_it_runs(case: Any, kit: Any) -> None:
    class Progress(Callback):
        """Victims done and the loss, step by step."""

        def __init__(self) -> None:
            self.done: list[int] = []
            self.loss: list[float] = []

        def on_train_batch_end(self, trainer: Any, attack: Any, *args: Any) -> None:
            metrics = trainer.callback_metrics
            self.done.append(attack.num_done)
            self.loss.append(float(metrics["train/loss"]))
            assert attack.num_done == len(attack.finished)
            assert attack.num_running == len(attack.current())
            # Logged every tenth time, and at the end.
            if attack.iteration % 10 == 1 or trainer.should_stop:
                assert int(metrics["train/done"]) == attack.num_done
                assert int(metrics["train/running"]) == attack.num_running

    progress = Progress()
    attack = kit.fit(case.attack(), kit.victims(victims=3), callbacks=[progress])
    assert attack.num_done == progress.done[-1] == 3
    assert progress.done == sorted(progress.done)
    assert progress.loss[0] > 100 * progress.loss[-1]
    assert len(progress.done) == attack.iteration
