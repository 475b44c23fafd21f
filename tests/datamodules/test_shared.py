import dataclasses
import pickle

import pytest
import torch
from lightning import Trainer
from safetensors.torch import save_file

from leakage.attacks import IDLGAttack
from leakage.clients.victim import Victim
from leakage.datamodules import SharedGradients, Victims
from leakage.defenses import Clip
from leakage.dummies import RevealedLabels
from leakage.models import LeNet


@pytest.fixture
def shared():
    data = Victims("sample", victims=5, model=LeNet())
    data.setup("fit")
    return data.share(range(5))


def ready(shared, victim=None, **kwargs):
    data = SharedGradients(shared, LeNet() if victim is None else victim, **kwargs)
    data.setup("fit")
    return data


def test_one_file(tmp_path, shared):
    shared.save(tmp_path / "clients.safetensors")
    data = ready(tmp_path / "clients.safetensors", lanes=2)
    assert (data.victims, data.lanes) == (5, 2)
    assert data.val_dataloader() == []
    data.wanted = [0, 1]
    batch = next(iter(data.train_dataloader()))
    assert batch.ids.tolist() == [0, 1]
    assert torch.equal(batch.gradients["classifier.bias"], shared.gradients["classifier.bias"][:2])
    assert torch.equal(data.share(range(4, 5)).gradients["classifier.bias"], shared.gradients["classifier.bias"][4:])
    assert not batch.own_weights
    assert torch.equal(batch.state["classifier.bias"], shared.state["classifier.bias"])


def test_patterns_and_lists_keep_ids_that_do_not_clash(tmp_path, shared, monkeypatch):
    shared.select(torch.tensor([3, 4])).save(tmp_path / "a" / "2.safetensors")
    shared.select(torch.tensor([0, 2])).save(tmp_path / "a" / "1.safetensors")
    shared.select(torch.tensor([1])).save(tmp_path / "b.safetensors")
    data = ready([tmp_path / "b.safetensors", str(tmp_path / "a" / "*.safetensors"), tmp_path / "a" / "1.safetensors"])
    joined = data.share(range(5))
    assert joined.ids.tolist() == [1, 0, 2, 3, 4]
    assert torch.equal(joined.gradients["classifier.bias"], shared.gradients["classifier.bias"][joined.ids])
    assert not joined.own_weights
    monkeypatch.chdir(tmp_path)
    assert ready("**/*.safetensors").share(range(5)).ids.tolist() == [0, 2, 3, 4, 1]


def test_ids_that_clash_are_numbered_anew(tmp_path, shared):
    shared.save(tmp_path / "1.safetensors")
    dataclasses.replace(shared, ids=shared.ids + 4).save(tmp_path / "2.safetensors")
    assert ready(str(tmp_path / "*")).share(range(10)).ids.tolist() == list(range(10))


def test_files_of_several_rounds_keep_their_weights(tmp_path, shared):
    other = dataclasses.replace(shared, state={name: tensor + 1 for name, tensor in shared.state.items()})
    fresh = Victims("sample", victims=2)
    fresh.setup("fit")
    own = fresh.share(range(2))
    for number, part in enumerate((shared, other, own)):
        part.save(tmp_path / f"{number}.safetensors")
    joined = ready(str(tmp_path / "*")).share(range(12))
    assert joined.own_weights
    joined.check()
    for name, state in joined.state.items():
        assert torch.equal(state[0], shared.state[name])
        assert torch.equal(state[9], other.state[name])
        assert torch.equal(state[10:], own.state[name])


def test_files_of_clients_that_train(tmp_path, shared):
    data = Victims(
        "sample",
        victims=3,
        model=LeNet(),
        images=2,
        local_steps=4,
        learning_rate=0.1,
        local_batch_size=1,
        reduction="sum",
    )
    data.setup("fit")
    data.share(range(3)).save(tmp_path / "1.safetensors")
    assert ready(tmp_path / "1.safetensors").victim.protocol == data.victim.protocol
    shared.save(tmp_path / "2.safetensors")
    with pytest.raises(
        ValueError, match=r"2.safetensors' to fit .* protocol, .*local_steps=4.* but got .*local_steps=1"
    ):
        ready(str(tmp_path / "*"))


