import dataclasses
import pickle

import pytest
import torch
from safetensors.torch import save_file

from leakage.datamodules import SampleVictims, SharedGradientFiles
from leakage.models import LeNet


@pytest.fixture
def shared():
    data = SampleVictims(victims=5, model=LeNet())
    data.setup("fit")
    return data.share(range(5))


def ready(*args, **kwargs):
    data = SharedGradientFiles(*args, **({"model": LeNet()} | kwargs))
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
    fresh = SampleVictims(victims=2)
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
    data = SampleVictims(
        victims=3, model=LeNet(), num_images=2, local_steps=4, learning_rate=0.1, local_batch_size=1, reduction="sum"
    )
    data.setup("fit")
    data.share(range(3)).save(tmp_path / "1.safetensors")
    assert ready(tmp_path / "1.safetensors").victim.protocol == data.victim.protocol
    shared.save(tmp_path / "2.safetensors")
    with pytest.raises(
        ValueError, match=r"2.safetensors' to fit .* protocol .*local_steps=4.* but got .*local_steps=1"
    ):
        ready(str(tmp_path / "*"))


def test_labels_that_are_told_in_some_files_only(tmp_path, shared):
    shared.save(tmp_path / "1.safetensors")
    dataclasses.replace(shared, labels=torch.zeros(5, 1, dtype=torch.int64)).save(tmp_path / "2.safetensors")
    assert ready(tmp_path / "2.safetensors").share(range(5)).labels.shape == (5, 1)
    with pytest.raises(ValueError, match="Expected labels in all files or in none, but got them in some"):
        ready(str(tmp_path / "*"))


def test_no_paths():
    with pytest.raises(ValueError, match=r"Expected `paths` to name at least one file, but got \[\]"):
        SharedGradientFiles([], model=LeNet())


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
    fit = f"Expected '{path}' to fit the model and the other files, but got: Expected the gradient"
    with pytest.raises(
        ValueError,
        match=rf"{fit} of 'classifier.weight' to have .* \(.*10, 147\), but got \(.*10, 588\)",
    ):
        ready(path, model=LeNet(width=3))
    with pytest.raises(ValueError, match=r"`model` for the protocol with num_classes=10, but got .* num_classes=7"):
        ready(path, model=LeNet(num_classes=7))
    with pytest.raises(ValueError, match="Expected `model` to take images of shape"):
        ready(path, model=LeNet(channels=3))
    with pytest.raises(ValueError, match=r"Expected `model` to be a torch\.nn\.Module, but got NoneType"):
        SharedGradientFiles(path, model=None)


def test_files_of_two_protocols(tmp_path, shared):
    shared.save(tmp_path / "1.safetensors")
    dataclasses.replace(shared, protocol=dataclasses.replace(shared.protocol, reduction="sum")).save(
        tmp_path / "2.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"Expected '.*2.safetensors' to fit .*, but got: .* protocol .*reduction='sum'"
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
