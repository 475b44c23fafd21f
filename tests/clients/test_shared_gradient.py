"""What travels between client and attacker: round trips, and every file that must be refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leakage import LeNet, Protocol, SharedGradient, Victim
from leakage.errors import show_shape
from leakage.files import tensors as tensor_files
from leakage.files.tensors import write_safetensors

PROTOCOL = Protocol(image_shape=(1, 4, 4), num_classes=3, num_images=2)


def make(victims: int = 3, *, own: bool = True, labels: bool = True) -> SharedGradient:
    """The gradients of a network that also has buffers, one of them an integer without dimensions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
    victim = Victim(model, image_shape=(1, 4, 4), num_images=2)
    generator = torch.Generator().manual_seed(0)
    return victim.share(
        torch.rand(victims, 2, 1, 4, 4, generator=generator),
        torch.randint(3, (victims, 2), generator=generator),
        states=victim.fresh_states(list(range(victims))) if own else None,
        ids=torch.arange(10, 10 + victims),
        reveal_labels=labels,
    )


def assert_equal(one: SharedGradient, other: SharedGradient) -> None:
    assert (one.protocol, one.own_weights) == (other.protocol, other.own_weights)
    for attribute in ("gradients", "state"):
        left, right = getattr(one, attribute), getattr(other, attribute)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=f"{attribute} {name}")
    assert torch.equal(one.ids, other.ids)
    assert (one.labels is None) == (other.labels is None)
    if one.labels is not None and other.labels is not None:
        assert torch.equal(one.labels, other.labels)


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
    with tensor_files.safe_open(tmp_path / "client.safetensors", framework="pt") as file:
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
        "defenses": [],
    }
    assert {"ids", "labels", "gradients/0.weight", "state/1.running_mean"} <= names
    assert not any(name.startswith("gradients/1.running") for name in names)


@pytest.mark.parametrize("own", [True, False])
def test_select(own):
    shared = make(4, own=own)
    picked = shared.select(torch.tensor([2, 0]))
    assert len(picked) == 2
    assert picked.ids.tolist() == [12, 10]
    assert torch.equal(picked.labels, shared.labels[[2, 0]])
    assert torch.equal(picked.gradients["0.bias"], shared.gradients["0.bias"][[2, 0]])
    expected = shared.state["0.bias"][[2, 0]] if own else shared.state["0.bias"]
    assert torch.equal(picked.state["0.bias"], expected)
    assert_equal(picked, shared.select(torch.tensor([True, False, True, False])).select(torch.tensor([1, 0])))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_replace_writes_over_the_victims_at_some_places(own, labels):
    whole = make(6, own=own, labels=labels)
    lanes, others = whole.select(torch.arange(4)), whole.select(torch.tensor([4, 5]))
    memory = {name: tensor.data_ptr() for name, tensor in lanes.gradients.items()}
    replaced = lanes.replace(torch.tensor([3, 1]), others)
    assert_equal(replaced, whole.select(torch.tensor([0, 5, 2, 4])))
    assert {name: tensor.data_ptr() for name, tensor in replaced.gradients.items()} == memory  # none is copied
    assert_equal(others, whole.select(torch.tensor([4, 5])))


def test_replace_takes_the_precision_and_device_of_the_first():
    lanes = make(4).select(torch.arange(3)).to(torch.float64)
    replaced = lanes.replace(torch.tensor([2]), make(4).select(torch.tensor([3])))
    assert {tensor.dtype for tensor in replaced.gradients.values()} == {torch.float64}
    assert replaced.state["1.num_batches_tracked"].dtype == torch.int64
    assert_equal(replaced, make(4).select(torch.tensor([0, 1, 3])).to(torch.float64))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_cat_undoes_select(own, labels):
    shared = make(4, own=own, labels=labels)
    parts = [shared.select(torch.tensor([index])) for index in range(4)]
    assert_equal(SharedGradient.cat(parts), shared)
    assert_equal(SharedGradient.cat([shared]), shared)


