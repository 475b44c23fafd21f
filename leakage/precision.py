"""Full single precision: 24 significant bits instead of the 11 of TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# torch 2.9 added a setting for each of these, next to the old flags.
_OPERATIONS = [(backend, operation) for backend in ("cuda", "mkldnn") for operation in ("conv", "rnn", "matmul")]
_BY_OPERATION = hasattr(torch._C, "_get_fp32_precision_getter")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Run float32 convolutions and matrix products without TF32 or bfloat16; the user's settings are restored after.

    On GPUs that support it, cuDNN's convolutions use TF32 by default. Its relative error of 1e-3 hides what an attack
    matches to 1e-8. The context manager can be nested, costs about 30 microseconds, and also works as a decorator.

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
        # Set the flags as well: if a flag contradicts a setting, reading it raises an error. Such a contradiction can
        # also exist from the start, if the user has changed a setting but no flag.
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
    """Return an operation's own setting, ``"none"`` where it inherits; torch reports the inherited value for both."""
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
