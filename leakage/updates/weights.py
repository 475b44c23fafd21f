"""Arrays in the forms of federated systems: files, lists and objects, read without running code."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from leakage.files.tensors import shorten

#: What arrays can hold: weights, a difference of weights (after training minus before), or a gradient.
HOLDS = ("weights", "difference", "gradient")
# What a system passes: a file, arrays by name or in order, or an object of Flower or NVFlare. Neither needs
# to be installed.
AnyWeights: TypeAlias = str | os.PathLike[str] | nn.Module | Mapping[str, Any] | Sequence[Any] | Any

_SAFETENSORS, _NUMPY, _TORCH = (".safetensors",), (".npz",), (".pt", ".pth", ".bin", ".ckpt")
# The keys under which checkpoints of PyTorch, Lightning and NVFlare keep the weights.
_INSIDE = ("state_dict", "model_state_dict", "model")
# NVFlare's names for what its objects hold.
_NVFLARE = {"WEIGHTS": "weights", "FULL": "weights", "WEIGHT_DIFF": "difference", "DIFF": "difference"}


@dataclass
class Arrays:
    """The arrays of an update, or of the weights before it.

    Attributes:
        tensors: the arrays by name, or as a list without names.
        holds: one of :data:`HOLDS`, or None if the object does not say.
    """

    tensors: dict[str, Tensor] | list[Tensor]
    holds: str | None = None


def open_weights(given: AnyWeights, what: str) -> Arrays:
    """Read the arrays from any form that :func:`leakage.updates.read_update` takes.

    Args:
        given: a file, arrays or an object.
        what: the name of the argument, for errors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file or object has another form, is truncated, or holds anything but arrays of real numbers.
    """
    holds = None
    if isinstance(given, str | os.PathLike):
        given = _file(Path(given).expanduser(), what)
    given = _record(given, what)
    if hasattr(given, "params_type") and hasattr(given, "params"):  # NVFlare's FLModel
        kind, given = given.params_type, given.params
        holds = _held(getattr(kind, "value", kind), what)
    elif isinstance(given, Mapping) and "DXO" in given:  # NVFlare's Shareable
        kind, meta, given = (given["DXO"].get(name) for name in ("kind", "meta", "data"))
        holds = _of_dxo(kind, meta, what)
    elif hasattr(given, "data_kind") and hasattr(given, "data"):  # NVFlare's DXO
        kind, meta, given = given.data_kind, getattr(given, "meta", None), given.data
        holds = _of_dxo(kind, meta, what)
    return Arrays(_tensors(given, what), holds)


def _record(given: Any, what: str) -> Any:
    """Return the part of an object of PyTorch or Flower that holds the arrays."""
    if isinstance(given, nn.Module):
        return given.state_dict()
    given = getattr(given, "parameters", given) if hasattr(given, "num_examples") else given  # FitRes
    given = getattr(given, "content", given) if hasattr(given, "metadata") else given  # Message
    if hasattr(given, "array_records"):  # RecordDict
        records = dict(given.array_records)
        if len(records) != 1:
            raise ValueError(
                f"Expected `{what}` with one record of arrays, but got {sorted(records)}. Pass one of them."
            )
        (given,) = records.values()
    if hasattr(given, "tensors") and hasattr(given, "tensor_type"):  # Parameters
        if given.tensor_type != "numpy.ndarray":
            raise ValueError(f"Expected `{what}` as 'numpy.ndarray' tensors, but got {given.tensor_type!r}.")
        try:
            given = [np.load(io.BytesIO(one), allow_pickle=False) for one in given.tensors]
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"Expected `{what}` as whole NumPy arrays, but got: {shorten(error)}") from error
    return given


def _held(kind: object, what: str) -> str:
    word = str(getattr(kind, "value", kind))
    if word not in _NVFLARE:
        raise ValueError(f"Expected `{what}` of a kind among {sorted(_NVFLARE)}, but got {word!r}.")
    return _NVFLARE[word]


def _of_dxo(kind: object, meta: object, what: str) -> str:
    done = meta.get("PROCESSED_ALGORITHM") if isinstance(meta, Mapping) else None
    if done:
        raise ValueError(f"Expected `{what}` as plain arrays, but got arrays processed by {str(done)!r}.")
    return _held(kind, what)


def _tensors(given: Any, what: str) -> dict[str, Tensor] | list[Tensor]:
    if isinstance(given, Mapping):
        inside = next((given[key] for key in _INSIDE if isinstance(given.get(key), Mapping)), None)
        tensors = {str(name): _tensor(array, what, name) for name, array in (inside or given).items()}
        if not tensors:
            raise ValueError(f"Expected `{what}` to hold arrays, but got none.")
        return _in_order(tensors) or tensors
    if isinstance(given, list | tuple) and given:
        return [_tensor(array, what, place) for place, array in enumerate(given)]
    raise ValueError(
        f"Expected `{what}` as a state_dict, a module, a list of arrays, a file or an object of Flower or NVFlare, "
        f"but got {type(given).__name__}{' of nothing' if isinstance(given, list | tuple) else ''}."
    )


def _in_order(tensors: dict[str, Tensor]) -> list[Tensor] | None:
    """Return the arrays as a list if their names are numbers, as in Flower and ``numpy.savez``; otherwise None."""
    places = [re.fullmatch(r"(?:arr_)?(\d+)", name) for name in tensors]
    numbers = {int(place[1]): tensor for place, tensor in zip(places, tensors.values(), strict=True) if place}
    return [numbers[place] for place in range(len(tensors))] if {*numbers} == {*range(len(tensors))} else None


def _tensor(array: Any, what: str, name: object) -> Tensor:
    if not isinstance(array, Tensor | np.ndarray | np.generic) and callable(getattr(array, "numpy", None)):
        try:
            array = array.numpy()  # Flower's Array, which does not read pickles either
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"Expected `{what}` with an array {name!r}, but got: {shorten(error)}") from error
    if isinstance(array, np.ndarray | np.generic):
        if array.dtype.kind not in "fiub":
            raise ValueError(f"Expected `{what}` with real numbers in {shorten(repr(name))}, but got {array.dtype}.")
        array = torch.from_numpy(np.array(array, order="C", dtype=array.dtype.newbyteorder("=")))
    if not isinstance(array, Tensor):
        raise ValueError(f"Expected `{what}` with an array {shorten(repr(name))}, but got {type(array).__name__}.")
    if array.is_complex() or array.is_quantized or array.layout != torch.strided:
        raise ValueError(
            f"Expected `{what}` with plain real numbers in {shorten(repr(name))}, "
            f"but got {array.dtype}, {array.layout}."
        )
    return array.detach().cpu()


def _file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of weights at '{path}', but got no such file.")
    kinds = (*_SAFETENSORS, *_NUMPY, *_TORCH)
    if path.suffix not in kinds:
        raise ValueError(f"Expected a file of weights that ends in one of {sorted(kinds)}, but got '{path}'.")
    try:
        if path.suffix in _SAFETENSORS:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") == "leakage.SharedGradient":
                    raise ValueError("it is a shared gradient, which `SharedGradient.load` reads.")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if path.suffix in _NUMPY:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A well-formed file may still claim impossible types or sizes.
    except Exception as error:
        raise ValueError(
            f"Expected a complete file of weights, but got '{path}', which is truncated, has another format, or holds "
            f"code (never run): {shorten(error)}"
        ) from error
    return loaded