@pytest.mark.parametrize(
    "other",
    [
        make(own=False),
        make(labels=False),
        dataclasses.replace(make(), protocol=dataclasses.replace(PROTOCOL, reduction="sum")),
    ],
    ids=["weights", "labels", "protocol"],
)
def test_cat_refuses_what_does_not_belong_together(other):
    with pytest.raises(ValueError, match="Expected parts of the same protocol, own weights and known labels"):
        SharedGradient.cat([make(), other])


def test_to_changes_floating_point_only():
    moved = make().to(torch.float64)
    assert {tensor.dtype for tensor in moved.gradients.values()} == {torch.float64}
    assert moved.state["1.running_mean"].dtype == torch.float64
    assert moved.state["1.num_batches_tracked"].dtype == torch.int64
    assert moved.labels.dtype == moved.ids.dtype == torch.int64


def test_to_moves_all_but_ids():
    moved = make().to("meta")
    assert moved.labels.device.type == moved.state["1.num_batches_tracked"].device.type == "meta"
    assert moved.ids.device.type == "cpu"
    # a precision alone moves nothing, so what is elsewhere stays there
    assert moved.to(torch.float64).labels.device.type == "meta"


# -- what can be wrong with the numbers


def test_non_finite_gradients_name_the_victims():
    shared = make(4)
    shared.gradients["3.weight"][1, 0, 0] = torch.nan
    shared.gradients["3.weight"][3, 2, 5] = -torch.inf
    with pytest.raises(ValueError, match=r"finite numbers in the gradient of '3\.weight'.*\(victims \[11, 13\]\)"):
        shared.check()


def test_many_non_finite_victims_are_abridged():
    shared = make(8)
    shared.gradients["3.bias"][:] = torch.nan
    with pytest.raises(ValueError, match=r"\(victims \[10, 11, 12, 13, 14\], \.\.\.\)"):
        shared.check()


def test_non_finite_weights():
    shared = make()
    shared.state["0.weight"][2] = torch.inf
    with pytest.raises(ValueError, match=r"finite numbers in the state of '0\.weight'.*\(victims \[12\]\)"):
        shared.check()
    shared = make(own=False)
    shared.state["1.running_var"] = torch.tensor([1.0, torch.nan])
    with pytest.raises(ValueError, match=r"finite numbers in the state of '1\.running_var', but got NaN or inf\.$"):
        shared.check()


def test_non_finite_scalar_weight_of_own_networks():
    shared = make()
    shared.state["scale"] = torch.tensor([1.0, torch.nan, 1.0])
    with pytest.raises(ValueError, match=r"state of 'scale'.*\(victims \[11\]\)"):
        shared.check()


def change(**changes: object) -> Callable[[SharedGradient], SharedGradient]:
    return lambda shared: dataclasses.replace(shared, **changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(ids=torch.tensor(3)), r"`ids` as whole numbers of at least 0 and shape \(V,\), but got torch.int64 "),
        (change(ids=torch.tensor([0, -1])), r"`ids` as whole numbers of at least 0 .*\(2,\), \[0, -1"),
        (change(ids=torch.zeros(3, 1, dtype=torch.int64)), r"`ids` .* but got torch.int64 \(3, 1\)"),
        (change(ids=torch.zeros(3)), r"`ids` as whole numbers .* but got torch.float32 \(3,\)"),
        (change(ids=torch.zeros(0, dtype=torch.int64)), r"`ids` .* but got torch.int64 \(0,\)"),
        (change(gradients={}), "`gradients` to hold at least one tensor, but got none"),
        (
            change(gradients={"w": torch.zeros(2, 5)}),
            r"gradient of 'w' to have shape \(3, \.\.\.\), but got \(2, 5\)",
        ),
        (
            change(gradients={"w": torch.tensor(1.0)}),
            r"gradient of 'w' to have shape \(3, \.\.\.\), but got \(\)",
        ),
        (
            change(gradients={"w": torch.zeros(3, 2, dtype=torch.int32)}),
            "in floating point, but got torch.int32",
        ),
        (
            change(state={"w": torch.zeros(2, 5)}),
            r"state of 'w' to have shape \(3, \.\.\.\), but got \(2, 5\)",
        ),
        (change(labels=torch.zeros(3, dtype=torch.int64)), r"`labels` of shape \(3, 2\), but got \(3,\)"),
        (change(labels=torch.zeros(3, 2)), r"`labels` as whole numbers, but got torch.float32"),
        (change(labels=torch.full((3, 2), 3)), "`labels` from 0 to 2, but got 3 to 3"),
        (change(labels=torch.tensor([[0, 1], [2, -1], [0, 0]])), "`labels` from 0 to 2, but got -1 to 2"),
    ],
)
def test_check(tmp_path, spoil, message):
    spoiled = spoil(make())
    with pytest.raises(ValueError, match=message):
        spoiled.check()
    spoiled.save(tmp_path / "client.safetensors")
    with pytest.raises(ValueError, match=message):
        SharedGradient.load(tmp_path / "client.safetensors")


