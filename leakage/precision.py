"""Single precision as it is meant: 24 bits, not the 11 of TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# torch 2.9 brought a setting for each of these, beside the old flags.
_OPERATIONS = [(backend, operation) for backend in ("cuda", "mkldnn") for operation in ("conv", "rnn", "matmul")]
_BY_OPERATION = hasattr(torch._C, "_get_fp32_precision_getter")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and matrix products of float32 without TF32 (or bfloat16); the user's settings come back after it.

    On GPUs that have it, cuDNN's convolutions use TF32 by default, whose relative error of 1e-3 hides what an attack
    matches to 1e-8. It may be entered again within itself, costs some 30 microseconds, and is a decorator too.

    Example:
        >>> with full_precision():
        ...     torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        (False, 'highest')
    """
    if _BY_OPERATION and all(_get(*operation) in ("ieee", "none") for operation in _OPERATIONS):
        yield
        return
    with contextlib.ExitStack() as restoring:
        if _BY_OPERATION:
            for operation in _OPERATIONS:
                restoring.callback(_set, *operation, _own(*operation))
        # The flags as well, so that none contradicts a setting: reading it would then be an error, as it is from the
        # start where the user has changed a setting, but no flag.
        with contextlib.suppress(RuntimeError):
            restoring.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.backends.cudnn.allow_tf32 = False
        with contextlib.suppress(RuntimeError):
            restoring.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        if _BY_OPERATION:
            for operation in _OPERATIONS:
                _set(*operation, "ieee")
        yield


def _get(backend: str, operation: str) -> str:
    value: str = torch._C._get_fp32_precision_getter(backend, operation)
    return value


def _set(backend: str, operation: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def _own(backend: str, operation: str) -> str:
    """What is set for an operation, ``"none"`` where it follows the setting above it, which torch gives for both."""
    value = _get(backend, operation)
    if backend == "generic":
        return value
    above = (backend, "all") if operation != "all" else ("generic", "all")
    if value == "none" or value != _get(*above):
        return value
    kept = _own(*above)
    _set(*above, "ieee" if value != "ieee" else "tf32")
    follows = _get(backend, operation) != value
    _set(*above, kept)
    return "none" if follows else value
