"""Fuzzed SharedGradient, Reconstruction and SyntheticSet files: mutated bytes, headers and tensors."""

from __future__ import annotations

import copy
import json
import pickle
import struct
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from fuzz_common import ODD_VALUES, BrokenError, Outcome, attempt, mutated_bytes
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.condensation import SyntheticSet
from leakage.inversion.reconstruction import Reconstruction

_Header = dict[str, Any]
_DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4", "C64", "I64", "I32", "I8"]
_DTYPES += ["U64", "U32", "U16", "U8", "BOOL", "f32", "", "F128"]
_CASTS = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
_CASTS += [torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.bool]
try:
    save({"x": torch.zeros(1, dtype=torch.complex64)})
    COMPLEX = True
    _CASTS.append(torch.complex64)
except KeyError:  # old versions of safetensors can't write complex numbers
    COMPLEX = False
_SIZES = [[], [0], [1], [2], [-1], [2, 0], [2**40], [2**62, 2**62], [0, 2**62, 2**62], ["2"], [1.5], [None], "2", 2]
_SIZES += [[1] * 70, [2, 3], [3, 2], [6]]
_NESTED = "[" * 100_000 + "]" * 100_000


def _shared() -> SharedGradient:
    generator = torch.Generator().manual_seed(0)
    return SharedGradient(
        gradients={"w": torch.randn(2, 3, 4, generator=generator), "b": torch.randn(2, 3, generator=generator)},
        state={"w": torch.randn(3, 4, generator=generator), "steps": torch.tensor(7)},
        ids=torch.tensor([4, 9]),
        protocol=Protocol((1, 2, 2), 3, num_images=2),
        labels=torch.tensor([[0, 1], [2, 2]]),
    )


def _reconstruction() -> Reconstruction:
    whole = torch.tensor([1, 2])
    images = torch.rand(2, 1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return Reconstruction(
        whole, images, torch.tensor([[0], [1]]), torch.tensor([0.5, 1e-7]), whole, whole, whole, whole
    )


def _synthetic() -> SyntheticSet:
    images = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return SyntheticSet(images, torch.tensor([0, 0, 1, 1]), (0.5,), (0.25,), ("cat", "dog"), "pets")


SOUND = {"shared": _shared, "reconstruction": _reconstruction, "synthetic": _synthetic}


@lru_cache
def whole_file(kind: str) -> bytes:
    """Return the bytes of a valid file, the same in every process (safetensors' header has no fixed order)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.safetensors"
        SOUND[kind]().save(path)
        header, data = taken_apart(path.read_bytes())
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return put_together(json.dumps(header), data)


def taken_apart(whole: bytes) -> tuple[_Header, bytes]:
    """Split a valid file into its header and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def put_together(header: str, data: bytes) -> bytes:
    """Join a header and the bytes of tensors to a file."""
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + data


@st.composite
def broken_headers(draw: st.DrawFn, whole: bytes) -> bytes:
    """Change the dtype, shape or place of a tensor, or the type, presence or nesting of entries in the header."""
    header, data = taken_apart(whole)
    for _ in range(draw(st.integers(1, 3))):
        names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
        metadata = header.get("__metadata__")
        entries = list(metadata) if isinstance(metadata, dict) else []
        choices = ["tensor", "metadata", "entry", "add"] if names and entries else ["add"]
        match draw(st.sampled_from(choices)):
            case "tensor":
                entry = header[draw(st.sampled_from(names))]
                key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
                offsets = st.tuples(st.integers(0, len(data) + 9), st.integers(0, len(data) + 9)).map(list)
                far = st.sampled_from([[0, 2**62], [2**63, 2**64], [-1, 4], [8, 0], [0], "0"])
                values = {"dtype": st.sampled_from(_DTYPES), "shape": st.sampled_from(_SIZES)}
                entry[key] = draw(values.get(key, offsets | far) | ODD_VALUES)
            case "metadata":
                metadata[draw(st.sampled_from(entries))] = draw(
                    ODD_VALUES | ODD_VALUES.map(json.dumps) | st.just(_NESTED)
                )
            case "entry":
                name = draw(st.sampled_from([*names, "__metadata__"]))
                if draw(st.booleans()):
                    header[name] = draw(ODD_VALUES)
                else:
                    del header[name]
            case "add":
                header[draw(st.text(max_size=5))] = draw(ODD_VALUES)
    text = json.dumps(header)
    if draw(st.integers(0, 9)) == 0:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return put_together(text, data)


@st.composite
def broken_protocols(draw: st.DrawFn, whole: bytes) -> bytes:
    """Change, remove, add or duplicate one field of the JSON in the header."""
    header, data = taken_apart(whole)
    metadata = header["__metadata__"]
    entry = draw(st.sampled_from([name for name in metadata if name not in ("format", "version")] or ["format"]))
    try:
        value = json.loads(metadata[entry])
    except ValueError:
        value = metadata[entry]
    if isinstance(value, dict) and value:
        name = draw(st.sampled_from([*value, "unknown", "__class__", "self"]))
        if name in value and draw(st.integers(0, 3)) == 0:
            del value[name]
        elif name == "image_shape":
            odd = st.lists(st.integers(-1, 5) | ODD_VALUES, min_size=2, max_size=4)
            value[name] = draw(odd | ODD_VALUES | st.just([2**20, 2**20, 2**20]))
        else:
            value[name] = draw(ODD_VALUES)
    elif isinstance(value, list) and value and draw(st.booleans()):
        value[draw(st.integers(0, len(value) - 1))] = draw(ODD_VALUES)
    else:
        value = draw(ODD_VALUES)
    text = json.dumps(value)
    if isinstance(value, dict) and draw(st.integers(0, 4)) == 0:
        text = text[:-1] + ', "num_images": 3}'
    metadata[entry] = text
    return put_together(json.dumps(header), data)


@st.composite
def broken_tensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """Write a well-formed file with other tensors: dtype, shape, values, names."""
    header, _ = taken_apart(whole)
    tensors = load(whole)
    for _ in range(draw(st.integers(1, 2))):
        if not tensors:
            break
        name = draw(st.sampled_from(sorted(tensors)))
        tensors.update(_another(draw, name, tensors.pop(name)))
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=header["__metadata__"])


