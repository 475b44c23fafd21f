from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.condensation import SyntheticSet

KINDS = ["shared", "reconstruction", "synthetic"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(data=st.data())
def test_a_file_is_read_or_refused(
    kind: str, fuzz: SimpleNamespace, folder: Path, marker: Path, data: st.DataObject
) -> None:
    fuzz.tensor_files.check(kind, data.draw(fuzz.tensor_files.inputs(kind, marker)), folder, marker)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_file_is_read_and_a_shorter_one_refused(
    kind: str, fuzz: SimpleNamespace, folder: Path, marker: Path
) -> None:
    whole = fuzz.tensor_files.whole_file(kind)
    assert not fuzz.tensor_files.check(kind, whole, folder, marker).refusal
    for length in range(0, len(whole), 13):
        assert fuzz.tensor_files.check(kind, whole[:length], folder, marker).refusal, length


def rewritten(fuzz: SimpleNamespace, path: Path, kind: str, **entries: str) -> Path:
    header, data = fuzz.tensor_files.taken_apart(fuzz.tensor_files.whole_file(kind))
    header["__metadata__"] |= entries
    path.write_bytes(fuzz.tensor_files.put_together(json.dumps(header), data))
    return path


@pytest.mark.parametrize(
    ("kind", "load_file", "entry"),
    [("shared", SharedGradient.load, "protocol"), ("synthetic", SyntheticSet.load, "class_names")],
)
def test_json_that_is_nested_too_deeply(
    fuzz: SimpleNamespace, tmp_path: Path, kind: str, load_file: type, entry: str
) -> None:
    path = rewritten(fuzz, tmp_path / "file", kind, **{entry: "[" * 100_000 + "]" * 100_000})
    with pytest.raises(ValueError, match=rf"in the header of '{path}', but got: '{entry}' nested too deeply"):
        load_file(path)


def test_a_number_beyond_floats(fuzz: SimpleNamespace, tmp_path: Path) -> None:
    path = rewritten(fuzz, tmp_path / "file", "synthetic", mean=f"[{10**400}]")
    with pytest.raises(ValueError, match=r"Expected 'mean'.*int too large"):
        SyntheticSet.load(path)


def test_messages_stay_short(fuzz: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected format") as refusal:
        SharedGradient.load(rewritten(fuzz, tmp_path / "file", "shared", format="x" * 10**6))
    assert len(str(refusal.value)) < 1000


def test_images_of_more_values_than_any_machine_holds() -> None:
    with pytest.raises(ValueError, match=r"at most 2\*\*30 values, but got 1 times \(3, 1048576, 1048576\)"):
        Protocol((3, 2**20, 2**20), 10)
    assert Protocol((3, 224, 224), 1000, num_images=1024).num_images == 1024


def with_tensor(fuzz: SimpleNamespace, path: Path, kind: str, name: str, tensor: torch.Tensor) -> Path:
    whole = fuzz.tensor_files.whole_file(kind)
    header, _ = fuzz.tensor_files.taken_apart(whole)
    path.write_bytes(save(load(whole) | {name: tensor}, metadata=header["__metadata__"]))
    return path


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("ids", torch.tensor([1 + 1j, 2]), "Expected `ids` as whole numbers .* but got torch.complex64"),
        ("labels", torch.ones(2, 2, dtype=torch.bool), "Expected `labels` as class indices .*, but got torch.bool"),
        ("labels", torch.ones(2, 2, dtype=torch.complex64), "Expected `labels` as class indices .*, but got torch.c"),
        ("gradients/b", torch.ones(2, 3).to(torch.float8_e5m2), "gradient of 'b' in floating point, but got torch.f"),
        ("state/w", torch.ones(3, 4, dtype=torch.complex64), "state of 'w' as real numbers, but got torch.complex64"),
    ],
)
def test_tensors_of_other_types(
    fuzz: SimpleNamespace, tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    if tensor.is_complex() and not fuzz.tensor_files.COMPLEX:
        pytest.skip("this version of safetensors writes no complex numbers")
    path = with_tensor(fuzz, tmp_path / "file", "shared", name, tensor)
    with pytest.raises(ValueError, match=rf"Expected a valid shared gradient in '{path}', but got: .*{message}"):
        SharedGradient.load(path)


def test_labels_of_another_shape_beside_images_that_are_not_finite() -> None:
    images = torch.full((2, 1, 3, 3), torch.nan)
    for labels in (torch.tensor([[0], [1]]), torch.tensor(0)):
        with pytest.raises(ValueError, match=r"Expected `labels` of shape \(2,\) as int64"):
            SyntheticSet(images, labels, (0.5,), (0.25,), ("cat", "dog"))
