"""Files of shared gradients: round trips, and every file that must be refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from leakage import LeNet, Protocol, SharedGradient, Victim
from leakage.files.tensors import write_safetensors
from tests.clients.shared import assert_equal, make, rewrite

PROTOCOL = Protocol(image_shape=(1, 4, 4), num_classes=3, num_images=2)
STEPS = {"local_steps": 4, "learning_rate": 0.05, "local_batch_size": 3, "momentum": 0.9, "weight_decay": 1e-4}
LOCAL = Protocol((1, 4, 4), 3, num_images=6, **STEPS)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_file_round_trip(tmp_path, own, labels):
    shared = make(own=own, labels=labels)
    shared.save(tmp_path / "new" / "folder" / "client.safetensors")
    assert_equal(SharedGradient.load(tmp_path / "new" / "folder" / "client.safetensors"), shared)


def test_file_keeps_double_precision(tmp_path):
    shared = make().to(torch.float64)
    shared.save(tmp_path / "client.safetensors")
    loaded = SharedGradient.load(str(tmp_path / "client.safetensors"))
    assert_equal(loaded, shared)
    assert loaded.gradients["0.weight"].dtype == torch.float64


def test_file_of_tensors_that_share_memory(tmp_path):
    shared = make(own=False)
    shared.state["tied"] = shared.state["0.weight"]
    shared.save(tmp_path / "client.safetensors")
    assert_equal(SharedGradient.load(tmp_path / "client.safetensors"), shared)


def test_protocol_in_header_as_documented(tmp_path):
    make().save(tmp_path / "client.safetensors")
    with safe_open(tmp_path / "client.safetensors", framework="pt") as file:
        header = file.metadata()
        names = set(file.keys())
    assert header["format"] == "leakage.SharedGradient"
    assert header["version"] == "1"
    assert json.loads(header["own_weights"]) is True
    assert json.loads(header["protocol"]) == {
        "image_shape": [1, 4, 4],
        "num_classes": 3,
        "num_images": 2,
        "loss": "cross_entropy",
        "reduction": "mean",
        "local_steps": 1,
        "learning_rate": None,
        "local_batch_size": None,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "shuffle": False,
        "defenses": [],
        "label_smoothing": 0.0,
        "class_weights": None,
        "label_kind": "classes",
    }
    assert {"ids", "labels", "gradients/0.weight", "state/1.running_mean"} <= names
    assert not any(name.startswith("gradients/1.running") for name in names)


def test_lenet_of_the_example(tmp_path):
    """The docstring's example, which writes files and is therefore not run there."""
    victim = Victim(LeNet(), image_shape=(1, 28, 28))
    victim.share(torch.rand(2, 1, 1, 28, 28), torch.tensor([[3], [8]])).save(tmp_path / "client.safetensors")
    loaded = SharedGradient.load(tmp_path / "client.safetensors")
    assert loaded.protocol.loss == "cross_entropy"
    victim.check(loaded)