def _another(draw: st.DrawFn, name: str, tensor: Tensor) -> dict[str, Tensor]:
    match draw(st.sampled_from(["cast", "shape", "value", "name", "none", "empty"])):
        case "cast":
            return {name: tensor.to(draw(st.sampled_from(_CASTS)))}
        case "shape":
            shapes = [
                tensor[None],
                tensor[..., None],
                tensor.flatten(),
                tensor.flatten()[:1],
                torch.cat([tensor.flatten()] * 2),
            ]
            return {name: draw(st.sampled_from(shapes)).clone()}
        case "value":
            changed = tensor.clone().flatten()
            if not len(changed):
                return {name: tensor}
            if tensor.dtype == torch.float32:
                changed[0] = draw(st.sampled_from([float("nan"), float("inf"), -1e38, 0.0]))
            elif changed.dtype == torch.int64:
                changed[0] = draw(st.sampled_from([-1, 0, 9, 2**62, -(2**63)]))
            return {name: changed.view(tensor.shape)}
        case "name":
            return {draw(st.sampled_from(["", "gradients/", "state/x", "ids", "labels", "images", "é"])): tensor}
        case "empty":
            return {name: tensor.new_empty(draw(st.sampled_from([(0,), (2, 0), (0, 3, 0), (2, 1, 0, 3, 3)])))}
        case _:
            return {}


class _Payload:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path(self.marker),)


def with_code(marker: Path) -> bytes:
    """Create a pickle that creates a file when it is read."""
    return pickle.dumps(_Payload(str(marker)))


def inputs(kind: str, marker: Path) -> st.SearchStrategy[bytes]:
    """Return all mutations of a file of this kind."""
    whole = whole_file(kind)
    code = with_code(marker)
    header, data = taken_apart(whole)
    carrying = copy.deepcopy(header)
    carrying["__metadata__"]["format"] = code.decode("latin-1")
    return st.one_of(
        mutated_bytes(whole),
        broken_headers(whole),
        broken_protocols(whole),
        broken_tensors(whole),
        st.sampled_from([b"", whole, code, whole + code, code + whole, put_together(json.dumps(carrying), data)]),
        st.sampled_from([struct.pack("<Q", 2**60), struct.pack("<Q", 10**8) + b"{", put_together(_NESTED, b"")]),
    )


def check(kind: str, data: bytes, folder: Path, marker: Path) -> Outcome:
    """Read ``data``; the result must be valid, and the same after it is written and read again."""
    path = folder / "input.safetensors"
    path.write_bytes(data)
    read: Callable[[Path], Any] = type(SOUND[kind]()).load
    outcome = attempt(lambda: read(path), named=str(path), marker=marker)
    if not outcome.refusal:
        again = folder / "again.safetensors"
        outcome.value.save(again)
        if not same(outcome.value, read(again)):
            raise BrokenError("Expected the same content after writing and reading, but got other content.")
        if data == whole_file(kind) and not same(outcome.value, SOUND[kind]()):
            raise BrokenError("Expected the content that was written, but got other content.")
    elif data == whole_file(kind):
        raise BrokenError(f"Expected a valid file to be read, but got {outcome.refusal}.")
    return outcome


def same(one: Any, other: Any) -> bool:
    """Return whether all attributes are equal, tensors bit for bit."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, SharedGradient | Reconstruction | SyntheticSet):
        return type(one) is type(other) and same(vars(one), vars(other))
    return bool(one == other)
