"""Filters for distracting messages of other libraries: two advertisements and three warnings.

Importing attacks or condensation suppresses these messages, and no others::

    💡 Tip: For seamless cloud logging and experiment tracking, try installing ...
    💡 Tip: For seamless cloud uploads and versioning, try installing ...
    Starting from v1.9.0, `tensorboardX` has been removed as a dependency ... pip install ...
    `isinstance(treespec, LeafSpec)` is deprecated, use ...
    `torch.jit.script` is deprecated. Please switch to ...

The last two can only be fixed in Lightning and in torch, which calls `torch.jit.script` at the first forward-mode
derivative. All other messages and warnings are shown as usual.
"""

from __future__ import annotations

import logging
import warnings

_ADVERTISEMENT = "💡 Tip: For seamless cloud"
_WARNINGS = (
    r"Starting from v1\.9\.0, `tensorboardX` has been removed as a dependency",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"`torch\.jit\.script` is (deprecated|not supported)",
)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVERTISEMENT)


def leave_out() -> None:
    """Suppress the messages listed above from now on; further calls change nothing."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
