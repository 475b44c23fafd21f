"""Choice of the number of lanes, from the memory that is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import finalize

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from leakage.clients.shared_gradient import SharedGradient

# Share of the free memory that the lanes may take.
_SHARE_OF_MEMORY = 0.5
# Words in errors that report missing memory without being torch's OutOfMemoryError.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
# More lanes would save little time, and delay the first results.
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
    """Return how many victims to attack at once: as many as save time and fit into half of the free memory.

    The memory per lane is measured by evaluating one lane and, if fewer than ``most`` of that size fit, two, plus
    ``bytes_per_lane`` of the solver. If starting a lane needs more (``bytes_to_begin``), that value is used. On CPUs,
    several ``processes`` of one machine share its memory. There are at most 256 lanes on a CPU and 1,024 on a GPU. Run
    time is not measured: it varies between runs, so the number of lanes would vary too, and with it the rounding of
    results.

    Returns:
        A number from 1 to ``most``; a power of two if memory is the limit.

    Raises:
        MemoryError: if a single victim does not fit.
    """
    most = min(most, _MOST_ON_A_CPU if device.type == "cpu" else _MOST)
    free = free_memory(device) // (processes if device.type == "cpu" else 1)
    needed = torch.inf
    try:
        needed = bytes_per_lane + peak_memory(lambda: evaluate(1), device)
        if _fitting(free, max(needed, bytes_to_begin)) < most and needed <= free:
            needed = min(needed, bytes_per_lane + peak_memory(lambda: evaluate(2), device) / 2)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        most = 1  # or none
    if needed > free:
        wanted = f"{needed:,.0f} bytes of memory" if needed < torch.inf else "memory"
        raise MemoryError(
            f"Expected {wanted} for one victim, but got {free:,} bytes of free memory. Use fewer "
            "images, a smaller `history_size` or another device."
        )
    fitting = _fitting(free, max(needed, bytes_to_begin))
    return most if fitting >= most else 2 ** (fitting.bit_length() - 1)


def _fitting(free: int, needed: float) -> int:
    """Return how many lanes that need so many bytes each fit into the share of the free memory, at least 1."""
    return max(1, int(_SHARE_OF_MEMORY * free / needed))


def shared_bytes(shared: SharedGradient) -> int:
    """Return the number of bytes of gradients, and of weights unless all victims share them."""
    own = [*shared.gradients.values(), *(shared.state.values() if shared.own_weights else [])]
    return sum(tensor.nbytes for tensor in own)


def free_memory(device: torch.device) -> int:
    """Return the number of free bytes of the GPU, or of the machine for a CPU."""
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
    """Return the peak number of bytes of the tensors that ``run`` creates."""
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
    """Track the bytes of all tensors created inside this mode and not yet freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in _tensors(results):
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._known:
                continue
            if given is None:
                given = {part.untyped_storage().data_ptr() for part in _tensors((args, *(kwargs or {}).values()))}
            if storage.data_ptr() not in given:  # not a view
                self._count(storage)
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operator, which are nested in tuples and lists only."""
    if isinstance(value, Tensor):
        if not value._is_zerotensor():  # forward-mode differentiation has such zeros, which take no memory
            yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error reports a failed memory allocation, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
