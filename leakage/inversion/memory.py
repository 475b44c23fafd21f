"""How many victims are attacked at once: as many as pay, and as the memory holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import finalize

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from leakage.clients.shared_gradient import SharedGradient

# Of the memory that is free, what the lanes may take.
_SHARE_OF_MEMORY = 0.5
# What is said where torch's own error is not raised.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
# Further lanes save little time, and would make the first results wait.
_MOST_ON_A_CPU, _MOST = 256, 1024


def choose_lanes(
    evaluate: Callable[[int], Any],
    bytes_per_lane: int,
    *,
    most: int,
    device: torch.device,
    processes: int = 1,
    bytes_to_begin: int = 0,
) -> int:
    """How many victims to attack at once: as many as save time, and as fit into half of the memory that is free.

    One and two lanes are evaluated to see how much memory one takes, with what the victims shared, beside
    ``bytes_per_lane`` of the solver, or as many bytes as it needs to begin, if those are more; several ``processes`` of
    one machine share it on CPUs. On a CPU there are at most 256 lanes, on a GPU 1,024. The time is not looked at: it
    differs from run to run, and with the lanes the rounding would.

    Returns:
        From 1 to ``most``; a power of two where the memory decides.

    Raises:
        MemoryError: one victim does not fit.
    """
    most = min(most, _MOST_ON_A_CPU if device.type == "cpu" else _MOST)
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    needed = torch.inf
    try:
        needed = bytes_per_lane + peak_memory(lambda: evaluate(1), device)
        if most > 1 and needed <= free:
            needed = min(needed, bytes_per_lane + peak_memory(lambda: evaluate(2), device) / 2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        most = 1  # if any
    if needed > free:
        wanted = f"{needed:,.0f} bytes of memory" if needed < torch.inf else "memory"
        raise MemoryError(
            f"Expected {wanted} for one victim, but got {free:,} bytes that are free. Take fewer "
            "images, a smaller `history_size` or another device."
        )
    needed = max(needed, bytes_to_begin)
    fitting = max(1, int(_SHARE_OF_MEMORY * free / needed))
    return most if fitting >= most else 2 ** (fitting.bit_length() - 1)


def shared_bytes(shared: SharedGradient) -> int:
    """Of what is each victim's own."""
    own = [*shared.gradients.values(), *(shared.state.values() if shared.own_weights else [])]
    return sum(tensor.nbytes for tensor in own)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had, of the device or of the machine."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    available = int(psutil.virtual_memory().available)
    try:  # a container or a scheduler may allow less
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):  # no such files, or "max"
        return available


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of the tensors that ``run`` makes, at the moment when they are most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    counted = _Counted()
    with counted:
        run()
    return counted.peak


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors made within, and of those that are gone again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        given = {part.untyped_storage().data_ptr() for part in tree_iter((args, kwargs)) if isinstance(part, Tensor)}
        for tensor in tree_iter(results):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:  # no view of them
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that memory could not be had, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