def test_labels_that_are_told_in_some_files_only(tmp_path, shared):
    shared.save(tmp_path / "1.safetensors")
    dataclasses.replace(shared, labels=torch.zeros(5, 1, dtype=torch.int64)).save(tmp_path / "2.safetensors")
    assert ready(tmp_path / "2.safetensors").share(range(5)).labels.shape == (5, 1)
    with pytest.raises(ValueError, match="Expected labels with all shared gradients or with none, but got them"):
        ready(str(tmp_path / "*"))


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ([], r"Expected `shared` to hold at least one shared gradient or path, but got \[\]"),
        (3, "Expected `shared` as a SharedGradient, a path, or a list of these, but got int"),
        (["a.safetensors", None], "Expected `shared` as a SharedGradient, a path, or a list of these, but got None"),
    ],
)
def test_nothing_shared(shared, message):
    with pytest.raises(ValueError, match=message):
        SharedGradients(shared, LeNet())


def test_no_such_files(tmp_path):
    for path in (tmp_path / "clients.safetensors", str(tmp_path / "*.safetensors")):
        with pytest.raises(FileNotFoundError, match=f"Expected safetensors files at '{tmp_path}.*', but got none"):
            ready(path)
    with pytest.raises(FileNotFoundError, match=f"Expected a safetensors file at '{tmp_path}'"):
        ready(tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "other", "pickle", "torch", "empty"])
