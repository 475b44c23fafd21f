from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import Normalize

from leakage import SharedGradient, Victim
from leakage.updates import read_update
from tests.updates.clients import IMAGE_SHAPE, flower_list, images, network, trained

RATE = 0.1


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def victim(model: nn.Module) -> Victim:
    return Victim(model, image_shape=IMAGE_SHAPE)


@pytest.fixture
def after(model: nn.Module) -> nn.Module:
    return trained(model, lr=RATE)


def own(victim: Victim, count: int = 1) -> SharedGradient:
    """What our own client shares of the same images."""
    inputs, labels = images(count)
    return victim.share(inputs[None], labels[None])


def same(one: SharedGradient, other: SharedGradient, tolerance: float = 1e-5) -> bool:
    pairs = [(one.gradients[name], other.gradients[name]) for name in other.gradients]
    return one.gradients.keys() == other.gradients.keys() and all(
        bool((a - b).norm() <= tolerance * b.norm() + 1e-7) for a, b in pairs
    )


def parameters(arrays: list[Any]) -> SimpleNamespace:
    """Flower's ``Parameters``, for where it isn't installed: see ``test_flower.py`` for the real one."""
    tensors = []
    for array in arrays:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        tensors.append(file.getvalue())
    return SimpleNamespace(tensors=tensors, tensor_type="numpy.ndarray")


def test_all_forms_are_the_gradient_that_our_own_client_shares(
    model: nn.Module, victim: Victim, after: nn.Module, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / "before.pt")
    torch.save({"state_dict": after.state_dict(), "epoch": 3}, tmp_path / "after.ckpt")
    save_file(model.state_dict(), tmp_path / "before.safetensors")
    save_file(after.state_dict(), tmp_path / "after.safetensors")
    np.savez(tmp_path / "before.npz", *flower_list(model))
    np.savez(tmp_path / "after.npz", **{name: tensor.numpy() for name, tensor in after.state_dict().items()})
    forms: list[tuple[Any, Any]] = [
        (model, after),
        (model.state_dict(), after.state_dict()),
        (tmp_path / "before.pt", tmp_path / "after.ckpt"),
        (str(tmp_path / "before.safetensors"), str(tmp_path / "after.safetensors")),
        (tmp_path / "before.npz", tmp_path / "after.npz"),
        (flower_list(model), tuple(flower_list(after))),
        (parameters(flower_list(model)), SimpleNamespace(parameters=parameters(flower_list(after)), num_examples=1)),
        ({str(place): array for place, array in enumerate(flower_list(model))}, after),
    ]
    expected = own(victim)
    for before, update in forms:
        shared = read_update(before, update, victim, learning_rate=RATE)
        assert same(shared, expected)
        victim.check(shared)
        assert all(torch.equal(shared.state[name], tensor) for name, tensor in victim.state.items())


def test_differences_and_gradients(model: nn.Module, victim: Victim, after: nn.Module) -> None:
    old, new, expected = model.state_dict(), after.state_dict(), own(victim)
    difference = {name: new[name] - old[name] for name in old}
    told = SimpleNamespace(params=difference, params_type=SimpleNamespace(value="DIFF"))
    for update, holds in ((difference, "difference"), (told, None), (told, "difference")):
        assert same(read_update(old, update, victim, holds=holds, learning_rate=RATE), expected)
    gradient = {name: tensor[0] for name, tensor in expected.gradients.items()}
    assert same(read_update(old, gradient, victim, holds="gradient"), expected, 0)


def test_steps_with_momentum_and_weight_decay(model: nn.Module) -> None:
    options = {"momentum": 0.9, "weight_decay": 5e-4}
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=3, local_steps=4, learning_rate=0.05, **options)
    shared = read_update(model, trained(model, 3, lr=0.05, steps=4, **options), victim)
    assert same(shared, own(victim, 3), 1e-4)


