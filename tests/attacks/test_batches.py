"""Several images behind each gradient, with labels that are told, inferred or searched for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Subset

from leakage.attacks import IDLGAttack
from leakage.datamodules import GroundTruth, Victims
from leakage.labels import Auxiliary, infer_labels
from leakage.models import LeNet


def truth_of(victims: Any) -> GroundTruth:
    return GroundTruth.cat(list(victims.val_dataloader()))


def auxiliary_images(kit: Any, count: int = 60) -> Auxiliary:
    """Images that no victim of the tests holds: those of victims with far higher numbers."""
    data = kit.victims(victims=200 + count)
    data.setup("fit")
    truth = truth_of(data)
    return Auxiliary(truth.images[200:, 0], truth.labels[200:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [2, 4])
def test_finds_the_images_of_a_batch(case: Any, kit: Any, num_images: int) -> None:
    victims = kit.victims(victims=4, images=num_images)
    attack = kit.fit(case.attack(max_evaluations=100 * num_images, restarts=0), victims)
    start = kit.fit(case.attack(max_evaluations=1, restarts=0), kit.victims(victims=4, images=num_images))
    found, scores = kit.by_id(attack), [attack.scores[victim] for victim in range(4)]
    # In whatever order: the truth's own is not the reconstructions'. One network may leave nothing to find.
    assert sum(score.success == 1 for score in scores) >= 3
    # The label of each image, not only the same labels somehow.
    assert [score.label_accuracy for score in scores] == [1.0] * 4
    assert torch.equal(found.labels.sort(1).values, truth_of(victims).labels.sort(1).values)
    assert all(score.mse > 1e-2 and score.success == 0 for score in start.scores.values())


@pytest.mark.slow
def test_finds_images_of_the_same_class(case: Any, kit: Any) -> None:
    images = kit.images()
    trousers = (images.tensors[1] == 1).nonzero().flatten().tolist()
    victims = Victims(Subset(images, trousers), num_classes=10, victims=3, images=2)
    attack = kit.fit(case.attack(max_evaluations=250, restarts=0), victims)
    found = kit.by_id(attack)
    assert found.labels.tolist() == [[1, 1]] * 3
    solved = [victim for victim, score in attack.scores.items() if score.success == 1]
    assert len(solved) >= 2
    # Two images, and not the same one twice: each is far nearer to its own than they are to one another.
    apart = (found.images[:, 0] - found.images[:, 1]).square().flatten(1).mean(1)
    assert all(float(apart[victim]) > 10 * attack.scores[victim].mse for victim in solved)


def test_images_of_a_victim_start_apart(case: Any, kit: Any) -> None:
    """Else the gradients of two images with the same label are the same for ever."""
    found = kit.fit(case.attack(max_evaluations=1, restarts=0), kit.victims(victims=4, images=3)).finished
    assert len(found.images.flatten(0, 1).flatten(1).unique(dim=0)) == 4 * 3


@pytest.mark.parametrize("weights", ["own", "shared"])
@pytest.mark.parametrize("rule", ["row_minimum", "llg_star", "geng", "rlu", "auto"])
def test_labels_are_those_of_the_rule_whatever_the_cohorts(kit: Any, rule: str, weights: str) -> None:
    if rule == "rlu" and weights == "own":
        pytest.skip("learns about one network")
    auxiliary = auxiliary_images(kit) if rule == "rlu" else None
    options: dict[str, Any] = {"victims": 4, "images": 3, "weights": weights, "model": LeNet(1, 12), "seed": 2}
    victims = kit.victims(**options)
    victims.setup("fit")
    expected = infer_labels(victims.share(range(4)), victims.victim, rule=rule, auxiliary=auxiliary, seed=7).labels
    attack = IDLGAttack(rule=rule, auxiliary=auxiliary, seed=7, max_evaluations=1, restarts=0)
    found = kit.by_id(kit.fit(attack, kit.victims(**options, lanes=3)))
    assert torch.equal(found.labels, expected)
    assert torch.equal(found.labels, found.labels.sort(1).values)


def test_the_rule_decides(kit: Any) -> None:
    victims = kit.victims(victims=40, images=4)
    labels = [
        kit.by_id(kit.fit(IDLGAttack(rule=rule, max_evaluations=1, restarts=0), victims)).labels
        for rule in ("row_minimum", "mean_feature")
    ]
    assert torch.equal(labels[1], truth_of(victims).labels.sort(1).values)
    assert not torch.equal(labels[0], labels[1])  # the first takes labels for distinct


def test_labels_that_are_told_keep_their_order(kit: Any) -> None:
    victims = kit.victims(victims=8, images=3, reveal_labels=True)
    # No rule is asked, so none is refused.
    found = kit.by_id(kit.fit(IDLGAttack(rule="idlg", max_evaluations=1, restarts=0), victims))
    assert torch.equal(found.labels, truth_of(victims).labels)
    assert not torch.equal(found.labels, found.labels.sort(1).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "ildg"}, r"Expected `rule` to be one of \['auto', 'geng', 'idlg', .*but got 'ildg'"),
        ({"auxiliary": torch.zeros(3)}, r"Expected `auxiliary` to be a leakage\.labels\.Auxiliary .*but got Tensor"),
        ({"auxiliary": "5624962e6c04a698"}, r"checkpoints do not hold it, so pass it again.*but got str"),
    ],
)
def test_names_a_bad_option_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IDLGAttack(**options)


@pytest.mark.parametrize(
    ("rule", "victims", "shape", "message"),
    [
        ("idlg", {}, None, r"Expected one image .* for rule='idlg', but got 2\. Rules that would work: 'auto', "),
        ("rlu", {}, None, "Expected `auxiliary` images .*for rule='rlu', but got none"),
        ("posterior", {}, (1, 12, 12), "Expected victims that share their weights for rule='posterior'"),
        ("auto", {}, (3, 12, 12), r"Expected `auxiliary` images of shape \(1, 12, 12\), as the victims', but got \(3"),
        ("auto", {"loss": "mean_squared_error"}, None, "Expected a victim with loss 'cross_entropy'.*Use DLGAttack"),
    ],
)
def test_refuses_victims_that_the_rule_can_not_read(
    kit: Any, rule: str, victims: dict[str, Any], shape: tuple[int, ...] | None, message: str
) -> None:
    auxiliary = None if shape is None else Auxiliary(torch.rand(20, *shape), torch.arange(20) % 10)
    with pytest.raises(ValueError, match=message):
        kit.fit(IDLGAttack(rule=rule, auxiliary=auxiliary), kit.victims(victims=2, images=2, **victims))


def test_options_are_plain_values_and_a_checkpoint_knows_other_auxiliary_images(kit: Any, tmp_path: Path) -> None:
    auxiliary = auxiliary_images(kit)
    other = Auxiliary(auxiliary.images.flip(0), auxiliary.labels)
    options: dict[str, Any] = {"rule": "rlu", "max_evaluations": 6, "restarts": 0}
    model = LeNet(1, 12)

    def run(attack: IDLGAttack, checkpoint: str | None = None) -> Any:
        victims = kit.victims(victims=2, images=2, model=model)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        return kit.fit(attack, victims, ckpt_path=checkpoint, callbacks=[saver], enable_checkpointing=True)

    attack = IDLGAttack(auxiliary=auxiliary, **options)
    assert json.loads(json.dumps(dict(attack.hparams))) == dict(attack.hparams) == dict(attack.hparams_initial)
    assert attack.hparams["auxiliary"] == IDLGAttack(auxiliary=auxiliary, **options).hparams["auxiliary"]
    assert IDLGAttack().hparams["auxiliary"] is None
    run(attack)
    early = str(tmp_path / "step=3.ckpt")
    kit.assert_same(attack, run(IDLGAttack(auxiliary=auxiliary, **options), early))
    for differing in (
        IDLGAttack(auxiliary=other, **options),
        IDLGAttack(**options | {"rule": "auto"}),
        IDLGAttack(auxiliary=auxiliary, **options | {"rule": "llg_plus"}),
    ):
        with pytest.raises(ValueError, match=r"Expected the configuration of the checkpoint.*(auxiliary|rule)="):
            run(differing, early)


def test_inferred_labels_have_no_order_for_clients_that_take_images_in_turns(kit: Any) -> None:
    steps = {"images": 2, "local_steps": 2, "learning_rate": 0.1, "local_batch_size": 1}
    attack = IDLGAttack(max_evaluations=2, restarts=0)
    with pytest.raises(ValueError, match=r"`local_batch_size` 1\. Use DLGAttack, or reveal the labels"):
        kit.fit(attack, kit.victims(victims=2, **steps))
    kit.fit(attack, kit.victims(victims=2, reveal_labels=True, **steps))
    assert len(attack.finished) == 2


def test_a_rule_for_one_network_is_refused_before_the_search(kit: Any) -> None:
    with pytest.raises(ValueError, match="Expected victims that share their weights for rule='posterior'"):
        kit.fit(IDLGAttack(rule="posterior"), kit.victims(victims=2, images=2))
