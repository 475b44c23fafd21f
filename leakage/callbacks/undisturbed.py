"""Run code in the middle of a training without changing its random and global state."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import warnings
from collections.abc import Iterator

import numpy as np
import torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore random states and PyTorch's global settings after the block, whatever the block does with them.

    Restored are the random states of Python, NumPy and PyTorch on all devices, determinism, cuDNN's settings, the
    precision of matrix products, the modes of autograd, and signal handlers. Messages of Lightning and all warnings are
    suppressed.

    Example:
        >>> state = torch.get_rng_state()
        >>> with undisturbed():
        ...     _ = torch.manual_seed(0)
        >>> bool((torch.get_rng_state() == state).all())
        True
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    switches = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    gradients = torch.is_grad_enabled()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(), torch.inference_mode(False):
            warnings.simplefilter("ignore")
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in handlers.items():
            # Handlers can only be set in the main thread, and one that was not set from Python can't be set again.
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        torch.set_grad_enabled(gradients)
        torch.set_float32_matmul_precision(precision)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = switches
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(python)