def test_rate_that_is_not_told(model: nn.Module) -> None:
    victim = Victim(model, image_shape=IMAGE_SHAPE, learning_rate="unknown")
    told = Victim(model, image_shape=IMAGE_SHAPE)
    shared = read_update(model, trained(model, lr=0.5), victim)
    gradients = {name: tensor / 0.5 for name, tensor in shared.gradients.items()}
    assert same(SharedGradient(gradients, shared.state, shared.ids, told.protocol), own(told))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_stands_in_between(training: bool) -> None:
    model = network(norm=True).train(training)
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=3)
    before, after = flower_list(model), flower_list(trained(model, 3, lr=RATE))
    expected = own(victim, 3)
    assert same(read_update(before, after, victim, learning_rate=RATE), expected, 1e-4)
    names = [name for name, _ in model.named_parameters()]
    only = [[arrays[[*model.state_dict()].index(name)] for name in names] for arrays in (before, after)]
    assert same(read_update(*only, victim, learning_rate=RATE), expected, 1e-4)


def test_prefixes_and_frozen_layers(victim: Victim, model: nn.Module, after: nn.Module) -> None:
    expected = own(victim)
    named = {f"module.{name}": tensor for name, tensor in after.state_dict().items()}
    assert same(read_update(model, named, victim, learning_rate=RATE), expected)
    wrapped = Victim(nn.Sequential(Normalize([0.0], [1.0]), model), image_shape=IMAGE_SHAPE)
    shared = read_update(model, after, wrapped, learning_rate=RATE)
    assert {name.removeprefix("1.") for name in shared.gradients} == expected.gradients.keys()
    frozen = network()
    frozen[0].requires_grad_(False)
    sent = {name: tensor for name, tensor in after.state_dict().items() if not name.startswith("0.")}
    shared = read_update(model, sent, Victim(frozen, image_shape=IMAGE_SHAPE), learning_rate=RATE)
    assert "0.weight" not in shared.gradients
    assert "0.weight" in shared.state


def test_an_attack_takes_it(model: nn.Module, victim: Victim, after: nn.Module) -> None:
    from leakage.labels import infer_labels

    assert infer_labels(read_update(model, after, victim, learning_rate=RATE), victim).labels.item() == images(1)[1]


class Spy:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