def test_files_of_another_kind(tmp_path, shared, kind):
    good, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    shared.save(good)
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-10])
    elif kind == "other":
        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"weight": 1}))
    elif kind == "torch":
        torch.save({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(b"")
    message = "Expected format 'leakage.SharedGradient'" if kind == "other" else "Expected a whole safetensors file"
    with pytest.raises(ValueError, match=rf"{message}.*{path}"):
        ready([good, path])


def test_gradients_that_do_not_fit_the_model(tmp_path, shared):
    path = tmp_path / "clients.safetensors"
    shared.save(path)
    fit = f"Expected '{path}' to fit the victim and the others, but got: Expected the gradient"
    with pytest.raises(
        ValueError,
        match=rf"{fit} of 'classifier.weight' to have .* \(.*10, 147\), but got \(.*10, 588\)",
    ):
        ready(path, LeNet(width=3))
    with pytest.raises(ValueError, match=r"`model` for the protocol with num_classes=10, but got .* num_classes=7"):
        ready(path, LeNet(num_classes=7))
    with pytest.raises(ValueError, match="Expected `model` to take images of shape"):
        ready(path, LeNet(channels=3))
    with pytest.raises(ValueError, match=r"Expected `victim` to be a Victim or a torch\.nn\.Module, but got NoneType"):
        SharedGradients(path, None)


def test_files_of_two_protocols(tmp_path, shared):
    shared.save(tmp_path / "1.safetensors")
    dataclasses.replace(shared, protocol=dataclasses.replace(shared.protocol, reduction="sum")).save(
        tmp_path / "2.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"Expected '.*2.safetensors' to fit .*reduction='sum'.* a separate SharedGradients"
    ):
        ready(str(tmp_path / "*"))


def test_checkpoint_of_other_gradients(tmp_path, shared):
    shared.save(tmp_path / "1.safetensors")
    changed = {name: gradient * 2 for name, gradient in shared.gradients.items()}
    dataclasses.replace(shared, gradients=changed).save(tmp_path / "2.safetensors")
    state = ready(tmp_path / "1.safetensors").state_dict()
    ready(tmp_path / "1.safetensors").load_state_dict(state)
    with pytest.raises(ValueError, match=r"gradients '[0-9a-f]+' in the checkpoint and '[0-9a-f]+' here\.$"):
        ready(tmp_path / "2.safetensors").load_state_dict(state)


def test_from_memory(shared):
    data = ready(shared, lanes=2)
    assert (data.victims, data.lanes, data.reveal_labels, data.val_dataloader()) == (5, 2, False, [])
    assert data.victim.protocol == shared.protocol
    data.wanted = [3, 1]
    batch = next(iter(data.train_dataloader()))
    assert batch.ids.tolist() == [3, 1]
    for name, gradient in shared.gradients.items():
        assert torch.equal(batch.gradients[name], gradient[[3, 1]])


def test_the_victim_is_taken_as_it_is(shared):
    victim = Victim(LeNet(), image_shape=(1, 28, 28))
    assert ready(shared, victim).victim is victim
    other = Victim(LeNet(), image_shape=(1, 28, 28), reduction="sum")
    with pytest.raises(
        ValueError,
        match=r"Expected `shared\[0\]` to fit the victim .* got: .*protocol, with reduction='sum', but got .*'mean'",
    ):
        ready(shared, other)


def test_a_victim_without_the_defenses_of_the_gradient(shared):
    network = LeNet()
    defended = Victim(network, image_shape=(1, 28, 28), defenses=[Clip(1.0)])
    told = defended.share(torch.rand(2, 1, 1, 28, 28), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(
        ValueError,
        match=r"with defenses=\(\), but got defenses=\(\{'name': 'Clip', 'norm': 1\.0\},\)\. Create a victim "
        r"for it by Victim\.of\(network, shared\.protocol\), .* pass the network itself",
    ):
        ready(told, Victim(network, image_shape=(1, 28, 28)))
    for mended in (network, Victim.of(network, told.protocol)):
        assert ready(told, mended).victims == 2


def test_weights_of_their_own_are_known_before_anything_is_shared(shared, tmp_path, monkeypatch):
    assert not ready(shared).own_weights
    fresh = Victims("sample", victims=2)
    fresh.setup("fit")
    data = SharedGradients(fresh.share(range(2)), LeNet())
    monkeypatch.setattr(SharedGradients, "share", lambda *_: pytest.fail("it is too late"))
    with pytest.raises(ValueError, match="for rule='posterior', but got a network for each"):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path).fit(
            IDLGAttack(rule="posterior"), datamodule=data
        )
    assert data.own_weights


def test_memory_and_files_together(tmp_path, shared):
    shared.select(torch.tensor([2, 3])).save(tmp_path / "1.safetensors")
    joined = ready([shared.select(torch.tensor([4])), tmp_path / "1.safetensors"]).share(range(3))
    assert joined.ids.tolist() == [4, 2, 3]
    assert torch.equal(joined.gradients["classifier.bias"], shared.gradients["classifier.bias"][[4, 2, 3]])


def test_what_was_given_is_left_as_it_was(shared):
    twice = dataclasses.replace(shared, ids=torch.zeros(5, dtype=torch.int64))
    data = ready(twice)
    assert data.share(range(5)).ids.tolist() == list(range(5))
    assert twice.ids.tolist() == [0] * 5
    data.share([0]).gradients["classifier.bias"].zero_()
    assert bool(shared.gradients["classifier.bias"].abs().sum() > 0)


def test_an_attack_from_memory(shared, tmp_path):
    told = dataclasses.replace(shared, labels=None).select(torch.tensor([0, 1]))
    attack = IDLGAttack(max_evaluations=60, restarts=0)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(attack, datamodule=SharedGradients(told, Victim(LeNet(), image_shape=(1, 28, 28))))
    truth = Victims("sample", victims=2)
    truth.setup("fit")
    (expected,) = truth.val_dataloader()
    found = attack.finished.select(attack.finished.ids.argsort())
    assert torch.equal(found.labels, expected.labels)
    assert float((found.images - expected.images).square().mean()) < 0.05, "noise has 0.2"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_labels_of_any_whole_type_are_taken(shared, dtype):
    victim = Victim(LeNet(), image_shape=(1, 28, 28))
    labels = torch.tensor([[3], [1], [0], [9], [3]])
    given = ready(dataclasses.replace(shared, labels=labels.to(dtype))).share(range(5))
    probabilities = RevealedLabels().begin(given, victim)["probabilities"]
    assert torch.equal(probabilities, torch.eye(10)[labels])
