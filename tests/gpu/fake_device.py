"""A device that is none: tensors that say they are elsewhere, and refuse what a GPU refuses.

Their numbers lie on the CPU, so that whole runs go through, whatever they decide by them. (``FakeTensorMode`` has no
numbers, and its autograd needs a driver.) The device is called ``meta``, the only name besides ``cpu`` that autograd
takes everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ELSEWHERE = torch.device("meta")
aten = torch.ops.aten
# May read from one device and write to the other.
_COPIES = {aten.copy_, aten._to_copy}
# May take indices from the CPU.
_INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten._unsafe_index}


class DeviceError(RuntimeError):
    """What a GPU refuses."""


class Elsewhere(Tensor):
    """A tensor that is not on the CPU, as far as anybody can tell."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        if inner._is_zerotensor():  # which forward mode makes, and which has no numbers either
            inner = torch.zeros(inner.shape, dtype=inner.dtype)
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=ELSEWHERE
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Elsewhere({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    # Torch makes tensors of lists of indices without looking at the numbers.

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Files are read to the CPU.
        return self.inner.detach().__reduce_ex__(protocol)

    def _set_data(self, value: Tensor) -> None:
        if not isinstance(value, Elsewhere):
            raise DeviceError("Expected `data` of the same device, but got a tensor on the CPU.")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    data = property(lambda self: self.detach(), _set_data)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def _as_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


class FakeDevice(TorchDispatchMode):
    """Within it, ``torch.device("meta")`` is a device on which numbers are computed."""

    def __enter__(self) -> FakeDevice:
        self.literals = Literals()
        self.literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Tensors made of Python's numbers, which torch makes on ``meta`` without looking at them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs["device"]
            return func(*args, **kwargs | {"device": None if isinstance(args[0], Tensor) else "cpu"}).to(device)
        return func(*args, **kwargs)


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    bare = [tensor for tensor in tensors if tensor.is_meta and not isinstance(tensor, Elsewhere)]
    assert not bare, (func, args)
    packet = func.overloadpacket
    if there and packet not in _COPIES:
        looked_at = tree_leaves((args[0], args[2:])) if packet in _INDEXING else tensors
        here = [leaf for leaf in looked_at if isinstance(leaf, Tensor) and not isinstance(leaf, Elsewhere)]
        first_is_here = packet in _INDEXING and not isinstance(args[0], Elsewhere)
        if any(tensor.ndim for tensor in here) or first_is_here:
            raise DeviceError(f"Expected all tensors on one device, but got some on the CPU in {func}.")
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device) == ELSEWHERE
        kwargs = kwargs | {"device": torch.device("cpu")}
    if there and kwargs.get("generator") is not None:
        raise DeviceError(f"Expected a generator of the device, but got one of the CPU in {func}.")
    inner_args, inner_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.inner, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if packet is aten.copy_ or not there:
        return args[0] if packet is aten.copy_ else out
    out = tree_map_only(Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if packet is not aten._to_copy else out


class FakeAccelerator(Accelerator):
    """What the Trainer takes it for."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [ELSEWHERE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "fake"


def fake_strategy() -> SingleDeviceStrategy:
    return SingleDeviceStrategy(device=ELSEWHERE, accelerator=FakeAccelerator())