def test_files_run_no_code(victim: Victim, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"0.weight": Spy()}))
    torch.save({"0.weight": Spy()}, tmp_path / "zip.pth")
    np.savez(tmp_path / "arrays.npz", np.array([Spy()], dtype=object))
    for name in ("pickle.pt", "zip.pth", "arrays.npz"):
        with pytest.raises(ValueError, match=r"Expected a complete file of weights, but got .* code \(never run\)"):
            read_update(model, tmp_path / name, victim, learning_rate=RATE)
    file = io.BytesIO()
    np.save(file, np.array([Spy()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Expected `update` as whole NumPy arrays, but got"):
        read_update(
            model, SimpleNamespace(tensors=[file.getvalue()], tensor_type="numpy.ndarray"), victim, learning_rate=RATE
        )
    assert not (tmp_path / "ran").exists()


def test_bad_files(victim: Victim, model: nn.Module, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-200])
    own(victim).save(tmp_path / "shared.safetensors")
    (tmp_path / "weights.txt").touch()
    for name, match in {
        "cut.safetensors": "truncated",
        "cut.pt": "truncated",
        "shared.safetensors": "a shared gradient, which `SharedGradient.load` reads",
        "weights.txt": "Expected a file of weights that ends in one of",
    }.items():
        with pytest.raises(ValueError, match=match):
            read_update(model, tmp_path / name, victim, learning_rate=RATE)
    with pytest.raises(FileNotFoundError, match=r"Expected a file of weights at .*none.pt', but got no such file"):
        read_update(tmp_path / "none.pt", model, victim, learning_rate=RATE)


def changed(arrays: list[Any], place: int, array: Any) -> list[Any]:
    return [array if at == place else one for at, one in enumerate(arrays)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a[:-1], r"Expected `update` as a list of 8 \(state_dict\(\)\) or 8 .* arrays, but got 7"),
        (lambda a: changed(a, 0, a[0].astype(object)), "Expected `update` with real numbers in 0, but got object"),
        (lambda a: changed(a, 0, a[0].astype(complex)), "Expected `update` with real numbers in 0, but got complex"),
        (
            lambda a: changed(a, 0, (100 * a[0]).astype(int)),
            "floating-point numbers in '0.weight', but got torch.int64",
        ),
        (lambda a: changed(a, 0, a[0] * np.nan), "Expected `update` with finite numbers in '0.weight', but got NaN"),
        (lambda a: changed(a, 0, a[0][:1]), r"'0.weight' of shape \(4, 1, 3, 3\), but got \(1, 1, 3, 3\)\.$"),
        (lambda a: [a[1], a[0], *a[2:]], "in another order: that of `state_dict"),
        (lambda a: changed(a, 0, "text"), "Expected `update` with an array 0, but got str"),
        (lambda a: {"bias": a[0]}, r"Expected `update` with the names of the model, .* but got unknown \['bias'\]"),
        (lambda a: {"0.weight": a[0]}, "Expected `update` with '0.bias', which the victim trains, but got none"),
        (lambda a: {}, "Expected `update` to hold arrays, but got none"),
        (lambda a: [], "Expected `update` as a state_dict, .* but got list of nothing"),
        (lambda a: 3, "Expected `update` as a state_dict, .* but got int"),
        (lambda a: SimpleNamespace(tensors=[], tensor_type="pickle"), "as 'numpy.ndarray' tensors, but got 'pickle'"),
        (lambda a: SimpleNamespace(data={}, data_kind="METRICS"), "of a kind among .*, but got 'METRICS'"),
        (
            lambda a: SimpleNamespace(data={}, data_kind="WEIGHTS", meta={"PROCESSED_ALGORITHM": "HE"}),
            "Expected `update` as plain arrays, but got arrays processed by 'HE'",
        ),
        (lambda a: SimpleNamespace(array_records={}), r"with one record of arrays, but got \[\]"),
        (lambda a: {"0.weight": torch.eye(3).to_sparse()}, "with plain real numbers in '0.weight'"),
    ],
)
def test_other_arrays(change: Any, match: str, model: nn.Module, victim: Victim, after: nn.Module) -> None:
    with pytest.raises(ValueError, match=match):
        read_update(model, change(flower_list(after)), victim, learning_rate=RATE)


def test_statistics_in_place_of_one_another() -> None:
    model = network(norm=True).eval()
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    model[1].running_mean.fill_(-1)
    arrays = flower_list(model)
    mean, variance = ([*model.state_dict()].index(f"1.running_{name}") for name in ("mean", "var"))
    arrays[mean], arrays[variance] = arrays[variance], arrays[mean]
    with pytest.raises(ValueError, match=r"running variances of at least 0 in '1.running_var', but got -1.0"):
        read_update(arrays, arrays, victim, learning_rate=RATE)


def test_bad_settings(model: nn.Module, victim: Victim, after: nn.Module) -> None:
    with pytest.raises(ValueError, match="Expected `victim` to be a Victim, but got Sequential"):
        read_update(model, after, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected a `learning_rate`, by which .* but got None"):
        read_update(model, after, victim)
    with pytest.raises(ValueError, match="Expected `holds` to be one of"):
        read_update(model, after, victim, holds="deltas")
    with pytest.raises(ValueError, match="Expected `learning_rate` to be positive"):
        read_update(model, after, victim, learning_rate=0.0)
    several = Victim(model, image_shape=IMAGE_SHAPE, local_steps=2, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"Expected `learning_rate` as in the victim's protocol, 0.1, but got 0.2"):
        read_update(model, after, several, learning_rate=0.2)
    difference = SimpleNamespace(data=after.state_dict(), data_kind="WEIGHT_DIFF")
    with pytest.raises(ValueError, match="Expected `before` to hold weights, but got an object that holds a diff"):
        read_update(difference, after, victim, learning_rate=0.1)
    with pytest.raises(ValueError, match="Expected `holds` to be 'difference', as the object says, but got 'weights'"):
        read_update(model, difference, victim, holds="weights", learning_rate=0.1)
    with pytest.raises(ValueError, match=r"Expected `before` with the weights of '0.weight', but got none"):
        read_update({"0.bias": torch.zeros(4)}, after, victim, learning_rate=0.1)