# -- files that must be refused


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good file."""
    make().save(tmp_path / "client.safetensors")
    return tmp_path / "client.safetensors"


def test_rewriting_alone_spoils_nothing(path):
    rewrite(path)
    assert_equal(SharedGradient.load(path), make())


def test_file_keeps_the_local_steps(tmp_path):
    shared = dataclasses.replace(make(labels=False), protocol=LOCAL)
    shared.save(tmp_path / "client.safetensors")
    loaded = SharedGradient.load(tmp_path / "client.safetensors").protocol
    assert loaded == LOCAL
    assert (loaded.local_steps, loaded.learning_rate, loaded.local_batch_size) == (4, 0.05, 3)
    assert (loaded.momentum, loaded.weight_decay) == (0.9, 1e-4)


def test_file_from_before_local_steps_and_defenses(path):
    new = ("local_steps", "learning_rate", "local_batch_size", "momentum", "weight_decay", "defenses")
    old = {name: value for name, value in GOOD.items() if name not in new}
    rewrite(path, protocol=json.dumps(old))
    loaded = SharedGradient.load(path)
    assert_equal(loaded, make())
    assert (loaded.protocol.local_steps, loaded.protocol.defenses) == (1, ())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a safetensors file at '.*none', but got no such file"):
        SharedGradient.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="Expected a safetensors file"):
        SharedGradient.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"whole safetensors file, but got '.*client.safetensors', which is truncated"):
        SharedGradient.load(path)


class Trap:
    """Leaves a file behind if a pickle of it is ever loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_pickle_is_refused_and_not_run(tmp_path, write):
    path, trace = tmp_path / "client.pt", tmp_path / "trace"
    write(Trap(trace), path)
    with pytest.raises(ValueError, match=r"another kind \(pickles, such as \.pt and \.pth, are refused\)"):
        SharedGradient.load(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists(), "the trap is no trap, so the test shows nothing"


@pytest.mark.parametrize("header", [{"format": "pt"}, {"format": None}, {"version": "2"}, {"version": None}])
def test_wrong_format_or_version(path, header):
    rewrite(path, **header)
    with pytest.raises(
        ValueError, match=r"Expected format 'leakage\.SharedGradient' of version 1 in the header of .*client"
    ):
        SharedGradient.load(path)


def test_file_without_header(path):
    save_file({"ids": torch.arange(3)}, path)
    with pytest.raises(ValueError, match=r"in the header of .* but got None of version None"):
        SharedGradient.load(path)


GOOD = dataclasses.asdict(PROTOCOL)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (None, "'protocol'"),
        ("{", "Expecting property name"),
        ("[1]", "must be a mapping"),
        (json.dumps({"image_shape": [1, 4, 4]}), "num_classes"),
        (json.dumps(GOOD | {"dampening": 0.9}), "dampening"),
        (json.dumps(GOOD | {"momentum": 0.9}), "no `momentum` and no `weight_decay` with one local step.* but got 0.9"),
        (json.dumps(GOOD | {"weight_decay": "1"}), "`weight_decay` of at least 0, but got '1'"),
        (json.dumps(GOOD | {"learning_rate": 1}), "no `learning_rate` with one local step.* but got 1"),
        (json.dumps(GOOD | {"local_steps": 2}), "a `learning_rate` for 2 local steps, but got None"),
        (json.dumps(GOOD | {"local_steps": 1.5}), "`local_steps` to be a whole number of at least 1, but got 1.5"),
        (
            json.dumps(GOOD | {"loss": "hinge"}),
            r"`loss` to be one of \['cross_entropy', 'mean_squared_error', 'own'\]",
        ),
        (
            json.dumps(GOOD | {"reduction": "none"}),
            r"`reduction` to be one of \['mean', 'sum'\], but got 'none'",
        ),
        (json.dumps(GOOD | {"image_shape": [4, 4]}), r"`image_shape` \(C, H, W\), but got \[4, 4\]"),
        (
            json.dumps(GOOD | {"image_shape": [1, 4, "4"]}),
            "`W` to be a whole number of at least 1, but got '4'",
        ),
        (json.dumps(GOOD | {"image_shape": 4}), r"`image_shape` \(C, H, W\), but got 4"),
        (
            json.dumps(GOOD | {"num_classes": 0}),
            "`num_classes` to be a whole number of at least 1, but got 0",
        ),
        (
            json.dumps(GOOD | {"num_images": 1.5}),
            "`num_images` to be a whole number of at least 1, but got 1.5",
        ),
    ],
)
def test_wrong_protocol(path, protocol, message):
    rewrite(path, protocol=protocol)
    with pytest.raises(ValueError, match=f"Expected a protocol in the header of '.*client.*', but got: .*{message}"):
        SharedGradient.load(path)


def test_a_file_with_endless_local_steps(tmp_path):
    shared = make()
    shared.protocol.local_steps, shared.protocol.learning_rate = 2**40, 0.1
    shared.save(tmp_path / "client.safetensors")
    with pytest.raises(ValueError, match=r"in the header of '.*client.safetensors', but got: Expected `local_steps`"):
        SharedGradient.load(tmp_path / "client.safetensors")


@pytest.mark.parametrize(
    ("own_weights", "message"),
    [(None, "'own_weights'"), ("1", "true or false, but got 1"), ("yes", "Expecting value")],
)
def test_wrong_own_weights(path, own_weights, message):
    rewrite(path, own_weights=own_weights)
    with pytest.raises(ValueError, match=f"Expected a protocol in the header .*{message}"):
        SharedGradient.load(path)


def test_own_weights_that_are_not(path):
    make(own=False).save(path)
    rewrite(path, own_weights="true")
    with pytest.raises(ValueError, match=r"Expected the state of '.*' to have shape \(3, \.\.\.\)"):
        SharedGradient.load(path)


def test_missing_ids(path):
    rewrite(path, without=("ids",))
    with pytest.raises(ValueError, match=r"Expected a tensor 'ids' in '.*client.*', but got \['gradients/0\.bias'"):
        SharedGradient.load(path)


# -- writing


def test_full_disk_leaves_the_old_file(path):
    """A real failure: the system refuses files of more than 4 kB."""
    resource = pytest.importorskip("resource")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Expected to write '.*client.safetensors', but got: "):
            write_safetensors(path, "big", {"big": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"Expected to write '.*/file/client.safetensors', but got: "):
        make().save(tmp_path / "file" / "client.safetensors")
    assert (tmp_path / "file").read_text() == "in the way"


def test_writing_replaces_the_old_file(path):
    make(2, own=False, labels=False).save(path)
    assert_equal(SharedGradient.load(path), make(2, own=False, labels=False))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_writing_takes_views_and_gradients(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": whole.t(), "row": whole[1], "again": whole, "parameter": nn.Parameter(whole)}
    write_safetensors(tmp_path / "views", "views", tensors, {"key": "value"})
    loaded = load_file(tmp_path / "views")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