# -- files that must be refused


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good file."""
    make().save(tmp_path / "client.safetensors")
    return tmp_path / "client.safetensors"


def rewrite(path: Path, *, without: tuple[str, ...] = (), **header: str | None) -> None:
    """Write the file again with changed header entries (None: without it) and without some tensors."""
    with tensor_files.safe_open(path, framework="pt") as file:
        entries = dict(file.metadata()) | header
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name not in without}
    save_file(tensors, path, {name: value for name, value in entries.items() if value is not None})


def test_rewriting_alone_spoils_nothing(path):
    rewrite(path)
    assert_equal(SharedGradient.load(path), make())


LOCAL = Protocol((1, 4, 4), 3, num_images=6, local_steps=4, learning_rate=0.05, local_batch_size=3)


def test_file_keeps_the_local_steps(tmp_path):
    shared = dataclasses.replace(make(labels=False), protocol=LOCAL)
    shared.save(tmp_path / "client.safetensors")
    loaded = SharedGradient.load(tmp_path / "client.safetensors").protocol
    assert loaded == LOCAL
    assert (loaded.local_steps, loaded.learning_rate, loaded.local_batch_size) == (4, 0.05, 3)


def test_file_from_before_local_steps(path):
    new = ("local_steps", "learning_rate", "local_batch_size")
    old = {name: value for name, value in GOOD.items() if name not in new}
    rewrite(path, protocol=json.dumps(old))
    loaded = SharedGradient.load(path)
    assert_equal(loaded, make())
    assert (loaded.protocol.local_steps, loaded.protocol.local_batch_size) == (1, None)


def test_a_local_batch_of_all_images_is_the_default():
    assert dataclasses.replace(LOCAL, local_batch_size=6) == dataclasses.replace(LOCAL, local_batch_size=None)
    assert dataclasses.replace(PROTOCOL, local_batch_size=2) == PROTOCOL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_steps": 0}, "`local_steps` to be a whole number of at least 1, but got 0"),
        ({"local_steps": True}, "`local_steps` to be a whole number of at least 1, but got True"),
        ({"learning_rate": None}, "a `learning_rate` for 4 local steps, but got None"),
        ({"learning_rate": 0.0}, "`learning_rate` to be positive and finite, but got 0.0"),
        ({"learning_rate": float("inf")}, "`learning_rate` to be positive and finite, but got inf"),
        ({"learning_rate": "0.1"}, "`learning_rate` to be positive and finite, but got '0.1'"),
        ({"local_steps": 1, "local_batch_size": None}, "no `learning_rate` with one local step.* but got 0.05"),
        ({"local_batch_size": 0}, "`local_batch_size` to be a whole number of at least 1, but got 0"),
        ({"local_batch_size": 4}, "`local_batch_size` to divide `num_images` = 6, .* got 4. Choose a divisor of 6"),
        ({"local_batch_size": 12}, "`local_batch_size` to divide `num_images` = 6, .* got 12"),
        ({"local_batch_size": 2}, "`local_steps` to be a multiple of 3 = `num_images` / .* but got 4"),
        ({"local_steps": 1, "learning_rate": None}, "`local_steps` to be a multiple of 2 = .* but got 1"),
    ],
)
def test_wrong_local_steps(changes, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        dataclasses.replace(LOCAL, **changes)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a safetensors file at '.*none', but got no such file"):
        SharedGradient.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="Expected a safetensors file"):
        SharedGradient.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"whole safetensors file, but got '.*client.safetensors' .* truncated"):
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
        (json.dumps(GOOD | {"momentum": 0.9}), "momentum"),
        (json.dumps(GOOD | {"learning_rate": 1}), "no `learning_rate` with one local step.* but got 1"),
        (json.dumps(GOOD | {"local_steps": 2}), "a `learning_rate` for 2 local steps, but got None"),
        (json.dumps(GOOD | {"local_steps": 1.5}), "`local_steps` to be a whole number of at least 1, but got 1.5"),
        (
            json.dumps(GOOD | {"loss": "hinge"}),
            r"`loss` to be one of \['cross_entropy', 'mean_squared_error'\]",
        ),
        (
            json.dumps(GOOD | {"reduction": "none"}),
            r"`reduction` to be one of \['mean', 'sum'\], but got 'none'",
        ),
        (json.dumps(GOOD | {"image_shape": [4, 4]}), r"`image_shape` \(C, H, W\), but got \(4, 4\)"),
        (
            json.dumps(GOOD | {"image_shape": [1, 4, "4"]}),
            "`W` to be a whole number of at least 1, but got '4'",
        ),
        (json.dumps(GOOD | {"image_shape": 4}), "not iterable"),
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


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError("disk full"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_interrupted_write_leaves_the_old_file(path, monkeypatch, error, raised):
    def write_half(tensors: dict[str, Tensor], partial: Path, metadata: dict[str, str]) -> None:
        Path(partial).write_bytes(b"half")
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(tensor_files, "save_file", write_half)
    with pytest.raises(raised):
        write_safetensors(path, "x", {"x": torch.zeros(3)})
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


@pytest.mark.parametrize(
    ("sizes", "text"), [((), "()"), ((3,), "(3,)"), (("V", 1, 28), "(V, 1, 28)"), ((2, "..."), "(2, ...)")]
)
def test_show_shape(sizes, text):
    assert show_shape(*sizes) == text


def test_lenet_of_the_example(tmp_path):
    """The docstring's example, which writes files and is therefore not run there."""
    victim = Victim(LeNet(), image_shape=(1, 28, 28))
    victim.share(torch.rand(2, 1, 1, 28, 28), torch.tensor([[3], [8]])).save(tmp_path / "client.safetensors")
    loaded = SharedGradient.load(tmp_path / "client.safetensors")
    assert loaded.protocol.loss == "cross_entropy"
    victim.check(loaded)


def test_more_local_steps_than_an_attack_can_simulate():
    """A crafted file could otherwise make every evaluation endless."""
    assert Protocol((1, 4, 4), 3, local_steps=10_000, learning_rate=0.1).local_steps == 10_000
    with pytest.raises(ValueError, match=r"Expected `local_steps` of at most 10000, all of which .* but got 10001"):
        Protocol((1, 4, 4), 3, local_steps=10_001, learning_rate=0.1)


def test_a_file_with_endless_local_steps(tmp_path):
    shared = make()
    shared.protocol.local_steps, shared.protocol.learning_rate = 2**40, 0.1
    shared.save(tmp_path / "client.safetensors")
    with pytest.raises(ValueError, match=r"in the header of '.*client.safetensors', but got: Expected `local_steps`"):
        SharedGradient.load(tmp_path / "client.safetensors")
